"""A GGUF file of a family that families.py names -> a Hugging Face directory for load_params.

llama.cpp stores Llama's rows of q and k in another order (rotary pairs side by side instead of in
two halves), Llama 3.1's frequency scaling as a tensor, and 1 + weight for Gemma's norms; all of it
is undone here.
"""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from steptool_jax.policy.families import (
  BOUNDS,
  DTYPES,
  FAMILIES,
  Family,
  ModelConfig,
  RopeScaling,
  inverse_frequencies,
)
from steptool_jax.policy.formats import hfconfig, hub
from steptool_jax.policy.formats.tensorfile import output_directory, write_json

BLOCK_NAMES = {
  "q": "attn_q",
  "k": "attn_k",
  "v": "attn_v",
  "o": "attn_output",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
  "attn_norm": "attn_norm",
  "mlp_norm": "ffn_norm",
  "q_norm": "attn_q_norm",
  "k_norm": "attn_k_norm",
  "post_attn_norm": "post_attention_norm",
  "post_mlp_norm": "post_ffw_norm",
}
TOP_NAMES = {
  "embed": "token_embd.weight",
  "final_norm": "output_norm.weight",
  "lm_head": "output.weight",
}
ROPE_DIVISORS = "rope_freqs.weight"
LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Splitting rules by tokenizer.ggml.pre, as llama.cpp names them; empty = the byte level's own.
SPLITS = {
  "default": "",
  "gpt-2": "",
  "smollm": "",
  "llama-bpe": LLAMA3_SPLIT,
  "qwen2": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
GEMMA3_27B_LAYERS = 62  # whose queries are not scaled by the width of a head; no field says it


def gguf_to_hub(
  path: str | pathlib.Path, directory: str | pathlib.Path, dtype: str = "float32"
) -> ModelConfig:
  """Writes weights (dequantized to `dtype`), config and tokenizer; returns the configuration.

  Needs the extra `gguf`. ValueError when the file is no GGUF, of another architecture, or uses a
  tokenizer or quantization that is not known; the directory appears only when all went well.
  """
  file = _Gguf(pathlib.Path(path))
  config = _read_config(file)
  file.check(config)
  names = {name.hub: name for name in hfconfig.tensor_names(config)}
  if dtype not in DTYPES:
    raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
  kind = jnp.dtype(dtype)
  entries = {name: (file.shape(_source(spot)), kind) for name, spot in names.items()}

  def fetch(name):
    spot = names[name]
    tensor = file.tensor(_source(spot))
    if config.kind.gguf_pairs and spot.path[1:2] in (("q",), ("k",)):
      return _unpermute(tensor, config.num_heads if spot.path[1] == "q" else config.num_kv_heads)
    return tensor - 1.0 if config.kind.norm_offset and spot.path[-1] == "scale" else tensor

  ids = {
    f"{ours}_token_id": file.get(f"tokenizer.ggml.{key}_token_id", int)
    for ours, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
  }
  raw = hfconfig.raw_config_of(config, **ids)
  raw["dtype"] = dtype
  tokenizer, tokenizer_config = _read_tokenizer(file, config)
  with output_directory(directory) as out:
    hub.write_shards(out, entries, fetch)
    write_json(out / "config.json", raw)
    ids = {key: value for key, value in ids.items() if value is not None}
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config)
  return config


def gguf_tokenizer(path: str | pathlib.Path, directory: str | pathlib.Path) -> None:
  """Writes the tokenizer alone, as `gguf_to_hub` does; no tensor is read. Errors as there."""
  file = _Gguf(pathlib.Path(path))
  tokenizer, tokenizer_config = _read_tokenizer(file, _read_config(file))
  with output_directory(directory) as out:
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config)


