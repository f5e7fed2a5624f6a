"""What model.py computes: families of published decoders, each a row, and one model's numbers."""

import dataclasses
import math
from typing import Any

import numpy as np

ROPE_TYPES = ("llama3", "linear")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "dots", "attention")  # model.py has their policies


@dataclasses.dataclass(frozen=True)
class Family:
  """What config.json leaves unsaid about the models of one `model_type`.

  architecture: the class that transformers opens them with.
  qkv_bias: q, k and v always have a bias and o never; else `attention_bias` says it for all four.
  qk_norm: queries and keys are normalised head by head.
  head_dim: where config.json names none; None = hidden size / heads.
  tied: whether the output projection is the embedding, where config.json does not say it.
  activation: of the gated MLP, by transformers' name.
  norm_offset: RMS norms multiply by 1 + weight.
  post_norms: attention and MLP have a norm behind them, too.
  scaled_embeddings: embeddings are multiplied by the square root of their width.
  full_every: each so many-th layer sees everything and the others a window; 0 = all see everything.
  local_theta: rotary base of the layers with a window.
  experts: each layer's MLP is a mixture of experts.
  gguf: `general.architecture` of the GGUF files that gguf.py reads; empty = none.
  gguf_pairs: such a file has the rows of q and k with rotary pairs side by side.
  """

  architecture: str
  qkv_bias: bool = False
  qk_norm: bool = False
  head_dim: int | None = None
  tied: bool = False
  activation: str = "silu"
  norm_offset: bool = False
  post_norms: bool = False
  scaled_embeddings: bool = False
  full_every: int = 0
  local_theta: float | None = None
  experts: bool = False
  gguf: str = ""
  gguf_pairs: bool = False

  def sliding_layers(self, num_layers: int, full_every: int | None = None) -> tuple[bool, ...]:
    """Which layers see a window only; empty where the family has none."""
    every = full_every or self.full_every
    return tuple((n + 1) % every > 0 for n in range(num_layers)) if self.full_every else ()


FAMILIES = {
  "llama": Family("LlamaForCausalLM", gguf="llama", gguf_pairs=True),
  "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
  "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, head_dim=128, experts=True),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    qk_norm=True,
    head_dim=256,
    tied=True,
    activation="gelu_pytorch_tanh",
    norm_offset=True,
    post_norms=True,
    scaled_embeddings=True,
    full_every=6,
    local_theta=10000.0,
    gguf="gemma3",
  ),
}


# Bounds of the sizes: some times those of the largest published models. What lies beyond is a
# broken file, whose tensors would take hours to list.
BOUNDS = {
  "vocab_size": (1, 2**24),
  "hidden_size": (1, 2**18),
  "intermediate_size": (1, 2**20),
  "num_layers": (1, 2048),
  "num_heads": (1, 4096),
  "num_kv_heads": (1, 4096),
  "head_dim": (2, 4096),
  "max_position_embeddings": (1, 2**30),
}


