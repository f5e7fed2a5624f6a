"""--mode=compile: counts against hand-made HLO and the analytic FLOPs, the table, the exit."""

import dataclasses
import json
import subprocess
from importlib import util

import fakes
import jax
import pytest
import tiny

from steptool_jax.config import Architecture
from steptool_jax.policy import attention, families, model, sharding
from steptool_jax.policy.kernels import cached
from steptool_jax.run import compile as compile_mode
from steptool_jax.run.cost import hlo_counts, pricing, roofline
from steptool_jax.run.cost.chips import CHIPS, Chip

V5E = CHIPS["v5e"]
# A loop of 3 turns (0, 2, 4 < 6) around a product [4, 8] x [8, 16] whose result stays on the core,
# a gather over 4 devices, and a branch.
TEXT = """HloModule m, is_scheduled=true

%fused (p0: f32[4,8], p1: f32[2,8,16], p2: s32[]) -> f32[4,16] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[2,8,16]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%p1, %p2, %p2, %p2), dynamic_slice_sizes={1,8,16}
  %flat = f32[8,16]{1,0} bitcast(%slice)
  ROOT %dot = f32[4,16]{1,0} dot(%p0, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[4,8], f32[2,8,16])) -> (s32[], f32[4,8], f32[2,8,16]) {
  %arg = (s32[], f32[4,8], f32[2,8,16]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[2,8,16]{2,1,0} get-tuple-element(%arg), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %product = f32[4,16]{1,0:T(8,128)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[4,8], f32[2,8,16]) tuple(%next, %x, %w)
}

%condition (arg: (s32[], f32[4,8], f32[2,8,16])) -> pred[] {
  %arg = (s32[], f32[4,8], f32[2,8,16]) parameter(0)
  %six = s32[] constant(6)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

%dear (y: f32[4,8]) -> f32[4,4] {
  %y = f32[4,8]{1,0} parameter(0)
  ROOT %square = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%cheap (y: f32[4,8]) -> f32[4,4] {
  %y = f32[4,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %zeros = f32[4,4]{1,0} broadcast(%zero), dimensions={}
}

ENTRY %main (a: f32[4,8], b: f32[2,8,16]) -> f32[16,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[2,8,16]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[4,8], f32[2,8,16]) tuple(%start, %a, %b)
  %loop = (s32[], f32[4,8], f32[2,8,16]) while(%init), condition=%condition, body=%body
  %which = s32[] constant(1)
  %branch = f32[4,4]{1,0} conditional(%which, %a, %a), branch_computations={%cheap, %dear}
  ROOT %all = f32[16,8]{1,0} all-gather(%a), channel_id=1, \
replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
}
"""


def test_counts_by_hand():
  counts = hlo_counts.count(TEXT, V5E)
  assert counts.flops == 3 * 2 * 4 * 8 * 16 + 2 * 4 * 4 * 8
  assert counts.cycles == 300
  assert counts.collectives == {"all-gather": 3 * 4 * 8 * 4}
  # Each turn reads x [4, 8], one slice [8, 16] of w, the counter, which it also adds to; the
  # product stays on the core. The branch reads y twice, the gather its shard, and both write.
  turn = (4 * 8 + 8 * 16 + 1) * 4 + (1 + 1 + 1) * 4
  assert counts.hbm_bytes == 3 * turn + (2 * 4 * 8 + 4 * 4) * 4 + (4 * 8 + 16 * 8) * 4


def test_a_fusion_without_an_estimate_has_no_cycles():
  counts = hlo_counts.count(TEXT.replace('"100"', f'"{2**63 - 1}"'), V5E)
  assert counts.cycles == 0
  assert counts.flops == hlo_counts.count(TEXT, V5E).flops
  assert counts.seconds < hlo_counts.count(TEXT, V5E).seconds