class _Gguf:
  """An open file, whose tensors lie within it, each in its own place."""

  def __init__(self, path: pathlib.Path):
    try:
      import gguf
    except ImportError:
      raise ImportError("reading GGUF needs a package: pip install 'steptool-jax[gguf]'") from None
    if not path.is_file():
      raise FileNotFoundError(f"{path}: no such file")

    class Reader(gguf.GGUFReader):
      """Its own slices end silently where the file ends, and a list of 2^60 entries never does."""

      def _get(self, offset, dtype, count=1, override_order=None):
        part = super()._get(offset, dtype, count, override_order)
        if len(part) != int(count):
          raise ValueError("it ends early")
        return part

    self.path, self._gguf = path, gguf
    try:
      with np.errstate(over="raise"):
        self._reader = Reader(path)
    except (
      *(ValueError, IndexError, KeyError, OverflowError, FloatingPointError),
      *(RecursionError, ZeroDivisionError, OSError),
    ) as error:
      raise ValueError(f"{path}: not a complete GGUF file ({error}); fetch it again") from None
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    end = 0
    for tensor in sorted(self._reader.tensors, key=lambda t: t.data_offset):
      if tensor.data_offset < end:
        raise ValueError(f"{path}: {tensor.name} overlaps another tensor; fetch the file again")
      end = tensor.data_offset + tensor.n_bytes

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    """The field, which must be of this kind (list: of texts or integers)."""
    field = self._reader.fields.get(key)
    if field is None:
      return default
    try:
      value = field.contents()
    except (ValueError, TypeError, IndexError) as error:
      raise ValueError(f"{self.path}: field {key} cannot be read ({error})") from None
    if type(value) is not kind:
      raise ValueError(f"{self.path}: field {key} must be a {kind.__name__}, found {value!r:.60}")
    return value

  def need(self, key: str, kind: type) -> Any:
    value = self.get(key, kind)
    if value is None:
      raise ValueError(f"{self.path}: has no field {key}; convert the model again")
    return value

  def has(self, name: str) -> bool:
    return name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self._tensors:
      raise ValueError(f"{self.path}: missing tensor {name}")
    return tuple(int(n) for n in reversed(self._tensors[name].shape))

  def check(self, config: ModelConfig) -> None:
    """hub.check_tensors of this file; what it has besides is refused, too."""
    names = {_source(spot): spot.hub for spot in hfconfig.tensor_names(config)}
    used = [*names, *(name for name in self._tensors if name != ROPE_DIVISORS)]
    shapes = {names.get(name, name): self.shape(name) for name in used}
    hub.check_tensors(self.path, shapes, config)

  def tensor(self, name: str) -> np.ndarray:
    """float32, dequantized."""
    tensor = self._tensors[name]
    try:
      out = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
      raise ValueError(
        f"{self.path}: {name} is quantized as {tensor.tensor_type.name}, which the gguf package"
        " cannot read; take another quantization"
      ) from None
    return np.asarray(out, np.float32).reshape(self.shape(name))


