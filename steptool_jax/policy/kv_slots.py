"""KV slots as pure functions: append, decode, rewind and fork over one state.

The state holds every slot's token ids. Keys and values are always complete for positions before
the last one; the last token is pending and is fed when the next one is wanted. So rewind is a new
length and nothing else.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from steptool_jax.policy import caches, headcache, model, sampling, sharding


class EngineState(NamedTuple):
  """Donated to every call. N slots of S positions."""

  cache: caches.Cache
  tokens: jax.Array  # int32[N, S], what each slot has seen and said
  length: jax.Array  # int32[N]


class Decoded(NamedTuple):
  """What one decode call sampled: the first count[n] columns of row n."""

  tokens: jax.Array  # int32[N, K], the stop token included
  logprobs: jax.Array  # float32[N, K]
  count: jax.Array  # int32[N]
  stopped: jax.Array  # bool[N], the last of them is a stop token
  # Where the engine records it, else None: of the states in front of tokens, as trained on.
  values: Any = None  # float32[N, K], the value head's V in front of each of them
  hidden: Any = None  # float32[N, D], the hidden state in front of the first one


def init_state(
  config: model.ModelConfig, slots: int, size: int, kv_cache: str = "auto"
) -> EngineState:
  """`slots` empty slots of `size` positions."""
  return EngineState(
    cache=model.init_cache(config, slots, size, kv_cache),
    tokens=jnp.zeros((slots, size), jnp.int32),
    length=jnp.zeros(slots, jnp.int32),
  )


def take(state: EngineState, rows: jax.Array | None) -> EngineState:
  """The slots named by `rows` int32[N] as a smaller state; None takes the state as it is.

  A row beyond the last slot is padding: it stands for some slot here and for none in `put`.
  """
  if rows is None:
    return state
  cache = jax.tree.map(lambda x: x.at[:, rows].get(mode="clip"), state.cache)
  return EngineState(
    cache, state.tokens.at[rows].get(mode="clip"), state.length.at[rows].get(mode="clip")
  )


def put(state: EngineState, rows: jax.Array | None, part: EngineState) -> EngineState:
  """`state` with the slots `rows` as in `part`."""
  if rows is None:
    return part
  cache = jax.tree.map(lambda x, y: x.at[:, rows].set(y, mode="drop"), state.cache, part.cache)
  return EngineState(
    cache,
    state.tokens.at[rows].set(part.tokens, mode="drop"),
    state.length.at[rows].set(part.length, mode="drop"),
  )


def append(
  config: model.ModelConfig,
  variables: dict,
  whole: EngineState,
  rows: jax.Array | None,
  tokens_NC: jax.Array,
  count_N: jax.Array,
) -> EngineState:
  """Forces the first count[n] of C tokens into slot rows[n] (prompt, observation)."""
  state = take(whole, rows)
  slots, size = state.tokens.shape
  width = tokens_NC.shape[1]
  columns_C = jnp.arange(width)
  new_length_N = state.length + count_N
  targets_NC = jnp.where(
    columns_C < count_N[:, None], state.length[:, None] + columns_C, size
  )  # `size` is outside and dropped
  history_NS = state.tokens.at[jnp.arange(slots)[:, None], targets_NC].set(tokens_NC, mode="drop")
  # The pending token goes first; the last new one stays pending (or is fed for nothing).
  start_N = jnp.maximum(state.length - 1, 0)
  positions_NC = start_N[:, None] + columns_C
  valid_NC = (positions_NC < new_length_N[:, None]) & (count_N > 0)[:, None]
  fed_NC = jnp.take_along_axis(history_NS, jnp.minimum(positions_NC, size - 1), axis=1)
  _, cache = model.forward_cached(config, variables, fed_NC, positions_NC, valid_NC, state.cache)
  return put(whole, rows, EngineState(cache, history_NS, new_length_N))


def append_in_chunks(
  config: model.ModelConfig,
  variables: dict,
  whole: EngineState,
  rows: jax.Array | None,
  tokens_NL: jax.Array,
  count_N: jax.Array,
  *,
  chunk: int,
) -> EngineState:
  """As `append`, `chunk` of the L tokens at a time: what it costs goes by the longest count."""

  def one(at, state):
    tokens_NC = jax.lax.dynamic_slice_in_dim(tokens_NL, at * chunk, chunk, axis=1)
    count_now_N = jnp.clip(count_N - at * chunk, 0, chunk)
    return append(config, variables, state, None, tokens_NC, count_now_N)

  trips = -(-jnp.max(count_N) // chunk)
  return put(whole, rows, jax.lax.fori_loop(0, trips, one, take(whole, rows)))


def append_tiles(
  config: model.ModelConfig,
  variables: dict,
  state: EngineState,
  tokens_P: jax.Array,
  count_N: jax.Array,
  *,
  tiles: int,
) -> EngineState:
  """As `append`, for the kernels' cache: count[n] tokens for each slot, of a flat list.

  tokens_P: each shard's own part holds the tokens of its slots, one slot after the other. tiles: of
  each shard, at least the sum of headcache.rows_needed.
  """
  history_NS, fed_RT, *where = headcache.place(tokens_P, count_N, state.tokens, state.length, tiles)
  plan = headcache.tiles(*where, state.cache)
  cache = model.forward_tiles(config, variables, fed_RT, plan, state.cache)
  return EngineState(cache, history_NS, state.length + count_N)


def decode(
  config: model.ModelConfig,
  variables: dict,
  whole: EngineState,
  rows: jax.Array | None,
  limit_N: jax.Array,
  stop_ids: jax.Array,
  seeds_N2: jax.Array,
  temperature: jax.Array,
  *,
  max_tokens: int,
  top_k: int = 0,
  top_p: float = 1.0,
  leave: float = 1.0,
  record: str = "",
) -> tuple[EngineState, Decoded]:
  """Samples up to min(limit[n], max_tokens) tokens in every slot of `rows`, in one while loop.

  The call ends as soon as the share `leave` of the slots that it began with has ended: what they
  asked for is worked on while the others go on in the next call, with the same tokens.

  Args:
    rows: int32[N], the slots that rows of arguments and results belong to; None = all.
    limit_N: int32, 0 leaves a slot alone.
    stop_ids: int32[any]; a stop token is kept and ends the slot's turn.
    seeds_N2: uint32, one key a slot; the token at position p uses fold_in(key, p), so a step may be
      split over any number of calls.
    temperature: float32 scalar, 0 = greedy.
    record: "values" or "hidden" fills this field of Decoded; "" = neither.
  """
  state = take(whole, rows)
  slots, size = state.tokens.shape
  rows_N = jnp.arange(slots)
  limit_N = jnp.minimum(jnp.minimum(limit_N, max_tokens), size - state.length)
  limit_N = jnp.where(state.length > 0, limit_N, 0)
  keys_N = jax.vmap(jax.random.wrap_key_data)(seeds_N2)
  out = Decoded(
    tokens=jnp.zeros((slots, max_tokens), jnp.int32),
    logprobs=jnp.zeros((slots, max_tokens), jnp.float32),
    count=jnp.zeros(slots, jnp.int32),
    stopped=jnp.zeros(slots, bool),
    values=jnp.zeros((slots, max_tokens), jnp.float32) if record == "values" else None,
    hidden=jnp.zeros((slots, config.hidden_size), jnp.float32) if record == "hidden" else None,
  )

  def active(out):
    return (out.count < limit_N) & ~out.stopped

  def one_token(carry):
    state, out = carry
    active_N = active(out)
    position_N = jnp.maximum(state.length - 1, 0)
    pending_N = state.tokens[rows_N, position_N]
    hidden_N1D, cache = model.forward_cached(
      config,
      variables,
      pending_N[:, None],
      position_N[:, None],
      active_N[:, None],
      state.cache,
    )
    logits_NV = model.project_logits(config, variables, hidden_N1D[:, 0])
    logits_NV = sharding.constrain_logits(logits_NV)
    token_keys_N = jax.vmap(jax.random.fold_in)(keys_N, state.length)
    new_N, logprobs_N = sampling.sample(logits_NV, token_keys_N, temperature, top_k, top_p)
    history_NS = state.tokens.at[rows_N, jnp.where(active_N, state.length, size)].set(
      new_N, mode="drop"
    )
    column_N = jnp.where(active_N, out.count, max_tokens)
    values, hidden = out.values, out.hidden
    if record == "values":
      values_N = model.project_values(variables, hidden_N1D[:, 0])
      values = values.at[rows_N, column_N].set(values_N, mode="drop")
    elif record == "hidden":
      first_N1 = (active_N & (out.count == 0))[:, None]
      hidden = jnp.where(first_N1, hidden_N1D[:, 0].astype(jnp.float32), hidden)
    out = Decoded(
      tokens=out.tokens.at[rows_N, column_N].set(new_N, mode="drop"),
      logprobs=out.logprobs.at[rows_N, column_N].set(logprobs_N, mode="drop"),
      count=out.count + active_N,
      stopped=out.stopped | (active_N & jnp.isin(new_N, stop_ids)),
      values=values,
      hidden=hidden,
    )
    return EngineState(cache, history_NS, state.length + active_N), out

  began = (limit_N > 0).sum()
  left = began - jnp.ceil(began * leave).astype(jnp.int32)
  state, out = jax.lax.while_loop(
    lambda carry: active(carry[1]).sum() > left, one_token, (state, out)
  )
  return put(whole, rows, state), out


def rewind(state: EngineState, length_N: jax.Array) -> EngineState:
  """Back to an earlier length; nothing is copied. A longer length than now is not taken."""
  return state._replace(length=jnp.minimum(state.length, length_N))


def fork(state: EngineState, source_N: jax.Array) -> EngineState:
  """Slot n becomes a copy of slot source[n]; source[n] == n leaves it as it is.

  Only what the sources hold is copied; none of them may be made a copy in the same call.
  """
  length_N = state.length[source_N]
  longest = jnp.max(jnp.where(source_N == jnp.arange(len(source_N)), 0, length_N))
  cache = caches.copy_slots(state.cache, source_N, longest)
  return EngineState(cache, state.tokens[source_N], length_N)


def move(origin: EngineState, target: EngineState, source_N: jax.Array) -> EngineState:
  """`target`, whose slot n becomes a copy of slot source[n] of `origin`; below 0 it stays.

  Slots of `origin` are no longer than those of `target`.
  """
  moved_N = source_N >= 0
  longest = jnp.max(jnp.where(moved_N, origin.length[source_N], 0))
  cache = caches.copy_slots(target.cache, source_N, longest, origin.cache)
  size = origin.tokens.shape[1]
  tokens_NS = jnp.where(moved_N[:, None], origin.tokens[source_N], target.tokens[:, :size])
  return EngineState(
    cache,
    target.tokens.at[:, :size].set(tokens_NS),
    jnp.where(moved_N, origin.length[source_N], target.length),
  )


def state_shardings(
  config: model.ModelConfig, slots: int, size: int, mesh: Mesh, kv_cache: str = "auto"
) -> EngineState:
  """How the engine's slots lie on the mesh; ValueError where they do not divide."""
  sharding.check_rows("slots", slots, mesh)
  empty = jax.eval_shape(functools.partial(model.init_cache, config, slots, size, kv_cache))
  cache = jax.tree.map(functools.partial(NamedSharding, mesh), caches.specs(empty, mesh))
  rows = sharding.batch_sharding(mesh)
  return EngineState(cache, rows, rows)