def test_a_fusion_within_a_fusion_counts_as_if_written_out():
  """Where a TPU slices a layer's weights out of their stack: the slice is read, not the stack."""
  start, end = TEXT.index("  %slice ="), TEXT.index("  ROOT %dot")
  inner = TEXT[start:end].replace("%p1", "%q0").replace("%p2", "%q1")
  inner = inner.replace("%flat", "ROOT %turned")
  head = "%inner (q0: f32[2,8,16], q1: s32[]) -> f32[8,16] {\n"
  parameters = "  %q0 = f32[2,8,16]{2,1,0} parameter(0)\n  %q1 = s32[] parameter(1)\n"
  call = "  %flat = f32[8,16]{1,0} fusion(%p1, %p2), kind=kLoop, calls=%inner\n"
  text = TEXT[:start] + call + TEXT[end:]
  text = text.replace("%fused (p0", head + parameters + inner + "}\n\n%fused (p0")
  assert hlo_counts.count(text, V5E) == hlo_counts.count(TEXT, V5E)
  # And where the product is in the inner one.
  whole = TEXT.replace("calls=%fused", "calls=%outer")
  outer = TEXT[TEXT.index("%fused (p0") : TEXT.index("  %slice =")].replace("%fused", "%outer")
  outer += "  ROOT %same = f32[4,16]{1,0} fusion(%p0, %p1, %p2), kind=kOutput, calls=%fused\n}\n\n"
  nested = whole.replace("%body (arg", outer + "%body (arg")
  assert hlo_counts.count(nested, V5E) == hlo_counts.count(TEXT, V5E)


# A gather that begins before a loop and goes on inside of it, beside the loop's own work.
OVERLAPPED = """
%begin (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %first = f32[16,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4]
}

%beside (x: f32[4,8], whole: f32[16,8], i: s32[]) -> (f32[16,8], f32[4,8], s32[]) {
  %x = f32[4,8]{1,0} parameter(0)
  %whole = f32[16,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %more = f32[16,8]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %out = (f32[16,8], f32[4,8], s32[]) tuple(%more, %x, %next)
}

%body (arg: (s32[], f32[4,8], f32[16,8])) -> (s32[], f32[4,8], f32[16,8]) {
  %arg = (s32[], f32[4,8], f32[16,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %whole = f32[16,8]{1,0} get-tuple-element(%arg), index=2
  %work = (f32[16,8], f32[4,8], s32[]) fusion(%x, %whole, %i), kind=kLoop, calls=%beside
  %next = s32[] get-tuple-element(%work), index=2
  ROOT %out = (s32[], f32[4,8], f32[16,8]) tuple(%next, %x, %whole)
}

%condition (arg: (s32[], f32[4,8], f32[16,8])) -> pred[] {
  %arg = (s32[], f32[4,8], f32[16,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (a: f32[4,8]) -> (s32[], f32[4,8], f32[16,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %whole = f32[16,8]{1,0} fusion(%a), kind=kCustom, calls=%begin
  %init = (s32[], f32[4,8], f32[16,8]) tuple(%start, %a, %whole)
  ROOT %loop = (s32[], f32[4,8], f32[16,8]) while(%init), condition=%condition, body=%body
}
"""


def test_a_collective_beside_a_loop_counts_once():
  counts = hlo_counts.count(OVERLAPPED, V5E)
  assert counts.collectives == {"all-gather": 3 * 4 * 8 * 4}
  # The gather reads its shard and writes the whole once; each turn reads and writes its counter.
  assert counts.hbm_bytes == (4 * 8 + 16 * 8) * 4 + 6 * 2 * 4


def test_a_reduce_scatter_within_a_fusion_is_one():
  """A TPU writes it as an all-reduce in a fusion of its own, which may stand in another one.

  Counted as an all-reduce, the links of an update's gradients would seem to carry twice as much.
  """
  fused = """
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %whole = f32[8,4]{1,0} all-reduce(%x), channel_id=3, replica_groups=[1,4]<=[4]
  %zero = s32[] constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={2,4}
}

%beside (x: f32[8,4], y: f32[8,4]) -> (f32[2,4], f32[8,8]) {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %scattered = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %dot = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %out = (f32[2,4], f32[8,8]) tuple(%scattered, %dot)
}

ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  CALL
}
"""
  alone = "ROOT %own = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
  beside = "ROOT %own = (f32[2,4], f32[8,8]) fusion(%a, %a), kind=kOutput, calls=%beside"
  for call, waits in ((alone, True), (beside, False)):
    counts = hlo_counts.count(fused.replace("CALL", call), V5E)
    assert counts.collectives == {"reduce-scatter": 8 * 4 * 4 * 3 / 4}
    assert (counts.background == 0) == waits


def test_a_loop_without_a_bound_takes_the_given_one():
  text = TEXT.replace("%six = s32[] constant(6)", "%six = s32[] get-tuple-element(%arg), index=0")
  assert hlo_counts.count(text, V5E, (5,)).cycles == 500
  with pytest.raises(ValueError, match="loop loop has no known bound"):
    hlo_counts.count(text, V5E)


