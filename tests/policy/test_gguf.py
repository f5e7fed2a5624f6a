"""GGUF import: a tiny file written here in llama.cpp's layout, and the real SmolLM2 when given."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config

from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.policy import families, model
from steptool_jax.policy.families import RopeScaling
from steptool_jax.policy.formats import hfconfig, hub
from steptool_jax.policy.formats.gguf import gguf_to_hub, gguf_tokenizer
from steptool_jax.types import ToolCall

gguf = pytest.importorskip("gguf", reason="the test writes its file with the gguf package")

CHARS = [chr(c) for c in range(33, 127)]
TOKENS = ["<|im_start|>", "<|im_end|>", *CHARS, "Ġ", "Ċ", "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CONFIG = tiny_config(
  vocab_size=len(TOKENS), hidden_size=32, rope_theta=1e5, rms_norm_eps=1e-5, tie_embeddings=False
)


def permute(tensor, heads):
  """llama.cpp's converter, as convert_hf_to_gguf.py writes it."""
  shape = (heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
  return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)


def write(path, params, config=CONFIG, kind=None, **changes):
  """`changes`: architecture, pre, model (tokenizer), rope_freqs, drop (a tensor), blocks, eos."""
  kind = kind or gguf.GGMLQuantizationType.F32
  writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  blocks = changes.get("blocks", config.num_layers)
  add = writer.add_string if isinstance(blocks, str) else writer.add_uint32
  add(f"{changes.get('architecture', 'llama')}.block_count", blocks)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_tokenizer_model(changes.get("model", "gpt2"))
  writer.add_tokenizer_pre(changes.get("pre", "smollm"))
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(changes.get("eos", 1))
  writer.add_chat_template(TEMPLATE)
  layers = params["layers"]
  tensors = {
    "token_embd.weight": params["embed"]["embedding"],
    "output_norm.weight": params["final_norm"]["scale"],
    "output.weight": params["lm_head"]["kernel"].T,
  }
  for i in range(config.num_layers):
    for ours, theirs in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
      tensors[f"blk.{i}.{theirs}.weight"] = layers[ours]["scale"][i]
    for ours, theirs in (
      ("v", "attn_v"),
      ("o", "attn_output"),
      ("gate", "ffn_gate"),
      ("up", "ffn_up"),
      ("down", "ffn_down"),
    ):
      tensors[f"blk.{i}.{theirs}.weight"] = layers[ours]["kernel"][i].T
    q, k = np.asarray(layers["q"]["kernel"][i].T), np.asarray(layers["k"]["kernel"][i].T)
    tensors[f"blk.{i}.attn_q.weight"] = permute(q, config.num_heads)
    tensors[f"blk.{i}.attn_k.weight"] = permute(k, config.num_kv_heads)
  if "rope_freqs" in changes:
    tensors["rope_freqs.weight"] = changes["rope_freqs"]
  tensors.pop(changes.get("drop"), None)
  for name, tensor in tensors.items():
    tensor = np.asarray(tensor, np.float32)
    if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
      data = gguf.quants.quantize(tensor, kind)
      writer.add_tensor(name, data, raw_dtype=kind)
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def params():
  tree = model.init_params(CONFIG, jax.random.key(0))
  tree["layers"]["attn_norm"]["scale"] += 0.1 * jnp.arange(32)
  return tree


