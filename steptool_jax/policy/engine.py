"""The policy engine: KV slots with append, decode, rewind and fork.

A conversation keeps its slot until it ends, so a turn costs its own tokens and not its history. All
shapes are static and all limits are arguments: rewind and fork compile once, decode once for all
slots and for each of `row_buckets`, because a lone observation or the tail of a rollout must not
pay for every slot; append twice for each of these: pieces of any length go in by long chunks and
then by short ones. On a TPU, where a program takes long to compile and wants large products, there
is one bucket, and append compiles per power-of-two chunk. With a TPU's kernels (headcache) decode
compiles once, because a slot costs what it holds, and append once per number of tiles. The programs
themselves are kv_slots.py's.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from steptool_jax.policy import headcache, kv_slots, model, sharding
from steptool_jax.policy.kv_slots import Decoded, EngineState

MIN_CHUNK = 16  # the shortest append program, tokens
CHUNKS = (128, 16)  # tokens of a slot that append takes in one pass of its loop, but on TPUs


@dataclasses.dataclass(frozen=True)
class Engine:
  """The four programs, jitted, and the static facts that the host needs. The state stays outside.

  chunk: tokens that one decode call samples at most; size: positions of a slot. buckets: calls for
  at most so many slots take programs of their own, ascending; () = none. append_programs: (tokens
  of a chunk, program), in the order in which pieces go in; () = append_program takes all. mesh:
  that the programs run on; None = one device. tiled: the cache is the kernels', and append takes
  tiles. copied: weights have a layout of their own in rollouts. kv_cache: numbers of keys and
  values, "auto" (the compute dtype) or "int8".
  """

  config: model.ModelConfig
  slots: int
  size: int
  chunk: int
  buckets: tuple[int, ...]
  mesh: Mesh | None
  tiled: bool
  copied: bool
  kv_cache: str
  init_program: Callable[[], EngineState]
  append_program: Callable
  append_programs: tuple[tuple[int, Callable], ...]
  decode_program: Callable
  rewind_program: Callable
  fork_program: Callable

  @property
  def classes(self) -> tuple[tuple[int, int], ...]:
    """(number of slots, positions of each): all are alike here, see length_classes."""
    return ((self.slots, self.size),)

  def here(self) -> contextlib.AbstractContextManager:
    """In it the programs are traced and called: their mesh need not be that of training."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def init(self) -> EngineState:
    """Empty slots."""
    with self.here():
      return self.init_program()

  def lay_out(self, variables: dict) -> dict:
    """The policy's variables as the programs read them; once a rollout.

    Where rollouts have a layout of their own this is a copy, in the compute dtype.
    """
    if not self.copied:
      return variables
    return layout_program(self.mesh, variables)(self.config, variables)

  def append(
    self, variables: dict, state: EngineState, pieces: dict[int, np.ndarray]
  ) -> EngineState:
    """Appends ids int32[any] to the named slots; the host has checked that they fit."""
    if self.tiled:
      shards = 1 if self.mesh is None else self.mesh.size // self.mesh.shape["tensor"]
      for tokens_P, count_N, tiles in headcache.calls(pieces, self.slots, shards):
        with self.here():
          state = self.append_program(variables, state, tokens_P, count_N, tiles=tiles)
      return state
    if not self.append_programs:
      width = MIN_CHUNK
      while width < min(max(map(len, pieces.values())), self.size):
        width *= 2
      with self.here():
        return self.append_program(variables, state, *self._arrays(pieces, width))
    for chunk, program in self.append_programs:
      whole = chunk == self.append_programs[-1][0]
      parts = {n: ids if whole else ids[: len(ids) - len(ids) % chunk] for n, ids in pieces.items()}
      pieces = {n: ids[len(parts[n]) :] for n, ids in pieces.items()}
      parts = {n: ids for n, ids in parts.items() if len(ids)}
      if parts:
        width = -(-self.size // chunk) * chunk
        with self.here():
          state = program(variables, state, *self._arrays(parts, width))
    return state

  def _arrays(
    self, pieces: dict[int, np.ndarray], width: int
  ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(`rows`, tokens int32[N, width], counts int32[N]) of an append program."""
    rows, at = self._rows(pieces)
    tokens_NC = np.zeros((len(at), width), np.int32)
    count_N = np.zeros(len(at), np.int32)
    for row, slot in enumerate(at):
      if slot in pieces:
        tokens_NC[row, : len(pieces[slot])] = pieces[slot]
        count_N[row] = len(pieces[slot])
    return rows, tokens_NC, count_N

  def decode(
    self,
    variables: dict,
    state: EngineState,
    limits: dict[int, int],
    seeds: dict[int, np.ndarray],
    stop_ids: Sequence[int],
    temperature: float,
  ) -> tuple[EngineState, Decoded]:
    """Samples in the named slots; `limits` in tokens, `seeds` uint32[2] each.

    Decoded holds NumPy arrays with a row for every slot. How many slots are named decides which
    bucket's program runs, and depends on how soon tools answer; the programs round differently. So
    log-probs of two equal runs may differ in their last bits, and a token where two were as good as
    equally likely. Only engines without buckets repeat themselves to the bit.
    """
    rows, at = self._rows(limits)
    limit_N = np.zeros(len(at), np.int32)
    seeds_N2 = np.zeros((len(at), 2), np.uint32)
    for row, slot in enumerate(at):
      if slot in limits:
        limit_N[row] = limits[slot]
        seeds_N2[row] = seeds[slot]
    with self.here():
      state, decoded = self.decode_program(
        variables,
        state,
        rows,
        limit_N,
        np.asarray(stop_ids, np.int32),
        seeds_N2,
        np.float32(temperature),
      )
    decoded = Decoded(*jax.device_get(decoded))
    if rows is None:
      return state, decoded
    used = at[at < self.slots]

    def spread(part):
      full = np.zeros((self.slots, *part.shape[1:]), part.dtype)
      full[used] = part[: len(used)]
      return full

    return state, jax.tree.map(spread, decoded)

  def _rows(self, named: dict[int, Any]) -> tuple[np.ndarray | None, np.ndarray]:
    """(`rows` of the programs, the slot of each row): all slots, or the named ones and padding."""
    width = next((width for width in self.buckets if len(named) <= width), None)
    if width is None:
      return None, np.arange(self.slots)
    at = np.full(width, self.slots, np.int32)
    at[: len(named)] = sorted(named)
    return at, at

  def rewind(self, state: EngineState, lengths: dict[int, int]) -> EngineState:
    """Cuts the named slots back to the given lengths."""
    length_N = np.full(self.slots, self.size, np.int32)
    for slot, length in lengths.items():
      length_N[slot] = length
    with self.here():
      return self.rewind_program(state, length_N)

  def fork(self, state: EngineState, sources: dict[int, int]) -> EngineState:
    """Makes slot n a copy of slot sources[n]."""
    source_N = np.arange(self.slots, dtype=np.int32)
    for slot, source in sources.items():
      source_N[slot] = source
    with self.here():
      return self.fork_program(state, source_N)


def row_buckets(slots: int) -> tuple[int, ...]:
  """Numbers of slots that have programs of their own: an eighth, a quarter and half of them."""
  shares = (4,) if sharding.platform() == "tpu" else (8, 4, 2)
  return tuple(sorted({slots // share for share in shares} - {0}))


def make_engine(
  config: model.ModelConfig,
  slots: int,
  size: int,
  chunk: int,
  top_k: int = 0,
  top_p: float = 1.0,
  mesh: Mesh | None = None,
  leave: float = 1.0,
  *,
  copied: bool = False,
  kv_cache: str = "auto",
  record: str = "",
) -> Engine:
  """Jits the four programs; `mesh` is what the slots lie on. leave, record: as in
  kv_slots.decode.

  Slots on several devices have no buckets: their rows would have to travel. copied: weights are
  laid out anew for this mesh, which is not training's.
  """
  where = None if mesh is None else kv_slots.state_shardings(config, slots, size, mesh, kv_cache)
  alone = mesh is None or mesh.size == 1
  tiled = model.tiled(config)
  jit = functools.partial(sharding.jit, out_shardings=where)
  # What was sampled goes to every process.
  out = None if mesh is None else (where, sharding.replicated(mesh))
  in_chunks = [
    (
      width,
      jit(functools.partial(kv_slots.append_in_chunks, config, chunk=width), donate_argnums=1),
    )
    for width in CHUNKS
  ]
  if tiled:
    append_program = jit(
      functools.partial(kv_slots.append_tiles, config), donate_argnums=1, static_argnames="tiles"
    )
  else:
    append_program = jit(functools.partial(kv_slots.append, config), donate_argnums=1)
  return Engine(
    config=config,
    slots=slots,
    size=size,
    chunk=chunk,
    buckets=row_buckets(slots) if alone and not tiled else (),
    mesh=mesh,
    tiled=tiled,
    copied=copied,
    kv_cache=kv_cache,
    init_program=jit(functools.partial(kv_slots.init_state, config, slots, size, kv_cache)),
    append_program=append_program,
    append_programs=() if tiled or sharding.platform() == "tpu" else tuple(in_chunks),
    decode_program=sharding.jit(
      functools.partial(
        *(kv_slots.decode, config),
        max_tokens=chunk,
        top_k=top_k,
        top_p=top_p,
        leave=leave,
        record=record,
      ),
      donate_argnums=1,
      out_shardings=out,
    ),
    rewind_program=jit(kv_slots.rewind, donate_argnums=0),
    fork_program=jit(kv_slots.fork, donate_argnums=0),
  )


def layout_program(mesh: Mesh, variables: Any) -> Callable:
  """(model config, variables) -> the variables in the compute dtype, laid out on `mesh`."""
  where = sharding.shardings(variables, mesh)
  return sharding.jit(model.in_compute_dtype, static_argnums=0, out_shardings=where)