@pytest.mark.parametrize(
  ("left", "right", "out", "attributes", "flops"),
  [
    # A plain product [8, 4] x [4, 16].
    ((8, 4), (4, 16), (8, 16), "dim_labels=bf_io->bf", 2 * 8 * 4 * 16),
    # A batch of 3 products, as a window over the batch that is mostly padding.
    (
      (8, 3, 4),
      (3, 4, 16),
      (8, 5, 16),
      "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=b0f_0io->b0f",
      2 * 8 * 4 * 16 * 9,
    ),
    # The same with a stride over a dilated batch: only the diagonal is there.
    (
      (8, 3, 4),
      (3, 4, 16),
      (8, 3, 16),
      "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=b0f_0io->b0f",
      2 * 8 * 4 * 16 * 3,
    ),
  ],
)
def test_convolution_flops(left, right, out, attributes, flops):
  assert hlo_counts.convolution_flops(left, right, out, attributes) == flops


@pytest.mark.parametrize(
  ("notation", "size"),
  [("mesh['a'=2,'b'=8] {'a','b'}", 16), ("[2,4]<=[8]", 4), ("{{0,1,2},{3,4,5}}", 3)],
)
def test_group_sizes(notation, size):
  text = TEXT.replace("mesh['x'=4,'y'=2] {'x'}", notation)
  assert hlo_counts.count(text, V5E).collectives["all-gather"] == (size - 1) * 4 * 8 * 4


def test_the_longest_term_is_the_estimate():
  chip = Chip(flops=100.0, hbm=1, bandwidth=10.0, link=5.0, clock=2.0)
  counts = hlo_counts.Counts(flops=400.0, hbm_bytes=70.0, cycles=3.0, kernel_flops=50.0)
  counts.collectives["all-gather"] = 25.0
  counts.seconds, counts.background = 9.0, 2.5
  cost = roofline.estimate(counts, chip)
  assert dataclasses.astuple(cost) == (4.0 + 1.0, 7.0, 2.5, 1.5 + 1.0, 9.0)
  assert (cost.seconds, cost.longest_term, cost.binding) == (9.0, 7.0, "hbm")
  assert roofline.estimate(counts, dataclasses.replace(chip, clock=0)).schedule == 0
  counts.background = 11.0  # links that take longer than all that runs beside them
  assert roofline.estimate(counts, chip).seconds == 11.0


def test_seconds_of_operations_by_hand():
  """Each operation at its own price: a loop bound by cycles, a collective that all wait for."""
  chip = Chip(flops=1e12, hbm=1, bandwidth=1e9, link=1e9, clock=1e6)
  counts = hlo_counts.count(TEXT, chip)
  # A turn: 100 cycles are longer than its bytes; its counter's sum moves 12 bytes. The
  # branch moves 320 bytes. The gather's copies take 640 bytes, and its ring of 4 two hops.
  assert counts.seconds == pytest.approx(3 * (100e-6 + 12e-9) + 320e-9 + 640e-9 + 2e-6)
  assert counts.background == 0
  # As a start and a done it runs beside the rest.
  start = TEXT.replace(
    "ROOT %all = f32[16,8]{1,0} all-gather(", "ROOT %all = f32[16,8]{1,0} all-gather-start("
  )
  assert hlo_counts.count(start, chip).background == pytest.approx(2e-6)
  # Where bytes are the most, the ring takes their time.
  slow = dataclasses.replace(chip, link=1e6)
  assert hlo_counts.count(TEXT, slow).seconds - counts.seconds == pytest.approx(384 / 2e6 - 2e-6)