def test_weights_come_back_exactly(params, tmp_path):
  config = gguf_to_hub(write(tmp_path / "m.gguf", params), tmp_path / "out")
  assert config == CONFIG
  assert hfconfig.load_config(tmp_path / "out")[0] == CONFIG
  loaded = hub.load_params(tmp_path / "out", config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_new_family_is_one_row(params, tmp_path, monkeypatch):
  """GGUF reader, config.json's writer and reader all take it from the table."""
  row = families.Family("ToyForCausalLM", head_dim=8, gguf="toy", gguf_pairs=True)
  monkeypatch.setitem(families.FAMILIES, "toy", row)
  path = write(tmp_path / "m.gguf", params, architecture="toy")
  config = gguf_to_hub(path, tmp_path / "out")
  assert config == dataclasses.replace(CONFIG, family="toy")
  assert hfconfig.load_config(tmp_path / "out")[0] == config
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (raw["architectures"], raw["model_type"]) == (["ToyForCausalLM"], "toy")
  loaded = hub.load_params(tmp_path / "out", config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantized_weights_are_near(params, tmp_path, kind):
  kind = gguf.GGMLQuantizationType[kind]
  gguf_to_hub(write(tmp_path / "m.gguf", params, kind=kind), tmp_path / "out", "bfloat16")
  loaded = hub.load_params(tmp_path / "out", CONFIG)
  for name in ("q", "up"):
    ours, theirs = loaded["layers"][name]["kernel"], params["layers"][name]["kernel"]
    assert np.abs(ours - theirs).max() < (0.08 if kind.name == "Q4_1" else 0.01)
    assert np.any(ours != theirs)


def test_tokenizer_opens_in_transformers(params, tmp_path):
  transformers = pytest.importorskip("transformers")
  gguf_to_hub(write(tmp_path / "m.gguf", params), tmp_path / "out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  ids = tokenizer.encode("hello hell2<|im_end|>")
  names = ["hello", "Ġ", "hell", "2", "<|im_end|>"]
  assert ids == [TOKENS.index(name) for name in names]
  assert tokenizer.decode(ids) == "hello hell2<|im_end|>"
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
  text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
  assert text == "<|im_start|>hi<|im_end|>"


def test_the_tokenizer_alone_is_that_of_the_whole_import(params, tmp_path):
  path = write(tmp_path / "m.gguf", params)
  gguf_to_hub(path, tmp_path / "out")
  gguf_tokenizer(path, tmp_path / "alone")
  names = ["tokenizer.json", "tokenizer_config.json"]
  assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == names
  for name in names:
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_llama3_scaling_is_recognised(params, tmp_path):
  scaling = RopeScaling("llama3", 32.0)
  scaled = tiny_config(rope_theta=1e5, rope_scaling=scaling)
  divisors = model.inverse_frequencies(CONFIG) / model.inverse_frequencies(scaled)
  path = write(tmp_path / "m.gguf", params, rope_freqs=divisors)
  assert gguf_to_hub(path, tmp_path / "out").rope_scaling == scaling
  path = write(tmp_path / "n.gguf", params, rope_freqs=divisors * 1.1)
  with pytest.raises(ValueError, match=r"rope_freqs.weight is not the scaling of a known"):
    gguf_to_hub(path, tmp_path / "other")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"architecture": "falcon"}, "architecture 'falcon' is not supported; known: llama"),
    ({"model": "rwkv"}, "tokenizer.ggml.model: 'rwkv' is not supported"),
    ({"model": "llama"}, "has no field tokenizer.ggml.scores"),
    ({"pre": "viking"}, "tokenizer.ggml.pre: 'viking' is not known; known: default"),
    ({"drop": "blk.1.ffn_up.weight"}, r"missing tensor blk\.1\.ffn_up\.weight"),
    ({"blocks": 2**31}, "num_layers: must be an integer of 1 to 2048"),  # it hung
    ({"blocks": "two"}, "field llama.block_count must be a int, found 'two'"),
    ({"eos": 10**6}, r"tokenizer\.ggml\.eos_token_id: 1000000 is no token"),
  ],
)
def test_files_that_are_refused(params, tmp_path, changes, words):
  with pytest.raises(ValueError, match=rf"m\.gguf: {words}"):
    gguf_to_hub(write(tmp_path / "m.gguf", params, **changes), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_broken_files(params, tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    gguf_to_hub(tmp_path / "none.gguf", tmp_path / "out")
  data = write(tmp_path / "m.gguf", params).read_bytes()
  for name, content in (("cut", data[: len(data) // 2]), ("text", b"<html></html>" * 9)):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\.gguf: not a complete GGUF file"):
      gguf_to_hub(path, tmp_path / "out")
  # A list that says it has 2^60 entries: the reader went on for ever behind the file's end.
  place = data.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 8
  path.write_bytes(data[:place] + (2**60).to_bytes(8, "little") + data[place + 8 :])
  with pytest.raises(ValueError, match=rf"{name}\.gguf: not a complete GGUF file \(it ends early"):
    gguf_to_hub(path, tmp_path / "out")
  with pytest.raises(ValueError, match="dtype: 'int8' is not one of"):
    gguf_to_hub(tmp_path / "m.gguf", tmp_path / "out", "int8")


GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
GEMMA_TYPES = [3, 3, 3, 2, 3, 3, 4] + [6] * 256
GEMMA_TOKENS += [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\n\n", "ab", "▁ab", "▁a", "bc", "abc", "▁", *'abcdefghijklmnopqrstuvwxyz{}:"<>_']
GEMMA_TYPES += [4] + [1] * (len(PIECES) - 1)
GEMMA_TOKENS += PIECES
GEMMA = tiny_config(
  family="gemma3_text",
  vocab_size=len(GEMMA_TOKENS),
  qk_norm=True,
  num_layers=6,
  sliding_window=3,
  sliding_layers=(True,) * 5 + (False,),
  rope_theta=1e6,
  rope_local_theta=1e4,
  query_scalar=8,
)


def write_gemma(path, params):
  """As llama.cpp's converter writes Gemma 3: norms with 1 added, q and k as they are."""
  writer = gguf.GGUFWriter(path, "gemma3")
  writer.add_context_length(GEMMA.max_position_embeddings)
  writer.add_embedding_length(GEMMA.hidden_size)
  writer.add_block_count(GEMMA.num_layers)
  writer.add_feed_forward_length(GEMMA.intermediate_size)
  writer.add_head_count(GEMMA.num_heads)
  writer.add_head_count_kv(GEMMA.num_kv_heads)
  writer.add_key_length(GEMMA.head_dim)
  writer.add_sliding_window(GEMMA.sliding_window)
  writer.add_rope_freq_base(GEMMA.rope_theta)
  writer.add_layer_norm_rms_eps(GEMMA.rms_norm_eps)
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(GEMMA_TOKENS)
  writer.add_token_types(GEMMA_TYPES)
  writer.add_token_scores([-float(n) for n in range(len(GEMMA_TOKENS))])
  for role, token in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
    getattr(writer, f"add_{role}_token_id")(token)
  writer.add_add_space_prefix(False)
  layers = params["layers"]
  tensors = {
    "token_embd.weight": params["embed"]["embedding"],
    "output_norm.weight": 1.0 + params["final_norm"]["scale"],
  }
  names = {"attn_norm": "attn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
  names |= {"post_attn_norm": "post_attention_norm", "mlp_norm": "ffn_norm"}
  names |= {"post_mlp_norm": "post_ffw_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v"}
  names |= {"o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
  for i in range(GEMMA.num_layers):
    for ours, theirs in names.items():
      leaf = layers[ours]
      tensor = 1.0 + leaf["scale"][i] if "scale" in leaf else leaf["kernel"][i].T
      tensors[f"blk.{i}.{theirs}.weight"] = tensor
  for name, tensor in tensors.items():
    writer.add_tensor(name, np.asarray(tensor, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_gemma_comes_back_with_its_tokenizer(tmp_path):
  """Norms were one too large, or q and k in llama.cpp's order for Llama; a text's line break is a
  token of its own in Gemma, and was taken for a control token and left out."""
  params = model.init_params(GEMMA, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
  params["value_head"] = jax.tree.map(jnp.zeros_like, params["value_head"])
  config = gguf_to_hub(write_gemma(tmp_path / "m.gguf", params), tmp_path / "out")
  assert config == GEMMA
  assert hfconfig.load_config(tmp_path / "out")[0] == GEMMA
  loaded = hub.load_params(tmp_path / "out", config)
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)  # 1 was added and taken away
  jax.tree.map(close, loaded, params)

  codec = Codec.load(tmp_path / "out")

  def pieces(text):
    return [GEMMA_TOKENS[i] for i in codec.encode(text)]

  # By score: "ab" before "▁ab" before "bc": what is merged first decides.
  assert pieces("abc ab") == ["abc", "▁ab"]
  assert pieces("a\n\n\nb") == ["a", "\n\n", "\n", "b"]
  assert pieces("é") == ["<0xC3>", "<0xA9>"]
  for text in ('a: {"b"}\n\n\n  c é 漢', " ab", "<bos><end_of_turn>"):
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    assert not {0, 1, 2, 3, 4, 5} & set(ids)
  chat = get_format("auto" if codec.chat_template else "gemma_react", codec, "signature")
  turn = chat.render_action(ToolCall("f", {"a": "b\nc"}, "d\n\ne"))
  assert chat.parse(turn) == ToolCall("f", {"a": "b\nc"}, "d\n\ne")
  shown = codec.decode(chat.observation("seen"))
  assert shown == "\n<start_of_turn>user\nseen<end_of_turn>\n<start_of_turn>model\n"
  assert chat.stop_ids == (5, 1)
  assert codec.decode(chat.prompt("s", (), "q")).startswith("<bos><start_of_turn>user\ns\n\nTools")


def test_real_gemma(tmp_path):
  """Q4_K, Q6_K, Q5_0 and Q8_0 blocks, 262,144 pieces: it says what Gemma says."""
  path = os.environ.get("STEPTOOL_GEMMA3_GGUF")
  if not path:
    pytest.skip("STEPTOOL_GEMMA3_GGUF does not point to gemma-3-270m-q4_k_m.gguf")
  config = gguf_to_hub(path, tmp_path / "out")
  codec = Codec.load(tmp_path / "out")
  assert codec.encode("Hello world") == [9259, 1902]  # as Google's tokenizer has them
  ids = [codec.bos_id, *codec.encode("The quick brown fox jumps over the lazy dog.")]
  variables = {"params": hub.load_params(tmp_path / "out", config)}
  tokens = jnp.asarray([ids], jnp.int32)
  positions = jnp.arange(len(ids))[None]
  hidden = model.forward(config, variables, tokens, positions, jnp.ones_like(tokens))
  logprobs = jax.nn.log_softmax(model.project_logits(config, variables, hidden))[0, :-1]
  said = jnp.take_along_axis(logprobs, tokens[0, 1:, None], axis=1)
  assert float(said.mean()) > -3.0  # at random it is -12.5
  assert codec.decode([int(logprobs[-2].argmax())]) == " dog"


def test_real_smollm2(tmp_path):
  path = os.environ.get("STEPTOOL_SMOLLM2_GGUF")
  if not path:
    pytest.skip("STEPTOOL_SMOLLM2_GGUF does not point to SmolLM2-135M-Instruct.Q4_1.gguf")
  torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
  import transformers

  config = gguf_to_hub(path, tmp_path / "out")
  params = hub.load_params(tmp_path / "out", config)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
  messages = [{"role": "user", "content": "What is the capital of France?"}]
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  ids = tokenizer(text, return_tensors="pt").input_ids
  with torch.no_grad():
    answer = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    expected = theirs(ids).logits.numpy()
  assert "Paris" in tokenizer.decode(answer[0])
  tokens = jnp.asarray(ids.numpy(), jnp.int32)
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = model.forward(config, {"params": params}, tokens, positions, jnp.ones_like(tokens))
  logits = model.project_logits(config, {"params": params}, hidden)
  # 30 layers, logits up to 30: float32 rounding alone is about 1e-4.
  np.testing.assert_allclose(logits, expected, atol=5e-4)
