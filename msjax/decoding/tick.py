"""One step of all sessions: a row of each is fed, and what the model would write next is drawn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from msjax import sharding
from msjax.decoding.cache import Cache
from msjax.decoding.policy import Knobs
from msjax.decoding.prepared import Prepared, feed
from msjax.decoding.sampling import Past, sample
from msjax.models import axes
from msjax.streams import HOLE

FREE = -2  # in a row that is given: let the model write this cell


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What the devices hold of B sessions.

  Attributes:
    cache: keys and values.
    past: what policies ask of earlier rows.
    proposal: int32 [B, S], what the model would write in the next row; `NOT_FINITE` where its
      logits are not.
    keys: PRNG keys [B], one a session.
  """

  cache: Cache
  past: Past
  proposal: jax.Array
  keys: jax.Array


def room(
  model: Prepared, sessions: int, rows: int, remembers: bool, axis: str | None = "batch"
) -> State:
  """Returns the state of sessions that have been fed nothing; their first row is silence.

  Args:
    model: prepared, on the mesh in use.
    sessions: B.
    rows: that the cache has room for.
    remembers: whether policies may ask which tokens a stream has had.
    axis: what cuts the sessions; None: every chip has all.
  """
  streams = model.trunk.streams

  def empty(cache):
    V = model.columns.shape[1] if remembers else 0
    silence = jnp.full((sessions, len(streams)), streams.silence_id, jnp.int32)
    keys = jax.random.split(jax.random.key(0), sessions)
    return State(cache, Past.empty(sessions, streams, V), silence, keys)

  cache = model.room(sessions, rows, axis)
  like = jax.eval_shape(empty, cache)
  # Each session that is read in needs a room.
  if jax.sharding.get_abstract_mesh().empty:
    return empty(cache)
  return sharding.made(empty, specs(model, like, axis), donate_argnums=0)(cache)


def specs(model: Prepared, state: State, axis: str | None = "batch") -> State:
  """How a state is cut; see `room`."""
  of_sessions = sharding.spec(axis)
  past = jax.tree.map(lambda _: of_sessions, state.past)
  past = dataclasses.replace(past, had=sharding.spec(axis, None, "vocab"))
  return State(model.cache_specs(state.cache, axis), past, of_sessions, of_sessions)


@functools.partial(jax.jit, donate_argnames="state")
def tick(
  model: Prepared,
  state: State,
  knobs: Knobs,
  given: jax.Array,
  active: jax.Array,
  reading: jax.Array,
) -> State:
  """Feeds a row to every active session and proposes its next; sessions are cut over `data`.

  Args:
    model: prepared, on the mesh in use.
    state: donated; its cache has room for a row more in every session, active or not.
    knobs: policies.
    given: int32 [B, S], by stream id: token ids, -1 for a hole, `FREE` for what the state proposes.
    active: bool [B]; the others stay as they are.
    reading: bool [B], whether an input stream is known to speak in the row after this.

  Returns:
    The next state.
  """
  return _on_chips(_tick, model, state, "batch", knobs, given, active, reading)


def _tick(model, state, knobs, given, active, reading):
  tokens = jnp.where(given == FREE, state.proposal, given)
  return _fed(model, state, knobs, tokens[:, None], active.astype(jnp.int32), reading)


@functools.partial(jax.jit, donate_argnames="state")
def prefill(
  model: Prepared,
  state: State,
  knobs: Knobs,
  rows: jax.Array,
  count: jax.Array,
  reading: jax.Array,
) -> State:
  """Feeds the first `count` of R rows at once to sessions that every chip has.

  Args:
    model: as for `tick`, like knobs and reading.
    state: made with axis None; donated; its cache has room for R rows.
    knobs: see model.
    rows: int32 [B, R, S], token ids and holes.
    count: int32 [B], 0 to R.
    reading: see model.

  Returns:
    The next state.
  """
  return _on_chips(_fed, model, state, None, knobs, rows, count, reading)