def test_prices_of_kernels_by_hand():
  """What the estimator takes for a kernel that XLA does not see into."""
  # 4 slots of 1,024 positions, 1 head of width 128, 8 queries: keys and values once, 2 products.
  cache, rows = (2, 4, 1, 1024, 128), (4, 1, 8, 128)
  flops, moved, steps = cached.cost("flash_decode.1", (rows, cache, cache), (2, 2, 2))
  assert flops == 2 * 2 * 4 * 8 * 1024 * 128
  assert moved == 2 * 4 * 1024 * 128 * 2 + 2 * 4 * 8 * 128 * 2
  assert steps == pytest.approx(4 * 0.35e-6)  # 1,024 positions are the 2**18 bytes of one step
  new = (rows, rows, cache, cache)
  assert cached.cost("write_cache", new, (2,) * 4)[1] == 6 * 4 * 8 * 128 * 2
  assert cached.cost("splash_mha_fwd", (rows, cache), (2, 2)) == (0, 0, 0)
  # As int8: half of the bytes, 4 of a scale for each position, and steps of twice the positions.
  cache, scales = (2, 4, 1, 2048, 128), (2, 4, 1, 1, 2048)
  kept = (rows, cache, cache, scales, scales), (2, 1, 1, 4, 4)
  flops, moved, steps = cached.cost("flash_decode.1", *kept)
  assert flops == 2 * 2 * 4 * 8 * 2048 * 128
  assert moved == 2 * 4 * 2048 * (128 + 4) + 2 * 4 * 8 * 128 * 2
  assert steps == pytest.approx(4 * 0.35e-6)
  lanes = (4, 1, 1, 128)
  new = (rows, rows, lanes, lanes, cache, cache, scales, scales), (1, 1, 4, 4, 1, 1, 4, 4)
  assert cached.cost("write_cache", *new)[1] == 6 * 4 * 8 * 128 + 2 * 3 * 4 * 128 * 4
  chip = Chip(flops=100.0, hbm=1, bandwidth=10.0, link=5.0, clock=2.0)
  assert (chip.kernel(50.0, 5.0, 0.2), chip.kernel(5.0, 30.0, 0.2)) == (1.0, 3.0)
  assert chip.kernel(5.0, 5.0, 4.0) == 4.0


