"""Small real things for tests: a tiny model, random trajectories."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.learning import batching, steptable
from steptool_jax.policy import kv_slots, model
from steptool_jax.types import TRUNCATED, Finish, Malformed, Status, Step, TokenBatch, Trajectory

VOCAB = 61
ROOT = pathlib.Path(__file__).parents[1]


def echo_format(folder: pathlib.Path) -> ChatFormat:
  """The compact format over a tokenizer of a few words, written into `folder`."""
  compact.build_tokenizer(["echo {} answer 7 give_up"] * 50, 300, folder)
  return get_format("compact", Codec.load(folder))


def several_devices(count: int) -> dict[str, str]:
  """Environment variables of a process with fake devices.

  A collective may wait for the other devices on a thread of XLA's inner pool, which has one a core:
  on 2 cores it ran out once, and the process ended. PJRT_NPROC makes it larger.
  """
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  return {"XLA_FLAGS": flags, "PJRT_NPROC": str(4 * count)}


def on_devices(count: int, *command: str) -> subprocess.CompletedProcess:
  """Python with `command`, a file and its arguments, on fake CPU devices; it has to succeed."""
  paths = [ROOT, ROOT / "tests", pathlib.Path(command[0]).parent, os.environ.get("PYTHONPATH", "")]
  env = os.environ | several_devices(count) | {"JAX_PLATFORMS": "cpu"}
  env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
  done = subprocess.run(
    [sys.executable, *command], env=env, capture_output=True, text=True, timeout=280, check=False
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done


def tiny_config(**changes) -> model.ModelConfig:
  fields = {
    "family": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "tie_embeddings": True,
    "max_position_embeddings": 128,
  }
  return model.ModelConfig(**(fields | changes))


def padded(packed: batching.Packed, multiple: int) -> TokenBatch:
  """The packed batch with empty rows up to a multiple: one shape, one compilation."""
  rows, row_tokens = packed.batch.tokens.shape
  segmented = packed.batch.part_ids is not None
  padding = batching.empty_batch(-rows % multiple, row_tokens, segmented)
  return TokenBatch(
    *(
      x if x is None else np.concatenate([x, y]) for x, y in zip(packed.batch, padding, strict=True)
    )
  )


def padded_table(packed: batching.Packed, multiple: int, width: int = 0) -> steptable.StepTable:
  """The step table of the packed batch, for `padded` of it."""
  table = steptable.build(packed, width)
  padding = steptable.empty(-len(table.position) % multiple, table.position.shape[1])
  return steptable.StepTable(*map(np.concatenate, zip(table, padding, strict=True)))


def random_trajectory(rng, max_steps=4, status=None, prompt=5) -> Trajectory:
  """Random ids, log-probs and fractional rewards; each step but a final one is observed."""
  if status is None:
    status = rng.choice([Status.ANSWERED, *sorted(TRUNCATED)])
  count = int(rng.integers(1, max_steps + 1))
  steps = []
  for k in range(count):
    last = k == count - 1 and status == Status.ANSWERED
    length = int(rng.integers(1, 6))
    steps.append(
      Step(
        tokens=rng.integers(0, VOCAB, length).astype(np.int32),
        logprobs=rng.normal(-1, 0.3, length).astype(np.float32),
        action=Finish("x"),
        observation_tokens=rng.integers(0, VOCAB, 0 if last else int(rng.integers(1, 5))).astype(
          np.int32
        ),
        reward=float(rng.uniform(0, 1)),
      )
    )
  prompt_tokens = rng.integers(0, VOCAB, prompt + int(rng.integers(0, 4))).astype(np.int32)
  return Trajectory(f"t{rng.integers(1 << 30)}", 0, prompt_tokens, tuple(steps), Status(status))


class ScriptedEngine:
  """What a real engine's slots would hold; a turn is what `policy(text of the slot)` says."""

  def __init__(self, chat_format, policy, slots=2, size=4000, chunk=7):
    self.format, self.policy = chat_format, policy
    self.slots, self.size, self.chunk = slots, size, chunk
    self.classes = ((slots, size),)
    self.seen = {n: [] for n in range(slots)}
    self.todo = {n: [] for n in range(slots)}
    self.turns = []  # (context, ids) of every turn
    self.forced = 0

  def init(self):
    return None

  def lay_out(self, variables):
    return variables

  def rewind(self, state, lengths):
    for slot, length in lengths.items():
      assert length <= len(self.seen[slot])
      self.seen[slot] = self.seen[slot][:length]
      self.todo[slot] = []

  def fork(self, state, sources):
    for slot, source in sources.items():
      self.seen[slot] = list(self.seen[source])

  def append(self, variables, state, pieces):
    for slot, ids in pieces.items():
      self.seen[slot].extend(ids.tolist())
      self.forced += len(ids)
      assert len(self.seen[slot]) <= self.size

  def decode(self, variables, state, limits, seeds, stop_ids, temperature):
    out = kv_slots.Decoded(
      np.zeros((self.slots, self.chunk), np.int32),
      np.full((self.slots, self.chunk), -0.5, np.float32),
      np.zeros(self.slots, np.int32),
      np.zeros(self.slots, bool),
    )
    for slot, limit in limits.items():
      if not self.todo[slot]:
        action = self.policy(self.format.codec.decode(self.seen[slot]))
        if isinstance(action, Malformed):
          ids = [*self.format.codec.encode("what"), self.format.stop_ids[0]]
        else:
          ids = self.format.render_action(action).tolist()
        self.turns.append((list(self.seen[slot]), ids))
        self.todo[slot] = list(ids)
      take = self.todo[slot][: min(limit, self.chunk)]
      self.todo[slot] = self.todo[slot][len(take) :]
      out.tokens[slot, : len(take)] = take
      out.count[slot] = len(take)
      out.stopped[slot] = take[-1] in stop_ids
      self.seen[slot].extend(take)
    return None, out
