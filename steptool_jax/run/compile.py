"""--mode=compile: will it fit, and how fast will it be? For a TPU slice that is not here.

Compiles prepare, update and the engine's programs of a run for --topology=v5e:4x4 (or any other
that libtpu knows) from abstract arrays: no weights are made, no chip is needed. Prints a table and
writes WORKDIR/summary.json. Every position counts as a sampled one, every slot as full.
"""

import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from steptool_jax.config import Architecture, Config, Lora
from steptool_jax.learning import algorithms, batching, steptable
from steptool_jax.learning.programs import preparation, update
from steptool_jax.learning.steptable import StepTable
from steptool_jax.policy import (
  attention,
  caches,
  experts,
  families,
  headcache,
  kv_slots,
  lora,
  model,
  sharding,
)
from steptool_jax.policy import engine as engine_lib
from steptool_jax.policy.formats import hfconfig
from steptool_jax.policy.length_classes import LengthClasses
from steptool_jax.run.cost import pricing
from steptool_jax.run.cost.chips import CHIPS, Chip
from steptool_jax.run.cost.pricing import Program
from steptool_jax.run.parts import build, tokenizers
from steptool_jax.run.training import setup
from steptool_jax.run.workdir import outputs
from steptool_jax.types import TokenBatch, TrainState

APPEND_TOKENS = 1024  # the chunk that append is compiled for, at most
STOP_IDS = 4
LARGE_MASKS = 16_384  # tokens of a row from which masks of shared prompts are the largest buffers
HOST = [2, 2, 1]  # chips of a whole host, by side
KNOWN = "v4:2x2x2, v5e:1x1, v5e:2x2, v5e:4x4, v5e:8x8, v5p:2x2x4, v6e:2x4, v6e:4x4, tpu7x:2x2x1"


def run(
  config: Config, workdir: pathlib.Path, topology: str, only: Sequence[str] = ()
) -> dict[str, Any]:
  """Compiles all programs, or `only` these, and returns the table.

  Raises:
    ValueError: libtpu missing, an unknown topology, one that does not divide the model, an unknown
      program.
    RuntimeError: a program does not fit (summary.json is written all the same).
  """
  chip, devices = open_topology(topology)
  policy = abstract_policy(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)
  sharding.check_rows("train.micro_rows", config.train.micro_rows, mesh)
  reports = {}
  with jax.set_mesh(mesh):
    for program in chosen(programs(config, policy, mesh), only):
      logging.info("compiling %s for %s", program.name, topology)
      reports[program.name] = pricing.report(program, chip, len(devices))
      outputs.write_summary(workdir, "compile", {"programs": reports})
  print(pricing.table(reports))
  misfits = [name for name, r in reports.items() if not r["fits"]]
  if misfits:
    raise RuntimeError(misfit(config, topology, {name: reports[name] for name in misfits}))
  return {"mode": "compile", "topology": topology, "programs": ", ".join(reports)}


def chosen(found: list[Program], only: Sequence[str]) -> list[Program]:
  """The programs of these names; all for none."""
  names = [program.name for program in found]
  for name in only:
    if name not in names:
      raise ValueError(f"--programs: {name!r} is not one of {', '.join(names)}")
  return [program for program in found if not only or program.name in only]


