"""Families of published decoders that model.py computes, each a row: how one differs from Llama."""

import dataclasses


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
