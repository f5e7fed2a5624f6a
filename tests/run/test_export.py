import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from steptool_jax.evaluation import records
from steptool_jax.policy import model
from steptool_jax.policy.formats import hub
from steptool_jax.run import evaluate, export, train
from steptool_jax.run.parts import build, opening
from steptool_jax.run.training import restore

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers")

TEXT = "Which orders did Mira Tol place?"
CASES = {
  "full": ("", {"sft__steps": 1, "train__export": True}),
  "lora": ("lora", {"sft__steps": 0}),
  "lora_sft": ("lora", {"sft__steps": 1}),
}


def config_of(name, compiled):
  arg, changes = CASES[name]
  one = {
    "train__iterations": 1,
    "evaluation__tasks": 1,
    "compilation_cache": compiled,
  }
  return tiny.make(arg, **(one | changes))


def open_torch(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(loaded, ids):
  with torch.no_grad():
    return loaded(torch.tensor(np.asarray(ids)[None])).logits[0].numpy()


def our_logits(parts, variables, ids):
  tokens = jnp.asarray(ids, jnp.int32)[None]
  positions = jnp.arange(tokens.shape[1])[None]

  @jax.jit
  def logits(variables):
    shape = parts.policy.model
    hidden = model.forward(shape, variables, tokens, positions, jnp.ones_like(tokens))
    return model.project_logits(shape, variables, hidden)[0]

  return np.asarray(logits(variables))


def engine_greedy(parts, variables, prompt, count):
  state = parts.engine.append(variables, parts.engine.init(), {0: prompt})
  ids = []
  while len(ids) < count:
    seed = np.zeros(2, np.uint32)
    state, decoded = parts.engine.decode(
      variables, state, {0: count - len(ids)}, {0: seed}, [-1], 0.0
    )
    ids += decoded.tokens[0, : decoded.count[0]].tolist()
  return ids


def torch_greedy(loaded, prompt, count):
  ids = list(prompt)
  for _ in range(count):
    ids.append(int(torch_logits(loaded, ids)[-1].argmax()))
  return ids[len(prompt) :]


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_the_export(name, tmp_path, compiled):
  config = config_of(name, compiled)
  train.run(config, tmp_path)
  if config.train.export:  # written by training already: the same bytes again
    written = (tmp_path / "export/model.safetensors").read_bytes()
  summary = export.run(config, tmp_path)
  assert json.loads((tmp_path / "summary_export.json").read_text()) == summary
  assert json.loads((tmp_path / "summary.json").read_text())["mode"] == "train", "the run's figures"
  assert summary["mode"] == "export"
  assert (summary["phase"], summary["iterations"]) == ("rl", 1)
  out = tmp_path / "export"
  assert summary["directory"] == str(out)
  if config.train.export:
    assert (out / "model.safetensors").read_bytes() == written

  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    variables, _ = restore.newest_variables(parts)
    start = build.initial_variables(config, parts.policy, parts.mesh)
    tasks = parts.environment.tasks("heldout")
    prompt = parts.policy.chat_format.prompt(None, tasks[0].tools, tasks[0].query)
    ours = our_logits(parts, variables, prompt)
    greedy = engine_greedy(parts, variables, prompt, 64)
    before = our_logits(parts, start, prompt)
    base = tmp_path / "base"
    hub.save_params(base, parts.policy.model, start["params"], parts.policy.raw_config)
  assert np.abs(ours - before).max() > 0.01, "training changed nothing: the test would be empty"

  loaded = open_torch(out)
  np.testing.assert_allclose(torch_logits(loaded, prompt), ours, atol=1e-4)
  assert torch_greedy(loaded, prompt.tolist(), 64) == greedy

  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  messages = [{"role": "user", "content": tasks[0].query}]
  tools = [
    {"type": "function", "function": {"name": t.name, "parameters": dict(t.parameters)}}
    for t in tasks[0].tools
  ]
  rendered = tokenizer.apply_chat_template(
    messages, tools=tools, add_generation_prompt=True, return_dict=False
  )
  assert rendered == prompt.tolist()

  if name == "lora":
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(open_torch(base), out / "adapter")
    np.testing.assert_allclose(torch_logits(adapted, prompt), ours, atol=1e-4)
  else:  # SFT is folded into the base: an adapter alone would not fit the user's model
    assert not (out / "adapter").exists()


def test_evaluate_reads_the_newest_checkpoint(tmp_path, compiled):
  config = config_of("full", compiled)
  bare = evaluate.run(config, tmp_path)
  assert bare["source"] == "model: random weights"
  assert not (tmp_path / "config.json").exists(), "evaluation does not bind the folder"
  trained = train.run(config, tmp_path)
  summary = evaluate.run(tiny.replace(config, evaluation__tasks=99), tmp_path)
  assert json.loads((tmp_path / "summary_evaluate.json").read_text()) == summary
  assert records.read_run(tmp_path).summary == trained, "the report shows the training's figures"
  assert summary["source"] == "checkpoint: rl, iteration 1"
  assert (summary["mode"], summary["tasks"]) == ("evaluate", 10), "tasks that there really are"
  assert {"pass_rate", "calls_per_task", "tokens_per_task", "answered"} <= summary.keys()
  assert trained["heldout_tasks"] == 1

  with pytest.raises(ValueError, match=r"another config; different: lora\.rank;"):
    evaluate.run(tiny.replace(config, lora__rank=4), tmp_path)
  with pytest.raises(ValueError, match=r"different: sft\.steps;"):
    export.run(tiny.replace(config, sft__steps=0), tmp_path)

  # A checkpoint that is damaged must not be taken for none.
  for part in (tmp_path / "checkpoints").glob("*/state"):
    for file in part.rglob("*"):
      if file.is_file():
        file.unlink()
  with pytest.raises(RuntimeError, match="all checkpoints of .* are corrupt"):
    evaluate.run(config, tmp_path)


def test_an_sft_run_with_adapters_exports_its_adapter(tmp_path, compiled, monkeypatch):
  config = tiny.replace(config_of("lora_sft", compiled), algorithm="sft")
  trained = train.run(config, tmp_path)
  assert {"pass_rate_base", "pass_rate_sft"} <= trained.keys()
  assert "pass_rate_rl" not in trained
  summary = export.run(config, tmp_path)
  assert (summary["phase"], summary["iterations"]) == ("sft", 1)
  adapter = json.loads((tmp_path / "export/adapter/adapter_config.json").read_text())
  assert adapter["base_model_name_or_path"] is None, "random weights have no name"

  # A full disk: what was exported before is kept.
  written = {path: path.read_bytes() for path in (tmp_path / "export").rglob("*.*")}
  full = type("Usage", (), {"free": 7_000})
  monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: full)
  with pytest.raises(OSError, match=r"the weights need .* GB are free; make room"):
    export.run(config, tmp_path)
  assert {path: path.read_bytes() for path in (tmp_path / "export").rglob("*.*")} == written
  assert len(written) > 5
  assert not list(tmp_path.glob("*export.new*"))


def test_export_and_evaluate_without_what_they_need(tmp_path):
  with pytest.raises(FileNotFoundError, match="no checkpoint; train first"):
    export.run(tiny.make(), tmp_path)
  config = tiny.make(model__path="/nowhere/model", model__chat_format="auto")
  with pytest.raises(FileNotFoundError, match="/nowhere/model"):
    evaluate.run(config, tmp_path)
  with pytest.raises(FileNotFoundError, match="/nowhere/model"):
    train.run(config, tmp_path)
  assert not (tmp_path / "config.json").exists(), "a failed start does not bind the folder"


def test_rows_that_do_not_divide_the_mesh():
  mesh = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
  with pytest.raises(ValueError, match=r"train\.micro_rows: 6 is not a multiple .*valid: 4 or 8"):
    train.check_rows(tiny.make(train__micro_rows=6), mesh)
