"""Hugging Face directories: parity with transformers' own models, and every broken directory."""

import dataclasses
import functools
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config
from jax.sharding import PartitionSpec as P

from steptool_jax.policy import model, sharding
from steptool_jax.policy.families import RopeScaling
from steptool_jax.policy.formats import hfconfig, hub, tensorfile

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24))
SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 1000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
MODELS = {
  "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
  "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
  "llama_bias_linear": (
    "Llama",
    {
      "attention_bias": True,
      "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
  ),
  "smollm2": (
    "Llama",
    {
      "tie_word_embeddings": True,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "hidden_size": 24,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
  ),
  "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
  "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
  "qwen3_moe": (
    "Qwen3Moe",
    {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
  ),
  "qwen3_moe_normalised": (
    "Qwen3Moe",
    {
      "moe_intermediate_size": 20,
      "num_experts": 4,
      "num_experts_per_tok": 3,
      "head_dim": 8,
      "norm_topk_prob": True,
    },
  ),
  # 5 layers with a window of 7 tokens and one that sees all 24; both rotary bases, 1 + weight in
  # norms, norms before and behind, scaled embeddings, GELU.
  "gemma3": (
    "Gemma3Text",
    {
      "num_hidden_layers": 6,
      "num_key_value_heads": 1,
      "head_dim": 16,
      "sliding_window": 7,
      "query_pre_attn_scalar": 16,
    },
  ),
  "gemma3_capped_stretched": (
    "Gemma3Text",
    {
      "num_hidden_layers": 3,
      "head_dim": 8,
      "sliding_window": 5,
      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "query_pre_attn_scalar": 12,
      "final_logit_softcapping": 5.0,
      "tie_word_embeddings": False,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
      },
    },
  ),
}
OF_FAMILY = {"Gemma3Text": "Gemma3"}  # where the model's class is not named as its config's


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, variables):
  tokens = jnp.asarray(TOKENS, jnp.int32)
  positions = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
  hidden = model.forward(config, variables, tokens, positions, jnp.ones_like(tokens))
  return model.project_logits(config, variables, hidden)


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_transformers_import_and_export(name, tmp_path):
  torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
  import transformers

  family, changes = MODELS[name]
  torch.manual_seed(0)
  settings = getattr(transformers, f"{family}Config")(**(SIZES | changes))
  theirs = (
    getattr(transformers, f"{OF_FAMILY.get(family, family)}ForCausalLM")(settings).eval().float()
  )
  with torch.no_grad():
    for tensor in theirs.parameters():  # norms and biases too, else they test nothing
      tensor.add_(torch.randn_like(tensor) * 0.1)
  theirs.save_pretrained(tmp_path / "theirs")

  def their_logits(directory):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
      return loaded.eval()(torch.tensor(TOKENS)).logits.numpy()

  config, raw = hfconfig.load_config(tmp_path / "theirs")
  params = hub.load_params(tmp_path / "theirs", config)
  ours = our_logits(config, {"params": params})
  np.testing.assert_allclose(ours, their_logits(tmp_path / "theirs"), atol=1e-4)

  changed = jax.tree.map(lambda x: x * 1.1, params)
  for out, raw_config, limit in (("a", raw, 10**9), ("b", None, 4000)):
    hub.save_params(tmp_path / out, config, changed, raw_config, max_shard_bytes=limit)
    expected = our_logits(config, {"params": changed})
    np.testing.assert_allclose(expected, their_logits(tmp_path / out), atol=1e-4)
    assert hfconfig.load_config(tmp_path / out)[0] == config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A sharded export with a non-zero value head and a tokenizer next to it."""
  config = tiny_config(tie_embeddings=False)
  params = model.init_params(config, jax.random.key(0))
  params["value_head"] = {"kernel": jnp.arange(32.0)[:, None], "bias": jnp.array([7.0])}
  source = tmp_path_factory.mktemp("source")
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"eos_token_id": 5}')
  (source / "secret.txt").write_text("not a tokenizer file")
  raw = hfconfig.raw_config_of(config, eos_token_id=5)
  directory = tmp_path_factory.mktemp("parent") / "model"
  hub.save_params(directory, config, params, raw, source, max_shard_bytes=20_000)
  return config, params, directory


def test_round_trip_is_exact_and_complete(saved):
  config, params, directory = saved
  assert hfconfig.load_config(directory)[0] == config
  loaded = hub.load_params(directory, config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  names = {path.name for path in directory.iterdir()}
  shards = {name for name in names if name.startswith("model-")}
  assert len(shards) > 2
  assert all((directory / name).stat().st_size < 21_000 for name in shards)
  assert names - shards == {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "value_head.safetensors",
  }
  assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": 5}
  assert [path.name for path in directory.parent.iterdir()] == ["model"]  # no temporary left


def test_the_index_tells_the_value_head_from_the_model(tmp_path):
  """vLLM reads all safetensors files of a folder without an index, and ends at the value head's;
  so that of a single file has to be there, with every tensor of the model and no other."""
  config = tiny_config()
  hub.save_params(tmp_path / "m", config, model.init_params(config, jax.random.key(0)))
  index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
  names = {name.hub for name in hfconfig.tensor_names(config)}
  assert index["weight_map"] == dict.fromkeys(names, "model.safetensors")


def test_reads_what_safetensors_writes_and_the_other_way_round(saved, tmp_path):
  numpy_files = pytest.importorskip("safetensors.numpy")
  _, params, directory = saved
  index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
  name = "model.layers.1.mlp.down_proj.weight"
  theirs = numpy_files.load_file(directory / index[name])[name]
  np.testing.assert_array_equal(theirs, params["layers"]["down"]["kernel"][1].T)


def test_storage_in_bfloat16(tmp_path):
  config = tiny_config(param_dtype="bfloat16")
  params = model.init_params(config, jax.random.key(0))
  hub.save_params(tmp_path / "m", config, params)
  assert hfconfig.load_config(tmp_path / "m")[1]["dtype"] == "bfloat16"
  loaded = hub.load_params(tmp_path / "m", config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  wide = hub.load_params(tmp_path / "m", dataclasses.replace(config, param_dtype="float32"))
  assert wide["layers"]["q"]["kernel"].dtype == jnp.float32
  np.testing.assert_array_equal(wide["layers"]["q"]["kernel"], params["layers"]["q"]["kernel"])


def test_loading_onto_a_mesh(saved):
  config, params, directory = saved
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  loaded = hub.load_params(directory, config, mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert loaded["layers"]["q"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")


def test_save_refuses_and_leaves_nothing_behind(saved, tmp_path):
  config, params, directory = saved
  with pytest.raises(FileExistsError, match="exists and is not empty"):
    hub.save_params(directory, config, params)
  other = hfconfig.raw_config_of(dataclasses.replace(config, rope_theta=5.0))
  with pytest.raises(ValueError, match=r"rope_theta is 5.0, the model has 10000.0"):
    hub.save_params(tmp_path / "m", config, params, other)
  with pytest.raises(FileNotFoundError, match="to take the tokenizer from"):
    hub.save_params(tmp_path / "m", config, params, source=tmp_path / "none")
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_writing_and_named_while_writing(
  saved, tmp_path, monkeypatch
):
  config, params, _ = saved
  out = tmp_path / "m"
  with monkeypatch.context() as patched:
    patched.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 7_000}))
    words = rf"{tmp_path}: the weights need 0.\d+ GB and 0.00 GB are free; make room"
    with pytest.raises(OSError, match=words):
      hub.save_params(out, config, params)
  # Room for all by what the system says, and then no file may grow beyond 16 KiB.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
  try:
    words = r"model-00001-of-\d+.safetensors: could not be written \(.*make room, or choose"
    with pytest.raises(OSError, match=words):
      hub.save_params(out, config, params, max_shard_bytes=20_000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert list(tmp_path.iterdir()) == []
  hub.save_params(out, config, params, max_shard_bytes=20_000)


def test_blocks_of_a_tensor_are_written_in_order(saved, tmp_path, monkeypatch):
  config, params, directory = saved
  monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 7 * 4 * 32)  # 7 rows of the embedding's 61
  hub.save_params(tmp_path / "m", config, params, max_shard_bytes=20_000)
  for path in sorted(directory.glob("*.safetensors")):
    assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()


def test_adapters_need_their_scale(saved, tmp_path):
  config, params, _ = saved
  with pytest.raises(ValueError, match=r"lora_scale: None.*with_lora"):
    hub.save_params(tmp_path / "m", config, params, adapters={"layers": {}})


def copy(directory, tmp_path):
  out = tmp_path / "copy"
  out.mkdir()
  for path in directory.iterdir():
    (out / path.name).write_bytes(path.read_bytes())
  return out


def edit(path, change):
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


def test_broken_directories(saved, tmp_path):
  config, _, directory = saved
  with pytest.raises(FileNotFoundError, match="no such model directory"):
    hub.load_params(tmp_path / "none", config)
  with pytest.raises(FileNotFoundError, match="no such model directory"):
    hfconfig.load_config(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="no config.json"):
    hfconfig.load_config(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*index.json"):
    hub.load_params(tmp_path, config)
  broken = copy(directory, tmp_path)
  (broken / "config.json").write_text('{"model_type": ')
  with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
    hfconfig.load_config(broken)
  with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(61, 32\).*\(62, 32\)"):
    hub.load_params(broken, dataclasses.replace(config, vocab_size=62))
  with pytest.raises(ValueError, match=r"missing tensors: model.layers.2.*and \d+ more"):
    hub.load_params(broken, dataclasses.replace(config, num_layers=3))
  with pytest.raises(ValueError, match=r"unknown tensors for llama: model.layers.1"):
    hub.load_params(broken, dataclasses.replace(config, num_layers=1))
  shard = next(broken.glob("model-00001*"))
  (broken / "value_head.safetensors").write_bytes(shard.read_bytes())
  with pytest.raises(ValueError, match=r"value_head.safetensors: holds"):
    hub.load_params(broken, config)


def test_missing_value_head_is_zero(saved, tmp_path):
  config, _, directory = saved
  plain = copy(directory, tmp_path)
  (plain / "value_head.safetensors").unlink()
  head = hub.load_params(plain, config)["value_head"]
  assert not np.any(head["kernel"])
  assert not np.any(head["bias"])


@pytest.mark.parametrize("keep", [4, 40, 0.5, -1])
def test_truncated_shard(saved, tmp_path, keep):
  config, _, directory = saved
  broken = copy(directory, tmp_path)
  shard = sorted(broken.glob("model-0*"))[1]
  data = shard.read_bytes()
  shard.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
  with pytest.raises(ValueError, match=rf"{shard.name}: truncated or no safetensors file"):
    hub.load_params(broken, config)


def test_missing_and_foreign_shards(saved, tmp_path):
  config, _, directory = saved
  broken = copy(directory, tmp_path)
  shard = sorted(broken.glob("model-0*"))[1]
  data = shard.read_bytes()
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file; the directory is inc"):
    hub.load_params(broken, config)
  shard.write_bytes(b"<html>this is not it</html>")
  with pytest.raises(ValueError, match="truncated or no safetensors file"):
    hub.load_params(broken, config)
  shard.write_bytes(data)
  index = broken / "model.safetensors.index.json"
  edit(index, lambda x: x["weight_map"].update({"model.norm.weight": shard.name}))
  with pytest.raises(ValueError, match=f"model.norm.weight is not in {shard.name}"):
    hub.load_params(broken, config)
  edit(index, lambda x: x["weight_map"].update({"model.norm.weight": "../x.safetensors"}))
  with pytest.raises(ValueError, match="lies outside of the directory"):
    hub.load_params(broken, config)
  edit(index, lambda x: x["weight_map"].update({"model.norm.weight": 5}))
  with pytest.raises(ValueError, match="shard 5 lies outside of the directory"):
    hub.load_params(broken, config)
  edit(index, lambda x: x.pop("weight_map"))
  with pytest.raises(ValueError, match="has no weight_map"):
    hub.load_params(broken, config)


@pytest.mark.parametrize(
  ("x", "y"), [((-8, 0), (0, 8)), ((0, 8), (4, 12)), ((4, 12), (12, 20)), ((8, 0), (0, 8))]
)
def test_tensors_that_overlap_or_lie_outside(tmp_path, x, y):
  """Negative and overlapping offsets were loaded: two tensors shared their bytes."""
  entries = {
    name: {"dtype": "F32", "shape": [2], "data_offsets": list(place)}
    for name, place in (("x", x), ("y", y))
  }
  header = json.dumps(entries).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(max(x[1], y[1])))
  with pytest.raises(ValueError, match=r"model.safetensors: truncated or no safetensors file"):
    tensorfile.TensorFile(path)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (
      {"model_type": "gemma2"},
      "model_type: 'gemma2' is not supported; known: llama, qwen2, qwen3,",
    ),
    ({"hidden_size": None}, "hidden_size: expected an integer, got None"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: 'yarn' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: must be a num"),
    ({"use_sliding_window": True}, "use_sliding_window: True is not implemented"),
    ({"layer_types": ["sliding_attention"]}, "layer_types: only 'full_attention'"),
    ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not implemented"),
    ({"mlp_bias": True}, "mlp_bias: True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_key_value_heads": 3}, "num_kv_heads: 3 does not divide"),
    # Each of these was a traceback, a hang, or was taken as it is.
    ({"model_type": []}, r"model_type: \[\] is not supported"),
    ({"num_hidden_layers": 10**9}, "num_layers: must be an integer of 1 to 2048"),
    ({"num_attention_heads": 0}, "num_attention_heads: must be of 1 to hidden_size = 32"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads: expected an integer, got '2'"),
    ({"max_position_embeddings": True}, "max_position_embeddings: expected an integer"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: must be a number above 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: must be a number"),
    ({"rms_norm_eps": float("nan")}, "NaN is no JSON number"),
    ({"rope_theta": -1.0}, "rope_theta: must be a number above 0"),
    ({"rope_parameters": [1]}, r"rope_parameters: expected an object, got \[1\]"),
    (
      {
        "rope_parameters": {"rope_type": "default"},
        "rope_scaling": {"type": "linear", "factor": 4},
      },
      "rope_scaling: .* stands beside rope_parameters .*; put what it says",
    ),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor: must be a number above 0"),
    (
      {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
      "high_freq_factor: must be a number above",
    ),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false"),
    ({"layer_types": 5}, "layer_types: only 'full_attention'"),
  ],
)
def test_configs_that_are_refused(tmp_path, change, words):
  raw = {"model_type": "llama", **SIZES} | change
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=rf"config.json: .*{words}"):
    hfconfig.load_config(tmp_path)


def test_both_rope_layouts(tmp_path):
  def load(**fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}))
    return hfconfig.load_config(tmp_path, dtype="bfloat16")[0]

  old = load(rope_theta=1000.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
  new = load(rope_parameters=LLAMA3)
  assert old == new
  assert new.rope_theta == 1000.0
  assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
  assert (new.head_dim, new.dtype) == (8, "bfloat16")
  assert load().rope_theta == 10000.0
  assert load(rope_theta=77.0, rope_scaling=None).rope_theta == 77.0


def test_an_export_names_what_ends_its_turns(tmp_path):
  """A base model's folder names the end of texts alone, and servers ran past the end of turns."""
  config = tiny_config()
  params = model.init_params(config, jax.random.key(0))
  for name, ends in (("weights", 5), ("tokenizer", 9)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.json").write_text("{}")
    text = json.dumps({"eos_token_id": ends, "top_p": 0.8})
    (tmp_path / name / "generation_config.json").write_text(text)
  raw = hfconfig.raw_config_of(config, eos_token_id=5)
  fields = {"source": tmp_path / "tokenizer", "model": tmp_path / "weights"}
  for n, (stop, ends) in enumerate(((7, [5, 7]), (5, 5), (None, 5))):
    hub.save_params(tmp_path / str(n), config, params, raw, stop_id=stop, **fields)
    found = json.loads((tmp_path / str(n) / "generation_config.json").read_text())
    assert found == {"eos_token_id": ends, "top_p": 0.8}
    assert json.loads((tmp_path / str(n) / "config.json").read_text())["eos_token_id"] == ends


def test_templates_for_tools_are_carried(tmp_path):
  source = tmp_path / "source"
  (source / "additional_chat_templates").mkdir(parents=True)
  (source / "additional_chat_templates" / "tool_use.jinja").write_text("{}")
  (tmp_path / "out").mkdir()
  hub.carry_files(source, tmp_path / "out")
  assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text() == "{}"
