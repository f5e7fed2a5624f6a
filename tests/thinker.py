"""A scripted model that thinks, over a tokenizer like Qwen3's, rolled out through chain.rollout."""

import json
import pathlib

import fakes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from steptool_jax.config import Limits
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.rollout import chain
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Finish, Observation, Task, ToolCall, ToolSpec, Trajectory

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LOOK = ToolSpec("look", "", {"type": "object", "properties": {}})
LIMITS = Limits(max_steps=6, max_step_tokens=70, max_tokens=700)


def tokenizer(out: pathlib.Path, tags: tuple[str, ...] = TAGS) -> Codec:
  """Byte-level BPE whose line breaks are tokens of their own, as Qwen's are."""
  made = tokenizers.Tokenizer(models.BPE())
  split = tokenizers.Regex(r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(split, "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  folder = pathlib.Path(get_format.__code__.co_filename).parent
  source = "\n".join(
    (folder / f"{n}.py").read_text() for n in ("template", "chatformat", "listing")
  )
  trainer = trainers.BpeTrainer(
    vocab_size=700,
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator([source, "\n\n\n\n"] * 2, trainer)
  made.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in tags])
  out.mkdir(parents=True)
  made.save(str(out / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return Codec.load(out)


def hermes(codec: Codec, thinking: str = "kept") -> ChatFormat:
  return get_format("hermes", codec, "signature", thinking)


class _Environment:
  name = "looking"

  def open(self, task: Task, sample: int) -> "_Environment":
    return self

  def call(self, call: ToolCall) -> Observation:
    text = f"result number {call.arguments['n']} is a good deal longer than the line for it, is it?"
    return Observation(text, Code.OK, text)

  def grade(self, answer: str | None) -> float:
    return float(answer == "7")

  def close(self) -> None:
    pass


def rollouts(
  chat_format: ChatFormat, limits: Limits, calls: int, samples: int = 1
) -> tuple[list[Trajectory], fakes.ScriptedEngine]:
  """Conversations that call `calls` times, thinking, and then answer; and the engine, which knows
  what it has seen."""

  def policy(text: str):
    n = text.count("<|im_start|>assistant") - 1
    thought = f"thought {n}"
    return ToolCall("look", {"n": n}, thought) if n < calls else Finish("7", thought=thought)

  engine = fakes.ScriptedEngine(chat_format, policy, size=limits.max_tokens, chunk=16)
  task = Task("t", "looking", "look", (LOOK,), {})
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    setting = Setting(
      engine, None, _Environment(), chat_format, limits, runner, Sampling(0, 0, 1.0), "Look."
    )
    found, _ = chain.rollout(setting, [(task, sample) for sample in range(samples)])
  return found, engine


def contexts(trajectory: Trajectory) -> list[list[int]]:
  """What stands in front of each step, as the trajectory has it."""
  found, seen = [], trajectory.prompt_tokens
  for step in trajectory.steps:
    seen = seen if step.prompt_tokens is None else step.prompt_tokens
    found.append(seen.tolist())
    seen = np.concatenate([seen, step.tokens, step.observation_tokens])
  return found