def check_number(name: str, value: Any, above: float, most: float) -> None:
  """ValueError unless `value` is a number (no bool, no NaN) in (above, most]."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (number and above < value <= most):
    raise ValueError(f"{name}: must be a number above {above:g}, at most {most:g}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched; the last three fields belong to `llama3` only."""

  type: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    if self.type not in ROPE_TYPES:
      raise ValueError(f"rope_scaling.type: {self.type!r} is not one of {', '.join(ROPE_TYPES)}")
    check_number("rope_scaling.factor", self.factor, 0, 1e6)
    check_number("rope_scaling.low_freq_factor", self.low_freq_factor, 0, 1e6)
    # Between the two the scalings are blended: they must differ.
    low = self.low_freq_factor
    check_number("rope_scaling.high_freq_factor", self.high_freq_factor, low, 1e6)
    places = self.original_max_position_embeddings
    check_number("rope_scaling.original_max_position_embeddings", places, 0, 2**30)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Hashable, so that it can be a static argument of jit."""

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  qkv_bias: bool = False
  output_bias: bool = False  # Llama's attention_bias puts one on o_proj too
  qk_norm: bool = False
  tie_embeddings: bool = False
  max_position_embeddings: int = 4096
  sliding_window: int | None = None  # tokens that the layers of sliding_layers see
  sliding_layers: tuple[bool, ...] = ()  # by layer; empty: all see everything
  rope_local_theta: float | None = None  # rotary base of these layers, which are never stretched
  query_scalar: float | None = None  # queries are divided by its root; None = head_dim
  final_logit_cap: float | None = None  # c tanh(logit / c)
  num_experts: int = 0  # intermediate_size wide each
  experts_per_token: int = 0
  norm_topk: bool = True  # a token's expert weights sum to 1
  dtype: str = "float32"  # compute
  param_dtype: str = "float32"  # storage; the value head is always float32
  remat: str = "none"
  lora_scale: float | None = None  # alpha / rank; set by lora.with_lora

  def __post_init__(self):
    for field, valid in (
      ("family", tuple(FAMILIES)),
      ("dtype", DTYPES),
      ("param_dtype", DTYPES),
      ("remat", REMATS),
    ):
      if getattr(self, field) not in valid:
        raise ValueError(f"{field}: {getattr(self, field)!r} is not one of {', '.join(valid)}")
    for field, (least, most) in BOUNDS.items():
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{field}: must be an integer of {least} to {most}, found {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads: {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim: {self.head_dim} must be even (rotary pairs)")
    check_number("rope_theta", self.rope_theta, 0, 1e12)
    check_number("rms_norm_eps", self.rms_norm_eps, 0, 0.1)
    for field in ("sliding_window", "rope_local_theta", "query_scalar", "final_logit_cap"):
      if getattr(self, field) is not None:
        check_number(field, getattr(self, field), 0, 1e12)
    self._check_layers()

  def _check_layers(self):
    kind = self.kind
    if self.sliding_layers and not (
      kind.full_every and self.sliding_window and self.rope_local_theta
    ):
      raise ValueError(
        f"sliding_layers: {self.family} has none, or sliding_window or rope_local_theta is missing"
      )
    if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
      raise ValueError(
        f"sliding_layers: {len(self.sliding_layers)} of num_layers = {self.num_layers}"
      )
    if bool(self.num_experts) != kind.experts:
      raise ValueError(
        f"num_experts: {self.num_experts}, but {self.family} "
        f"{'is a mixture of experts' if kind.experts else 'has none'}"
      )
    if kind.experts and not 0 < self.experts_per_token <= self.num_experts:
      raise ValueError(
        f"experts_per_token: {self.experts_per_token} must be of 1 to num_experts = "
        f"{self.num_experts}"
      )

  @property
  def kind(self) -> Family:
    """What the family says of all its models."""
    return FAMILIES[self.family]


def inverse_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
  """float32[h / 2], radians a position; as transformers computes them, scaling included.

  local: of the layers with a sliding window, which have a base of their own and no scaling.
  """
  half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
  theta = config.rope_local_theta if local else config.rope_theta
  freq = (1.0 / np.float32(theta) ** half).astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None or local:
    return freq
  if scaling.type == "linear":
    return freq / np.float32(scaling.factor)
  wavelen = 2 * math.pi / freq
  low = scaling.original_max_position_embeddings / scaling.low_freq_factor
  high = scaling.original_max_position_embeddings / scaling.high_freq_factor
  smooth = (scaling.original_max_position_embeddings / wavelen - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  blended = (1 - smooth) * freq / scaling.factor + smooth * freq
  out = np.where(wavelen > low, freq / scaling.factor, np.where(wavelen < high, freq, blended))
  return out.astype(np.float32)


def useful_flops(config: ModelConfig, context: float = 0.0) -> float:
  """Matmul FLOPs of a forward pass for one token, LM head included; backward costs twice as much.

  `context`: mean number of tokens a token sees (T / 2 in an unpacked causal row); 0 leaves the
  attention products out.
  """
  q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  mlp = 3 * config.intermediate_size * (config.experts_per_token or 1) + config.num_experts
  layer = config.hidden_size * (2 * q_size + 2 * kv_size + mlp)
  weights = config.num_layers * layer + config.hidden_size * config.vocab_size
  near = sum(config.sliding_layers)
  seen = (config.num_layers - near) * context
  if near:
    seen += near * min(context, config.sliding_window)
  return 2.0 * weights + 4.0 * q_size * seen