def _fed(model, state, knobs, rows, count, reading):
  """Feeds `count` of rows [B, R, S], and draws what follows the last."""
  hidden, cache = feed(model, state.cache, rows, count)
  last = jnp.maximum(count - 1, 0)[:, None]
  of_last = lambda x: jnp.take_along_axis(x, last.reshape(-1, *[1] * (x.ndim - 1)), 1)[:, 0]
  tokens, hidden = of_last(rows), of_last(hidden)
  past = _with_rows(state.past, rows, count, model.trunk.streams)
  logits = model.logits(hidden, tokens)
  keys = jax.vmap(jax.random.fold_in)(state.keys, past.rows)
  silence = model.trunk.streams.silence_id
  drawn = sample(logits, knobs, past, reading, silence, keys)
  drawn = jnp.where(tokens == HOLE, silence, drawn)
  proposal = jnp.where((count > 0)[:, None], drawn, state.proposal)
  return State(cache, past, proposal, state.keys)


def _with_rows(past, rows, count, streams):
  """The past after the rows that count."""

  def step(past, row_and_index):
    row, index = row_and_index
    after = past.with_row(row, streams)
    counts = index < count
    keep = lambda new, old: jnp.where(counts.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return jax.tree.map(keep, after, past), None

  indices = jnp.arange(rows.shape[1])
  return jax.lax.scan(step, past, (jnp.swapaxes(rows, 0, 1), indices))[0]


def _on_chips(f, model, state, axis, knobs, *of_sessions):
  """Runs `f(model, state, knobs, ...)`, of whose arrays each chip has its own sessions'."""
  by_session, of_state = sharding.spec(axis), specs(model, state, axis)
  of_knobs = jax.tree.map(lambda _: by_session, knobs)
  return sharding.on_chips(
    f,
    in_specs=(axes.specs(model), of_state, of_knobs, *(by_session for _ in of_sessions)),
    out_specs=of_state,
  )(model, state, knobs, *of_sessions)


# A session comes.


@functools.partial(jax.jit, donate_argnames="state")
def begin(model: Prepared, state: State, session: jax.Array, key: jax.Array) -> State:
  """Lets a session begin that has been fed nothing.

  Args:
    model: prepared, on the mesh in use.
    state: of many; donated.
    session: int32 [], which of the many it becomes; what its cache holds is never seen again.
    key: its PRNG key, [].
  """
  here = jnp.arange(len(state.proposal)) == session
  pick = lambda new, old: jnp.where(here.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  streams, past = model.trunk.streams, state.past
  return State(
    dataclasses.replace(state.cache, row=pick(0, state.cache.row)),
    jax.tree.map(pick, Past.empty(here.size, streams, past.had.shape[-1]), past),
    pick(streams.silence_id, state.proposal),
    pick(key, state.keys),
  )


@functools.partial(jax.jit, donate_argnames="state")
def put(model: Prepared, state: State, one: State, session: jax.Array) -> State:
  """Lets a session go on where another left off.

  Args:
    model: prepared, on the mesh in use.
    state: of many; donated.
    one: of one session, that every chip has; its cache is no longer than that of `state`.
    session: int32 [], which of the many it becomes.
  """

  def write(state, one, session):
    own = session - sharding.index("batch") * len(state.proposal)
    here = (own >= 0) & (own < len(state.proposal))
    at = jnp.clip(own, 0, len(state.proposal) - 1)

    def into(many, single, axis):
      start = [at if i == axis else 0 for i in range(many.ndim)]
      old = jax.lax.dynamic_slice(many, start, single.shape)
      return jax.lax.dynamic_update_slice(many, jnp.where(here, single, old), start)

    return _by_session(into, model, state, one)

  return sharding.on_chips(
    write,
    in_specs=(specs(model, state), specs(model, one, None), sharding.spec()),
    out_specs=specs(model, state),
  )(state, one, session)


def _by_session(f: Any, model: Prepared, state: State, one: State) -> State:
  """Maps `f(array, array, axis)`, which is told where arrays have their sessions."""
  bits = lambda state: dataclasses.replace(state, keys=jax.random.key_data(state.keys))
  state, one = bits(state), bits(one)
  session_axes = dataclasses.replace(
    jax.tree.map(lambda _: 0, state), cache=model.cache_session_axes(state.cache)
  )
  found = jax.tree.map(f, state, one, session_axes)
  return dataclasses.replace(found, keys=jax.random.wrap_key_data(found.keys))