def open_topology(name: str) -> tuple[Chip, list]:
  """The chip and the devices of a slice, without the slice. Any other backend is the CPU."""
  found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
  if not found or found[1] not in CHIPS:
    raise ValueError(
      f"--topology: {name!r} is unknown; it is GENERATION:SIZE with a generation among "
      f"{', '.join(CHIPS)}, for example {KNOWN}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "--mode=compile needs libtpu, which is not installed: pip install -e '.[tpu]' (on Linux, "
      "x86-64; a TPU itself is not needed)"
    )
  # Tells libtpu not to look for the machine that it is not on.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody's chip is taken
  jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  try:
    devices = list(topologies.get_topology_desc(name, "tpu", **_host(found[2])).devices)
  except Exception as error:  # libtpu's own, of no public type
    reason = str(error).splitlines()[0]
    raise ValueError(f"--topology: libtpu refuses {name!r} ({reason}); try {KNOWN}") from error
  return CHIPS[found[1]], devices


def _host(size: str) -> dict[str, list[int]]:
  """What libtpu must be told of slices that are smaller than a whole host, such as 1x1."""
  sides = [int(side) for side in size.split("x")]
  bounds = [min(pair) for pair in itertools.zip_longest(sides, HOST, fillvalue=1)]
  return {"chips_per_host_bounds": bounds} if bounds != HOST else {}


@dataclasses.dataclass(frozen=True)
class AbstractPolicy:
  """What programs read of a build.Policy: no tokenizer, no weights."""

  model: model.ModelConfig
  lora: Lora | None


def abstract_policy(config: Config) -> AbstractPolicy:
  """The configured model.

  From model.path's config.json where it is here, else from model.architecture, which configs of
  published models fill in.
  """
  m = config.model
  run_fields = {"dtype": m.dtype, "param_dtype": m.param_dtype, "remat": m.remat}
  source = tokenizers.located(m.path)
  if source.suffix == ".gguf" and source.exists() and m.architecture == Architecture():
    raise ValueError(
      f"config.model.path: {m.path} is a GGUF file, whose shape --mode=compile does not read; give "
      "the folder that a run has made of it (WORKDIR/imported/…), or fill in model.architecture"
    )
  if m.path and (source / "config.json").exists():
    model_config, _ = hfconfig.load_config(source, **run_fields)
  else:
    model_config = build.random_model(config, **run_fields)
  return AbstractPolicy(*build.with_adapters(config, model_config))


# --- the programs ---


def programs(config: Config, policy: AbstractPolicy, mesh: Mesh) -> list[Program]:
  """prepare, update, append, decode, fork and rewind as --mode=train runs them on this mesh."""
  learner = setup.build_learner(config, policy.model, config.algorithm)
  state = setup.abstract_state(policy, mesh, learner)
  prepare, step = update.compile_programs(learner)
  t, r = config.train, config.rollout
  conversations = config.data.batch if config.data.path else r.tasks * r.samples
  most = -(-conversations // t.micro_rows)
  minibatch = -(-most // t.minibatches)
  count = jax.ShapeDtypeStruct((), np.int32)
  row = batching.empty_batch(1, 1, segmented=algorithms.changes_history(config))
  whole = abstract_batch(row, config, most, mesh)
  table = None
  if learner.fits is not None:
    host = steptable.empty(1, steptable.USUAL_WIDTH)
    table = abstract_batch(host, config, most, mesh, steptable.USUAL_WIDTH)
  recorded = preparation.abstract_recorded(learner, whole, table)
  if recorded is not None:
    recorded = sharding.abstract(recorded, whole.tokens.sharding)
  filled, _ = jax.eval_shape(prepare, state, whole, count, table, recorded)
  prepared = abstract_batch(filled, config, most, mesh)
  part = abstract_batch(filled, config, minibatch, mesh)
  tokens = {n: n * t.micro_rows * t.row_tokens for n in (most, minibatch)}
  train = functools.partial(useful_flops, policy, context=t.row_tokens / 2)
  passes = int(learner.with_reference) + (1 / most if config.rollout.reuse else 1)
  chosen = functools.partial(_expert_blocks, policy, mesh)
  found = [
    Program(
      "prepare",
      prepare,
      arguments=(state, whole, count, table, recorded),
      alive=(state, whole),
      trips=(most,),
      expert_blocks=chosen(t.micro_rows, t.row_tokens),
      useful_flops=passes * tokens[most] * train(backward=False),
      tokens=tokens[most],
    ),
    Program(
      "update",
      step,
      arguments=(state, part, count),
      alive=(state, prepared, part),
      trips=(minibatch,),
      expert_blocks=chosen(t.micro_rows, t.row_tokens),
      useful_flops=tokens[minibatch] * train(backward=True),
      tokens=tokens[minibatch],
    ),
  ]
  beside = engine_programs(config, policy, mesh, state)
  if r.lag:
    # The next conversations are sampled with a copy of the policy while this batch is learnt from.
    _, *rollout = beside[-1].alive
    found = [dataclasses.replace(p, alive=(*p.alive, *rollout, state.trainable)) for p in found]
    beside = [dataclasses.replace(p, alive=(p.alive, prepared, state.trainable)) for p in beside]
  if config.rewards.source != "model":
    return found + beside
  scorer = _reward_model(config, policy, mesh)
  return [dataclasses.replace(p, alive=(p.alive, scorer)) for p in found + beside]


def _reward_model(config: Config, policy: AbstractPolicy, mesh: Mesh) -> Any:
  """The model that pays, as it lies on the chips: of rewards.model.path where it is here, else one
  of the policy's own shape."""
  path = pathlib.Path(config.rewards.model.path)
  shape = dataclasses.replace(policy.model, lora_scale=None)
  if (path / "config.json").exists():
    m = config.model
    shape, _ = hfconfig.load_config(path, dtype=m.dtype, param_dtype=m.param_dtype)

  def frozen():
    params = model.init_params(shape, jax.random.key(0))
    return model.in_compute_dtype(shape, {"params": params})

  variables = jax.eval_shape(frozen)
  return sharding.abstract(variables, sharding.shardings(variables, mesh))


def engine_programs(
  config: Config, policy: AbstractPolicy, mesh: Mesh, state: TrainState
) -> list[Program]:
  """append and decode for all slots, fork and rewind; the train state stays in memory meanwhile.

  Where rollouts have a layout of their own, `layout` makes a copy of the weights, which stays too.
  Long slots have programs of their own, and `move` copies into them.
  """
  engine = build.build_engine(config, policy, mesh)
  engines = engine.engines if isinstance(engine, LengthClasses) else (engine,)
  slots = tuple(_abstract_slots(policy, each) for each in engines)
  where = engines[0].mesh
  trained = lora.join_variables(state.trainable, state.frozen)
  variables, alive, found = trained, (state, slots), []
  if where is not mesh:
    copy = jax.eval_shape(functools.partial(model.in_compute_dtype, policy.model), trained)
    variables = sharding.abstract(copy, sharding.shardings(copy, where))
    alive = (state, variables, slots)
    program = engine_lib.layout_program(where, trained)
    # The copy is the program's own output, and slots are made after it.
    found.append(Program("layout", program, (policy.model, trained), alive=state))
  share = functools.partial(Program, alive=alive, mesh=where)
  for each, own, suffix in zip(engines, slots, ("", "_long"), strict=False):
    found += _programs_of(policy, each, own, variables, share, suffix)
  if isinstance(engine, LengthClasses):
    arguments = (*slots, _on_host(engines[-1], (engines[-1].slots,), np.int32))
    trips = (policy.model.num_layers * _cache_blocks(slots[0]),)
    found.append(share("move", engine.move_program, arguments, trips=trips))
  return found


def _abstract_slots(policy: AbstractPolicy, engine: engine_lib.Engine) -> kv_slots.EngineState:
  sizes = engine.slots, engine.size
  where = kv_slots.state_shardings(policy.model, *sizes, engine.mesh, engine.kv_cache)
  empty = functools.partial(kv_slots.init_state, policy.model, *sizes, engine.kv_cache)
  return sharding.abstract(jax.eval_shape(empty), where)


def _cache_blocks(slots: kv_slots.EngineState) -> int:
  size = slots.cache.k.shape[caches.positions_axis(slots.cache)]
  return -(-size // attention.cache_block(size))


def _on_host(engine: engine_lib.Engine, shape: tuple[int, ...], dtype: Any) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(engine.mesh))


def _programs_of(
  policy: AbstractPolicy,
  engine: engine_lib.Engine,
  slots: kv_slots.EngineState,
  variables: Any,
  share: Any,
  suffix: str,
) -> list[Program]:
  """The four programs of one class of slots."""
  host = functools.partial(_on_host, engine)
  numbers = host((engine.slots,), np.int32)
  blocks, layers = _cache_blocks(slots), policy.model.num_layers
  token = functools.partial(useful_flops, policy, backward=False)
  if engine.tiled:
    shards = engine.mesh.size // engine.mesh.shape["tensor"]
    tiles = headcache.MOST_TILES
    tokens = host((shards * tiles * headcache.TILE,), np.int32)
    fed, appended, context = (shards * tiles, headcache.TILE), tokens.size, engine.size / 2
    append, options = (variables, slots, tokens, numbers), {"tiles": tiles}
  else:
    width = min(APPEND_TOKENS, engine.size)
    fed, appended = (engine.slots, width), engine.slots * width
    context = engine.size - width / 2
    append, options = (variables, slots, None, host((engine.slots, width), np.int32), numbers), {}
  decode = (
    variables,
    slots,
    None,
    numbers,
    host((STOP_IDS,), np.int32),
    host((engine.slots, 2), np.uint32),
    host((), np.float32),
  )
  decoded = engine.slots * engine.chunk
  blocks_of = functools.partial(_expert_blocks, policy, engine.mesh)
  return [
    share(
      f"append{suffix}",
      engine.append_program,
      append,
      options=options,
      trips=(blocks,),
      expert_blocks=blocks_of(*fed),
      useful_flops=appended * token(context=context, head=False),
      tokens=appended,
    ),
    share(
      f"decode{suffix}",
      engine.decode_program,
      decode,
      trips=(engine.chunk, blocks),
      expert_blocks=blocks_of(engine.slots, 1),
      useful_flops=decoded * token(context=engine.size - engine.chunk / 2),
      tokens=decoded,
    ),
    share(f"fork{suffix}", engine.fork_program, (slots, numbers), trips=(layers * blocks,)),
    share(f"rewind{suffix}", engine.rewind_program, (slots, numbers)),
  ]


def _expert_blocks(policy: AbstractPolicy, mesh: Mesh, rows: int, length: int) -> int:
  """Trips of the loop over a mixture's blocks, experts being chosen evenly."""
  per_token = policy.model.experts_per_token
  return experts.blocks(per_token, rows, length, mesh.shape["fsdp"]) if per_token else 1


def abstract_batch(
  batch: TokenBatch | StepTable, config: Config, number: int, mesh: Mesh, length: int = 0
) -> TokenBatch | StepTable:
  """The fields of `batch` as [number, micro_rows, length or row_tokens], placed as by to_device."""
  shape = (number, config.train.micro_rows, length or config.train.row_tokens)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.ROWS))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=place), batch)


