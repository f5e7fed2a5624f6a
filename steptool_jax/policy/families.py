"""Families of published decoders that model.py computes, each a row: how one differs from Llama."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
  """What config.json leaves unsaid about the models of one `model_type`.

  architecture: the class that transformers opens them with.
  qkv_bias: q, k and v always have a bias and o never; else `attention_bias` says it for all four.
  qk_norm: queries and keys are normalised head by head.
  head_dim: where config.json names none; None = hidden size / heads.
  gguf: `general.architecture` of the GGUF files that gguf.py reads; empty = none.
  """

  architecture: str
  qkv_bias: bool = False
  qk_norm: bool = False
  head_dim: int | None = None
  gguf: str = ""


FAMILIES = {
  "llama": Family("LlamaForCausalLM", gguf="llama"),
  "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