def priced(workdir, only=(), **changes):
  """A run on this machine's CPU in the place of a slice, priced as a chip: (config, reports)."""
  config = tiny.make(
    model__path="/not/here",
    algorithm="steptool",
    train__row_tokens=384,
    train__micro_rows=2,
    rollout__tasks=2,
    rollout__samples=2,
    train__minibatches=1,
    **changes,
  )
  programs = compile_mode.programs
  with pytest.MonkeyPatch.context() as patch:
    # How many blocks the attention of a CPU works on is settled when it runs: here one.
    patch.setattr(attention, "CPU_BLOCK", config.train.row_tokens)
    patch.setattr(
      compile_mode,
      "programs",
      lambda *args: [dataclasses.replace(p, trips=(*p.trips, 1)) for p in programs(*args)],
    )
    chip = Chip(1e12, 16, 1e11, 1e10, 1e9)
    patch.setattr(compile_mode, "open_topology", lambda name: (chip, jax.devices()[:1]))
    compile_mode.run(config, workdir, "cpu:1", only)
  return config, json.loads((workdir / "summary.json").read_text())["programs"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  config, reports = priced(tmp_path_factory.mktemp("compile"))
  assert list(reports) == ["prepare", "update", "append", "decode", "fork", "rewind"]
  return config, reports


def test_flops_of_what_is_not_computed_again(result, tmp_path):
  """Of 2 micro-batches 1 by the policy and 2 by the reference, where the sampler's log-probs are
  taken, and not 2 by both."""
  (_, today), (_, reports) = result, priced(tmp_path, ["prepare"], rollout__reuse=0.01)
  for name, slack in (("flops", 0.01), ("useful_flops", 1e-6)):
    wanted = 0.75 * today["prepare"][name]
    assert reports["prepare"][name] == pytest.approx(wanted, rel=slack)


def test_flops_are_the_analytic_ones(result):
  """Weights cost 6 N T, the output matrix once more, attention 2 products forward and 5 back."""
  config, reports = result
  m = compile_mode.abstract_policy(config).model
  tokens = 2 * 2 * 384  # micro-batches, rows, positions
  body = families.useful_flops(m) - 2 * m.hidden_size * m.vocab_size
  head = 2 * m.hidden_size * m.vocab_size
  pairs = 384 * 384  # of one block, whose upper half is masked
  product = 2 * 4 * pairs * m.num_layers * m.num_heads * m.head_dim
  expected = tokens * (3 * body + 4 * head) + 7 * product
  assert reports["update"]["flops"] == pytest.approx(expected, rel=0.01)
  forward = tokens * (body + head) + 2 * product
  assert reports["prepare"]["flops"] == pytest.approx(2 * forward, rel=0.01)
  useful = tokens * (3 * (body + head) + 3 * 4 * m.num_layers * m.num_heads * m.head_dim * 192)
  assert reports["update"]["useful_flops"] == pytest.approx(useful)


def test_flops_of_the_engine(result):
  config, reports = result
  m = compile_mode.abstract_policy(config).model
  slots, size, chunk = config.rollout.slots, 320, config.rollout.decode_chunk  # 5 whole blocks
  attention = 4 * m.num_layers * m.num_heads * m.head_dim * size
  token = families.useful_flops(m) + attention
  assert reports["decode"]["flops"] == pytest.approx(slots * chunk * token, rel=0.01)
  without_head = token - 2 * m.hidden_size * m.vocab_size
  assert reports["append"]["flops"] == pytest.approx(slots * 320 * without_head, rel=0.01)


def test_what_lies_beside_counts(result):
  """In a rollout the moments and the reference stay in memory; a tiny model has 3 copies there."""
  _, reports = result
  beside = reports["decode"]["beside_gib"] / reports["prepare"]["alive_gib"]
  assert 0.5 < beside < 0.8
  for r in reports.values():
    assert r["hbm_gib_per_chip"] >= r["alive_gib"]
    assert r["fits"]


def test_a_reward_model_counts():
  """A run that another model paid was said to fit without it."""
  config = tiny.make(model__path="/not/here", lora__rank=2, model__dtype="bfloat16")
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  paid = tiny.replace(config, rewards__source="model", rewards__model__path="/not/here")
  found = []
  for c in (config, paid):
    policy = compile_mode.abstract_policy(c)
    with jax.set_mesh(mesh):
      made = compile_mode.programs(c, policy, mesh)
    found.append([pricing.bytes_per_chip(p.alive) for p in made])
  (added,) = {with_it - without for without, with_it in zip(*found, strict=True)}
  params = jax.eval_shape(lambda: model.init_params(policy.model, jax.random.key(0)))
  everything = sum(x.size for x in jax.tree.leaves(params))
  # Matrices in bfloat16; norms and the value head, a few numbers, in float32.
  assert 2 * everything < added < 2.1 * everything


def test_the_table_and_what_does_not_fit(result):
  config, reports = result
  text = pricing.table(reports)
  assert len(text.splitlines()) == 8
  assert text.count("| yes |") == 6
  failed = {"capacity_gib": 16, "fits": False, "hbm_gib_per_chip": 23.5, "compile_seconds": 9.0}
  failed["largest_arguments"] = ["cache/k bfloat16[4, 8]: 3.00 GiB"]
  columns = {line.count("|") for line in pricing.table(reports | {"update": failed}).splitlines()}
  assert columns == {text.splitlines()[0].count("|")}
  message = compile_mode.misfit(config, "v5e:2x2", {"update": failed, "decode": failed})
  assert "update does not fit v5e:2x2: 23.50 GiB of 16; largest: cache/k" in message
  assert "try model.remat=full, train.micro_rows below 2" in message
  assert "try rollout.slots below 8" in message
  assert "share_prompts" not in message
  long = tiny.replace(config, train__row_tokens=32_768)
  assert "train.share_prompts=False (its masks" in compile_mode.knob(long, "update")


def test_a_misfit_ends_with_an_error(result, monkeypatch, tmp_path):
  config, reports = result
  device = (CHIPS["v5e"], jax.devices()[:1])
  monkeypatch.setattr(compile_mode, "open_topology", lambda name: device)
  monkeypatch.setattr(
    pricing, "report", lambda program, *_: reports[program.name] | {"fits": False}
  )
  with pytest.raises(RuntimeError, match="decode does not fit v5e:1"):
    compile_mode.run(config, tmp_path, "v5e:1")
  assert (tmp_path / "summary.json").exists()


def test_bad_input_is_named(monkeypatch, tmp_path):
  for name in ("v9e:4x4", "v5e", "v5e:4x4:2", "16"):
    with pytest.raises(ValueError, match=r"--topology: .* is unknown; .* v4, v5e, v5p, v6e, tpu7x"):
      compile_mode.open_topology(name)
  with monkeypatch.context() as patch:
    patch.setattr(compile_mode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu.*pip install -e '\.\[tpu\]'"):
      compile_mode.open_topology("v5e:2x2")
  device = (CHIPS["v5e"], jax.devices()[:1])
  monkeypatch.setattr(compile_mode, "open_topology", lambda name: device)
  config = tiny.make(model__path="/not/here", mesh__tensor=3)
  with pytest.raises(ValueError, match="--programs: 'train' is not one of prepare, update, append"):
    compile_mode.run(tiny.make(model__path="/not/here"), tmp_path, "v5e:1", ["train"])
  with pytest.raises(ValueError, match=r"mesh axis tensor: 3 does not divide 1 devices; valid"):
    compile_mode.run(config, tmp_path, "v5e:1")


@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_real_slice(tmp_path):
  """Runs in a process of its own, because libtpu stays in it."""
  flags = ("--mode=compile", "--config.model.path=/not/here")
  mesh = ("--config.mesh.fsdp=-1", "--config.mesh.data=1")
  config = f"{tiny.ROOT}/tests/run/tiny.py:lora"
  command = tiny.command(tmp_path, *flags, *mesh, config=config)

  def run(topology):
    return subprocess.run(
      [*command, f"--topology={topology}"],
      env=tiny.environment(),
      capture_output=True,
      text=True,
      timeout=280,
      check=False,
    )

  done = run("v5e:2x2")
  assert done.returncode == 0, done.stderr[-2000:]
  reports = json.loads((tmp_path / "summary.json").read_text())["programs"]
  assert all(r["fits"] for r in reports.values())
  assert reports["update"]["kernel_flops"] > 0
  assert "all-gather" in reports["update"]["collective_bytes"]
  assert "collective-permute" not in reports["update"]["collective_bytes"], "an unrolled ring"
  alone = run("v5e:1x1")  # less than a host
  assert alone.returncode == 0, alone.stderr[-2000:]
  reports = json.loads((tmp_path / "summary.json").read_text())["programs"]
  assert reports["update"]["collective_bytes"] == {}
  refused = run("v5e:3x5")
  assert refused.returncode == 1
  assert "--topology: libtpu refuses 'v5e:3x5'" in refused.stderr


def test_the_shape_is_that_of_the_model_that_is_named(tmp_path):
  """A model of the package, and a GGUF file, were compiled as the default shape."""
  found = compile_mode.abstract_policy(tiny.make(model__path="asset:own_tools")).model
  assert (found.hidden_size, found.num_layers, found.vocab_size) == (160, 5, 768)
  (tmp_path / "m.gguf").touch()
  usual = Architecture()
  config = tiny.replace(tiny.make(model__path=str(tmp_path / "m.gguf")), model__architecture=usual)
  with pytest.raises(ValueError, match=r"m\.gguf is a GGUF file, whose shape"):
    compile_mode.abstract_policy(config)


def test_the_copy_for_rollouts_counts_once():
  """As what lies beside `layout` and as its output it made the largest peak of all."""
  assert "counted once" in fakes.on_devices(8, __file__).stdout


def _on_eight_devices():
  sizes = {"rollout__slots": 8, "train__micro_rows": 8, "sft__micro_rows": 4}
  config = tiny.make(model__path="/not/here", rollout__tensor=2, **sizes)
  mesh = sharding.make_mesh(1, 8, 1)
  with jax.set_mesh(mesh):
    made = compile_mode.programs(config, compile_mode.abstract_policy(config), mesh)
    found = {program.name: program for program in made}
    layout = pricing.report(found["layout"], Chip(1e12, 16, 1e11, 1e10, 1e9), 8)
  alone, shown = (pricing.bytes_per_chip(found[n].alive) for n in ("layout", "rewind"))
  (_, copy, slots) = (pricing.bytes_per_chip(part) for part in found["rewind"].alive)
  assert copy > 0
  assert alone == shown - copy - slots
  assert layout["alive_gib"] == alone / 2**30
  # With rollout.lag both lie beside the update, and the batch and a copy of the policy beside them.
  config = tiny.replace(config, rollout__lag=1)
  with jax.set_mesh(mesh):
    made = compile_mode.programs(config, compile_mode.abstract_policy(config), mesh)
  late = {program.name: pricing.bytes_per_chip(program.alive) for program in made}
  trainable = late["update"] - pricing.bytes_per_chip(found["update"].alive) - copy - slots
  assert trainable > 0
  assert late["rewind"] >= shown + trainable


if __name__ == "__main__":
  _on_eight_devices()
  print("counted once")