def useful_flops(
  policy: AbstractPolicy, context: float, backward: bool, head: bool = True
) -> float:
  """FLOPs a token that cannot be left out: forward, and where asked for the backward pass.

  Full training costs three times the forward pass; with adapters the frozen kernels need no
  gradient of their own, so their share costs twice.
  """
  config = policy.model
  attention = families.useful_flops(config, context) - families.useful_flops(config)
  weights = families.useful_flops(config) - (
    0.0 if head else 2.0 * config.hidden_size * config.vocab_size
  )
  adapters = 2.0 * _adapter_size(policy)
  if not backward:
    return weights + adapters + attention
  return (3 if policy.lora is None else 2) * weights + 3 * (adapters + attention)


def _adapter_size(policy: AbstractPolicy) -> int:
  if policy.lora is None:
    return 0
  # The key is made inside: outside it would be an array, and the mesh's devices are not there.
  adapters = jax.eval_shape(lambda: lora.init_lora(policy.model, policy.lora, jax.random.key(0)))
  return sum(x.size for x in jax.tree.leaves(adapters))


def misfit(config: Config, topology: str, reports: dict[str, dict[str, Any]]) -> str:
  """One sentence a program: by how much, the largest buffers, and the knob that would help."""
  sentences = []
  for name, r in reports.items():
    largest = r.get("largest_buffers") or r["largest_arguments"]
    sentences.append(
      f"{name} does not fit {topology}: {r['hbm_gib_per_chip']:.2f} GiB of {r['capacity_gib']:g}; "
      f"largest: {'; '.join(largest[: pricing.LISTED])}; try {knob(config, name)}"
    )
  return "\n".join(sentences)


def knob(config: Config, program: str) -> str:
  """What to change first, from the configuration as it is."""
  advice = []
  if program not in ("prepare", "update"):
    advice.append(f"rollout.slots below {config.rollout.slots}")
    if config.rollout.tensor:
      advice.append("rollout.tensor=0 (no second copy of the weights)")
  else:
    if config.model.remat != "full":
      advice.append("model.remat=full")
    if config.train.share_prompts and config.train.row_tokens >= LARGE_MASKS:
      advice.append("train.share_prompts=False (its masks grow with row_tokens squared)")
    advice.append(f"train.micro_rows below {config.train.micro_rows} or mesh.tensor above 1")
  if not config.lora.rank:
    if config.train.optimizer.first_moment != "bfloat16":
      advice.append("train.optimizer.first_moment=bfloat16")
    advice.append("lora.rank=16")
  if config.mesh.data > 1:
    advice.append("more of the mesh as fsdp and less as data")
  advice.append("a larger slice with mesh.fsdp=-1")
  return ", ".join(advice)
