"""One step of all sessions: a row of each is fed, and what the model would write next is drawn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from msjax import sharding
from msjax.decoding.cache import Cache
from msjax.decoding.look import Look, look
from msjax.decoding.policy import Knobs
from msjax.decoding.prepared import Prepared, feed, feed_and_look
from msjax.decoding.sampling import NOT_FINITE, Past, sample
from msjax.decoding.stop import Limits
from msjax.models import axes
from msjax.streams import HOLE

FREE = -2  # in a row that is given: let the model write this cell
NOT_FED = -5  # in what is told of rows: this one was not fed


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

  def grown(self, cells: int) -> "State":
    """Returns it with its room doubled until it has so many cells."""
    cache = self.cache
    while cache.capacity < cells:
      cache = cache.grown(cache.capacity)
    return dataclasses.replace(self, cache=cache)


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
    V = len(model.unembed) if remembers else 0
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


@functools.partial(jax.jit, donate_argnames="state", static_argnames="looks")
def tick(
  model: Prepared,
  state: State,
  knobs: Knobs,
  given: jax.Array,
  active: jax.Array,
  reading: jax.Array,
  looks: int = 0,
) -> tuple[State, Look | None]:
  """Feeds a row to every active session and proposes its next; sessions are cut over `data`.

  Args:
    model: prepared, on the mesh in use.
    state: donated; its cache has room for a row more in every session, active or not.
    knobs: policies.
    given: int32 [B, S], by stream id: token ids, -1 for a hole, `FREE` for what the state proposes.
    active: bool [B]; the others stay as they are.
    reading: bool [B], whether an input stream is known to speak in the row after this.
    looks: how many of the likeliest tokens are told with a look at what is proposed; 0: no look.

  Returns:
    The next state; the look, if any.
  """
  by_session, of_state = sharding.spec("batch"), specs(model, state)
  return sharding.on_chips(
    functools.partial(_tick, looks=looks),
    in_specs=(axes.specs(model), of_state, _knob_specs(knobs), *[by_session] * 3),
    out_specs=(of_state, by_session if looks else None),
  )(model, state, knobs, given, active, reading)


@functools.partial(jax.jit, donate_argnames="state")
def ticks(
  model: Prepared,
  state: State,
  knobs: Knobs,
  limits: Limits,
  given: jax.Array,
  reading: jax.Array,
) -> tuple[State, jax.Array]:
  """Feeds up to N rows one after another, without the host; ends when no session goes on.

  Args:
    model: as for `tick`, like state and knobs; the cache has room for N rows.
    state: see model.
    knobs: see model.
    limits: how far each session goes.
    given: int32 [B, N, S], as for `tick`, row by row.
    reading: bool [B, N], likewise.

  Returns:
    The next state; what was proposed after each row, int32 [B, N, S], `NOT_FED` for rows that a
    session was not fed.
  """

  def go_on(carry):
    n, _, limits, _ = carry
    going = (limits.rows > 0).any().astype(jnp.int32)
    return (n < given.shape[1]) & (sharding.highest(going, "batch") > 0)

  def row(model, carry, knobs, given, reading):
    n, state, limits, told = carry
    of_row = lambda x: jax.lax.dynamic_index_in_dim(x, n, 1, keepdims=False)
    active, given = limits.rows > 0, of_row(given)
    tokens = jnp.where(given == FREE, state.proposal, given)
    past = state.past
    state, _ = _tick(model, state, knobs, given, active, of_row(reading))
    after = limits.after(tokens, past, state.past)
    finite = (state.proposal != NOT_FINITE).all(1)
    after = dataclasses.replace(after, rows=jnp.where(finite, after.rows, 0))
    limits = jax.tree.map(functools.partial(_where_session, active), after, limits)
    proposed = jnp.where(active[:, None], state.proposal, NOT_FED)
    return n + 1, state, limits, jax.lax.dynamic_update_index_in_dim(told, proposed, n, 1)

  def rows(model, state, knobs, limits, given, reading):
    begin = jnp.int32(0), state, limits, jnp.full_like(given, NOT_FED)
    each = lambda carry: row(model, carry, knobs, given, reading)
    _, state, _, told = jax.lax.while_loop(go_on, each, begin)
    return state, told

  by_session, of_state = sharding.spec("batch"), specs(model, state)
  return sharding.on_chips(
    rows,
    in_specs=(axes.specs(model), of_state, _knob_specs(knobs), *[by_session] * 3),
    out_specs=(of_state, by_session),
  )(model, state, knobs, limits, given, reading)


def _tick(model, state, knobs, given, active, reading, looks=0):
  tokens = jnp.where(given == FREE, state.proposal, given)
  count = active.astype(jnp.int32)
  if looks:
    hidden, cache, attention = feed_and_look(model, state.cache, tokens[:, None], count)
  else:
    hidden, cache = feed(model, state.cache, tokens[:, None], count)
  since = knobs.since.max(-1)
  past = _with_rows(state.past, tokens[:, None], count, model.trunk.streams, since)
  logits = model.logits(hidden[:, 0], tokens)
  proposal = _proposed(model, logits, tokens, knobs, past, reading, state.keys)
  state = State(cache, past, _where_session(active, proposal, state.proposal), state.keys)
  return state, look(logits, attention, looks) if looks else None


def _proposed(model, logits, tokens, knobs, past, reading, keys):
  """What comes after rows [B, S] with these logits, int32 [B, S]."""
  keys = jax.vmap(jax.random.fold_in)(keys, past.rows)
  silence = model.trunk.streams.silence_id
  drawn = sample(logits, knobs, past, reading, silence, keys)
  return jnp.where(tokens == HOLE, silence, drawn)


@functools.partial(jax.jit, donate_argnames="state")
def prefill(
  model: Prepared, state: State, rows: jax.Array, count: jax.Array, since: jax.Array
) -> State:
  """Feeds the first `count` of R rows at once to sessions that every chip has; proposes nothing.

  Args:
    model: as for `tick`.
    state: made with axis None; donated; its cache has room for R rows.
    rows: int32 [B, R, S], token ids and holes.
    count: int32 [B], 0 to R.
    since: int32 [B], row of the session from which on inputs are heard.

  Returns:
    The next state, whose proposal is still the same.
  """

  def fed(model, state, rows, count, since):
    _, cache = feed(model, state.cache, rows, count)
    past = _with_rows(state.past, rows, count, model.trunk.streams, since)
    return dataclasses.replace(state, cache=cache, past=past)

  everywhere, of_state = sharding.spec(), specs(model, state, None)
  return sharding.on_chips(
    fed,
    in_specs=(axes.specs(model), of_state, everywhere, everywhere, everywhere),
    out_specs=of_state,
  )(model, state, rows, count, since)


def _with_rows(past, rows, count, streams, since):
  """The past after the rows that count; see `Past.with_row`."""

  def step(past, row_and_index):
    row, index = row_and_index
    keep = functools.partial(_where_session, index < count)
    return jax.tree.map(keep, past.with_row(row, streams, since), past), None

  indices = jnp.arange(rows.shape[1])
  return jax.lax.scan(step, past, (jnp.swapaxes(rows, 0, 1), indices))[0]


def _where_session(here, new, old):
  """Takes what is new of the sessions bool [B]."""
  return jnp.where(here.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _knob_specs(knobs):
  of_knobs = jax.tree.map(lambda _: sharding.spec("batch"), knobs)
  return dataclasses.replace(of_knobs, allowed=sharding.spec("batch", None, "vocab"))


# A session comes, or goes.


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
  pick = functools.partial(_where_session, here)
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
    here, at = _own_place(session, len(state.proposal))

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


@jax.jit
def take(model: Prepared, state: State, session: jax.Array) -> State:
  """Copies one session out of many, to every chip; see `put`.

  Args:
    model: prepared, on the mesh in use.
    state: of many.
    session: int32 [], which of them.
  """

  def read(state, session):
    here, at = _own_place(session, len(state.proposal))

    def out_of(many, _, axis):
      own = jax.lax.dynamic_slice_in_dim(many, at, 1, axis)
      if own.dtype == bool:
        return sharding.highest((own & here).astype(jnp.uint32), "batch") > 0
      uint = {2: jnp.uint16, 4: jnp.uint32}[own.dtype.itemsize]
      bits = jax.lax.bitcast_convert_type(own, uint).astype(jnp.uint32)
      bits = sharding.highest(jnp.where(here, bits, 0), "batch")
      return jax.lax.bitcast_convert_type(bits.astype(uint), own.dtype)

    return _by_session(out_of, model, state, state)

  return sharding.on_chips(
    read,
    in_specs=(specs(model, state), sharding.spec()),
    out_specs=specs(model, state, None),
  )(state, session)


def _own_place(session: jax.Array, places: int) -> tuple[jax.Array, jax.Array]:
  """Whether a session is among the chip's own, and where; if not, somewhere."""
  own = session - sharding.index("batch") * places
  return (own >= 0) & (own < places), jnp.clip(own, 0, places - 1)


def _by_session(f: Any, model: Prepared, state: State, one: State) -> State:
  """Maps `f(array, array, axis)`, which is told where arrays have their sessions."""
  bits = lambda state: dataclasses.replace(state, keys=jax.random.key_data(state.keys))
  state, one = bits(state), bits(one)
  session_axes = dataclasses.replace(
    jax.tree.map(lambda _: 0, state), cache=model.cache_session_axes(state.cache)
  )
  found = jax.tree.map(f, state, one, session_axes)
  return dataclasses.replace(found, keys=jax.random.wrap_key_data(found.keys))