def _source(spot: hfconfig.Name) -> str:
  if spot.layer is None:
    return TOP_NAMES[spot.path[0]]
  return f"blk.{spot.layer}.{BLOCK_NAMES[spot.path[1]]}.weight"


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
  """[out, in] with rotary pairs side by side -> in two halves, as Hugging Face has them."""
  out, inputs = tensor.shape
  pairs = tensor.reshape(heads, out // heads // 2, 2, inputs)
  return pairs.swapaxes(1, 2).reshape(out, inputs)


def _read_config(file: _Gguf) -> ModelConfig:
  known = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
  kind = file.need("general.architecture", str)
  if kind not in known:
    raise ValueError(
      f"{file.path}: architecture {kind!r} is not supported; known: {', '.join(known)}"
    )
  if file.get(f"{kind}.expert_count", int):
    raise ValueError(f"{file.path}: {kind}.expert_count: mixtures of experts are not supported")
  hidden = file.need(f"{kind}.embedding_length", int)
  heads = file.need(f"{kind}.attention.head_count", int)
  if not 0 < heads <= hidden:
    raise ValueError(f"{file.path}: {kind}.attention.head_count: {heads} of {hidden} wide")
  head_dim = file.get(f"{kind}.attention.key_length", int, hidden // heads)
  if file.get(f"{kind}.rope.dimension_count", int, head_dim) != head_dim:
    raise ValueError(f"{file.path}: {kind}.rope.dimension_count: partial rotation is not supported")
  embedding = file.shape(TOP_NAMES["embed"])
  family, layers = FAMILIES[known[kind]], file.need(f"{kind}.block_count", int)
  try:
    windows = _read_windows(file, family, layers, hidden / heads, head_dim)
    config = ModelConfig(
      family=known[kind],
      vocab_size=embedding[0] if embedding else 0,
      hidden_size=hidden,
      intermediate_size=file.need(f"{kind}.feed_forward_length", int),
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=file.get(f"{kind}.attention.head_count_kv", int, heads),
      head_dim=head_dim,
      rope_theta=_short(file.get(f"{kind}.rope.freq_base", float, 10000.0)),
      qkv_bias=family.qkv_bias,
      qk_norm=family.qk_norm,
      rms_norm_eps=_short(file.need(f"{kind}.attention.layer_norm_rms_epsilon", float)),
      tie_embeddings=not file.has(TOP_NAMES["lm_head"]),
      max_position_embeddings=file.need(f"{kind}.context_length", int),
      **windows,
    )
    scaling = _read_rope(file, config, f"{kind}.rope.scaling")
  except ValueError as error:
    named = str(error).startswith(str(file.path))
    raise error if named else ValueError(f"{file.path}: {error}; convert the model again") from None
  return dataclasses.replace(config, rope_scaling=scaling)


def _read_windows(
  file: _Gguf, family: Family, layers: int, width: float, head_dim: int
) -> dict[str, Any]:
  """Fields of a model with sliding windows; what the file leaves unsaid is as llama.cpp has it."""
  if not family.full_every or layers > BOUNDS["num_layers"][1]:
    return {}
  cap = file.get(f"{family.gguf}.final_logit_softcapping", float)
  return {
    "sliding_window": file.need(f"{family.gguf}.attention.sliding_window", int),
    "sliding_layers": family.sliding_layers(layers),
    "rope_local_theta": family.local_theta,
    "query_scalar": width if layers == GEMMA3_27B_LAYERS else head_dim,
    "final_logit_cap": None if cap is None else _short(cap),
  }


def _short(value: float) -> float:
  """1e-05 again, where float32 storage made it 9.99999974e-06."""
  return float(str(np.float32(value)))


def _read_rope(file: _Gguf, config: ModelConfig, prefix: str) -> RopeScaling | None:
  kind = file.get(f"{prefix}.type", str, "none")
  if kind == "linear":
    return RopeScaling("linear", file.need(f"{prefix}.factor", float))
  if kind != "none":
    raise ValueError(f"{file.path}: {prefix}.type: {kind!r} is not supported")
  if not file.has(ROPE_DIVISORS):
    return None
  # The converter keeps only the resulting divisors: find the published scaling that gives them.
  divisors = file.tensor(ROPE_DIVISORS)
  plain = inverse_frequencies(config)
  for factor in (8.0, 32.0):  # Llama 3.1 and 3.3, Llama 3.2
    scaling = RopeScaling("llama3", factor)
    scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    if divisors.shape == plain.shape and np.allclose(plain / scaled, divisors, rtol=1e-4):
      return scaling
  raise ValueError(f"{file.path}: rope_freqs.weight is not the scaling of a known Llama 3 model")


def _read_tokenizer(file: _Gguf, config: ModelConfig) -> tuple[Any, dict[str, Any]]:
  """(tokenizers.Tokenizer, tokenizer_config.json)."""
  import tokenizers
  from tokenizers import processors

  kind = file.need("tokenizer.ggml.model", str)
  makers = {"gpt2": _byte_level, "llama": _sentencepiece}
  if kind not in makers:
    raise ValueError(
      f"{file.path}: tokenizer.ggml.model: {kind!r} is not supported (only byte-level BPE, 'gpt2', "
      "and SentencePiece BPE, 'llama'); take the model's Hugging Face directory instead"
    )
  pre = file.get("tokenizer.ggml.pre", str, "default")
  tokens = file.need("tokenizer.ggml.tokens", list)
  types = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
  if not len(tokens) == len(types) == config.vocab_size:
    raise ValueError(
      f"{file.path}: {len(tokens)} tokens with {len(types)} types, but token_embd.weight has "
      f"{config.vocab_size} rows"
    )
  vocabulary = {token: index for index, token in enumerate(tokens)}
  if len(vocabulary) < len(tokens):
    raise ValueError(f"{file.path}: tokenizer.ggml.tokens: two tokens have the same text")
  tokenizer = makers[kind](file, pre, vocabulary, types)
  for special in (True, False):
    wanted = CONTROL if special else USER_DEFINED
    added = [
      tokenizers.AddedToken(token, special=special, normalized=False)
      for token, type_ in zip(tokens, types, strict=True)
      if type_ == wanted
    ]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)

  settings: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": config.max_position_embeddings,
    "clean_up_tokenization_spaces": False,
  }
  for ours, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
    index = file.get(f"tokenizer.ggml.{key}_token_id", int)
    if index is not None:
      if index >= len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key}_token_id: {index} is no token")
      settings[f"{ours}_token"] = tokens[index]
  if template := file.get("tokenizer.chat_template", str):
    settings["chat_template"] = template
  adds_bos = pre == "llama-bpe" or kind == "llama"
  if file.get("tokenizer.ggml.add_bos_token", bool, adds_bos) and "bos_token" in settings:
    bos = settings["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
  return tokenizer, settings


def _byte_level(file: _Gguf, pre: str, vocabulary: dict[str, int], types: list[int]) -> Any:
  """GPT-2's kind: pieces of bytes, and merges that the file lists."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  del types
  if pre not in SPLITS:
    raise ValueError(
      f"{file.path}: tokenizer.ggml.pre: {pre!r} is not known; known: {', '.join(SPLITS)}"
    )
  try:
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges", list)]
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{file.path}: tokens and merges make no tokenizer ({error})") from None
  tokenizer = tokenizers.Tokenizer(bpe)
  steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
  if SPLITS[pre]:
    steps.append(pre_tokenizers.Split(tokenizers.Regex(SPLITS[pre]), "isolated"))
  prefix = file.get("tokenizer.ggml.add_space_prefix", bool, False)
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not SPLITS[pre]))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(file: _Gguf, pre: str, vocabulary: dict[str, int], types: list[int]) -> Any:
  """SentencePiece's BPE: two pieces merge where their text is one, the best score first."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  del pre
  scores = file.need("tokenizer.ggml.scores", list)
  if len(scores) != len(vocabulary):
    raise ValueError(f"{file.path}: {len(vocabulary)} tokens with {len(scores)} scores")
  normal = {token for token, type_ in zip(vocabulary, types, strict=True) if type_ == NORMAL}
  found = [
    (-scores[vocabulary[token]], vocabulary[token[:cut]], vocabulary[token[cut:]])
    for token in normal
    for cut in range(1, len(token))
    if token[:cut] in normal and token[cut:] in normal
  ]
  texts = list(vocabulary)
  merges = [(texts[left], texts[right]) for _, left, right in sorted(found)]
  unknown = file.get("tokenizer.ggml.unknown_token_id", int)
  try:
    bpe = models.BPE(
      vocab=vocabulary,
      merges=merges,
      unk_token=None if unknown is None else texts[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{file.path}: tokens and scores make no tokenizer ({error})") from None
  tokenizer = tokenizers.Tokenizer(bpe)
  prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
  steps = [normalizers.Prepend("▁")] if prefix else []
  tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
  strip = [decoders.Strip(" ", 1, 0)] if prefix else []
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return tokenizer
