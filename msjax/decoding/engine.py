"""Many live sessions of one model: they come and go, read and write, a row of each at a time.

The devices hold a fixed number of places. A session that comes is read in by itself, some rows
between two ticks of the others, and then put into a free place; ticks take a row of every place, so
that what a session writes does not depend on who has the others.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from msjax.decoding import sampling
from msjax.decoding import tick as tick_lib
from msjax.decoding.policy import Knobs, Policy
from msjax.decoding.prepared import Prepared
from msjax.decoding.session import ENDED, NOT_FINITE, RUNNING, WAITING, Session, Stop
from msjax.decoding.tick import FREE, State
from msjax.errors import InputError
from msjax.mesh import check_sessions
from msjax.streams import HOLE

_GREEDY, _NO_STOP = Policy(), Stop()


class Engine:
  """Up to B sessions; see the module.

  Attributes:
    model: prepared, on the mesh in use.
    streams: of the model.
    state: what the devices hold.
  """

  def __init__(
    self,
    model: Prepared,
    places: int = 1,
    rows: int = 64,
    max_rows: int = 1 << 16,
    rows_at_once: int = 32,
    remembers: bool = False,
    queue_limit: int = 1 << 16,
  ):
    """Makes room.

    Args:
      model: prepared, on the mesh in use.
      places: B, sessions that advance together; a multiple of the chips on `data`.
      rows: that there is room for to begin with; it doubles as sessions grow.
      max_rows: of a session, where its context is full.
      rows_at_once: of a session that is read in, between two ticks.
      remembers: whether policies may ask which tokens a stream has had.
      queue_limit: tokens that may wait in one stream of a session.

    Raises:
      InputError: a number below 1, or places that the mesh in use cannot deal out.
    """
    sizes = {"places": places, "rows": rows, "max_rows": max_rows, "rows_at_once": rows_at_once}
    for name, size in sizes.items():
      if size < 1:
        raise InputError(f"{name}: {size}; expected 1 or more")
    check_sessions(model.trunk.cfg, places)
    self.model, self.streams = model, model.trunk.streams
    self.max_rows, self._at_once, self._remembers = max_rows, rows_at_once, remembers
    self._queue_limit = queue_limit
    self.state = tick_lib.room(model, places, min(rows, max_rows), remembers)
    self._told = np.full((places, len(self.streams)), self.streams.silence_id, np.int32)
    self._places: list[Session | None] = [None] * places
    self._waiting: list[Session] = []
    self._reading: tuple[Session, State, Knobs] | None = None
    self._knobs: Knobs | None = None
    self._numbers = 0

  def join(
    self,
    prompt: np.ndarray | None = None,
    policies: Mapping[str, Policy] | Policy = _GREEDY,
    seed: int = 0,
    number: int | None = None,
    stop: Stop = _NO_STOP,
    script: np.ndarray | None = None,
  ) -> Session:
    """Lets a session come; it gets the next free place.

    Args:
      prompt: rows int32 [R, S] that it begins with, token ids and holes; None for none.
      policies: by stream, others as by `Policy()`; or one for all.
      seed: with the number, and for each row and stream, says what is drawn.
      number: of the session; None: one more than the last.
      stop: when it ends.
      script: rows int32 [R, S] that come after the prompt: token ids, holes, and `FREE` for what
        the model writes.

    Raises:
      InputError: a row that is none, more rows than the context has, an unknown stream, a policy
        out of range.
    """
    number = self._numbers if number is None else number
    self._numbers = max(self._numbers, number + 1)
    who = f"session {number}"
    by_stream = self._by_stream(who, policies)
    session = Session(
      *(self.streams, self.model.vocab_size, number, seed, by_stream, stop, self._queue_limit)
    )
    for name in (*stop.end_streams, *stop.tokens):
      self.streams.id(name)
    if prompt is not None and len(prompt):
      session.unread.extend(self._checked(who, "prompt", prompt, HOLE))
    if script is not None and len(script):
      session.script.extend(self._checked(who, "script", script, FREE))
    self._waiting.append(session)
    return session

  def step(self) -> list[tuple[Session, np.ndarray]]:
    """Feeds a row to every running session, and reads in some rows of one that waits.

    Returns:
      The sessions with the rows int32 [S] that they were fed, token ids and holes.
    """
    self._let_go()
    self._read_in()
    found = self._tick()
    self._let_go()
    return found

  @property
  def sessions(self) -> list[Session]:
    """All that have not ended, by number."""
    here = [session for session in self._places if session is not None]
    here += [self._reading[0]] if self._reading else []
    going_on = (session for session in (*here, *self._waiting) if session.status != ENDED)
    return sorted(going_on, key=lambda session: session.number)

  def _let_go(self) -> None:
    """Frees the places of sessions that have ended."""
    for place, session in enumerate(self._places):
      if session is not None and session.status == ENDED:
        self._places[place], self._knobs = None, None
    self._waiting = [session for session in self._waiting if session.status != ENDED]
    if self._reading and self._reading[0].status == ENDED:
      self._reading = None

  # Reading in.

  def _read_in(self) -> None:
    """Lets those begin for whom there are places; of one who has rows to be read first, reads
    some."""
    free = self._places.count(None) - bool(self._reading)
    coming = self._waiting[:free]
    for session in coming:
      if not session.unread:
        self._begin(session)
    self._waiting = [session for session in self._waiting if session.status == WAITING]
    if self._reading is None:
      reader = next((session for session in coming if session.unread), None)
      if reader is None:
        return
      self._waiting.remove(reader)
      self._reading = self._by_itself(reader)
    session, one, knobs = self._reading
    one = self._read_some(session, one, knobs)
    if session.unread:
      self._reading = session, one, knobs
    else:
      self._reading = None
      self._put(session, one)

  def _begin(self, session: Session) -> None:
    """Gives a session a place that has nothing to read first."""
    place = self._places.index(None)
    self.state = tick_lib.begin(self.model, self.state, np.int32(place), _key(session))
    self._told[place] = self.streams.silence_id
    self._take(place, session)

  def _by_itself(self, session: Session) -> tuple[Session, State, Knobs]:
    """A session that is to be read in."""
    rows = _bucket(len(session.unread) + self._at_once)
    one = tick_lib.room(self.model, 1, rows, self._remembers, None)
    one = dataclasses.replace(one, keys=_key(session)[None])
    return session, one, Knobs.of([session.policies])

  def _read_some(self, session: Session, one: State, knobs: Knobs) -> State:
    """Feeds the next rows of a session that is read in."""
    count = min(self._at_once, len(session.unread))
    rows = np.full((1, self._at_once, len(self.streams)), HOLE, np.int32)
    rows[0, :count] = [session.unread.popleft() for _ in range(count)]
    session.rows += list(rows[0, :count])
    reading = np.array([bool(session.unread) or session.speaks_next])
    return tick_lib.prefill(self.model, one, knobs, rows, np.array([count], np.int32), reading)

  def _put(self, session: Session, one: State) -> None:
    """Gives a session a place that has been read in."""
    place = self._places.index(None)
    self._grow(one.cache.capacity)
    self._told[place] = np.asarray(one.proposal)[0]
    self.state = tick_lib.put(self.model, self.state, one, np.int32(place))
    self._take(place, session)
    self._look_at(place, session)

  def _take(self, place: int, session: Session) -> None:
    self._places[place], self._knobs = session, None
    session.status = RUNNING

  def _grow(self, cells: int) -> None:
    """Doubles the room until it has so many cells."""
    cache = self.state.cache
    while cache.capacity < cells:
      cache = cache.grown(cache.capacity)
    self.state = dataclasses.replace(self.state, cache=cache)

  # Ticks.

  def _tick(self) -> list[tuple[Session, np.ndarray]]:
    running = [
      (place, session)
      for place, session in enumerate(self._places)
      if session is not None and session.status == RUNNING
    ]
    if not running:
      return []
    # A tick writes into places that are paused, too, where their next row is going to be.
    longest = max(len(session.rows) for session in self._places if session)
    self._grow((longest + 1) * len(self.streams))
    given = np.full((len(self._places), len(self.streams)), self.streams.silence_id, np.int32)
    active, reading = np.zeros((2, len(self._places)), bool)
    for place, session in running:
      given[place], active[place] = session.next_row(), True
      reading[place] = session.speaks_next
    if self._knobs is None:
      of = [s.policies if s else [_GREEDY] * len(self.streams) for s in self._places]
      self._knobs = jax.tree.map(jnp.asarray, Knobs.of(of))
    self.state = tick_lib.tick(self.model, self.state, self._knobs, given, active, reading)
    fed = np.where(given == FREE, self._told, given)
    self._told = np.array(self.state.proposal)
    found = []
    for place, session in running:
      session.was_fed(fed[place])
      found.append((session, fed[place]))
      self._look_at(place, session)
    return found

  def _look_at(self, place: int, session: Session) -> None:
    """Ends a session that cannot go on."""
    if session.status == RUNNING and (self._told[place] == sampling.NOT_FINITE).any():
      session.end(NOT_FINITE)
    elif session.status == RUNNING and len(session.rows) >= self.max_rows:
      session.end("context is full")

  # What is handed in.

  def _by_stream(self, who, policies) -> list[Policy]:
    names = self.streams.names
    if isinstance(policies, Policy):
      policies = dict.fromkeys(names, policies)
    for name, policy in policies.items():
      self.streams.id(name)
      policy.check(f"{who}, stream {name!r}", self.model.vocab_size)
      if policy.remembers and not self._remembers:
        raise InputError(
          f"{who}, stream {name!r}: repetition_penalty or presence_penalty; expected an Engine "
          "made with remembers=True"
        )
    return [policies.get(name, _GREEDY) for name in names]

  def _checked(self, who, name, rows, lowest) -> np.ndarray:
    """Rows that are handed in, as int32."""
    rows = np.asarray(rows)
    S, V = len(self.streams), self.model.vocab_size
    whole = rows.ndim == 2 and rows.shape[1] == S and np.issubdtype(rows.dtype, np.integer)
    if not (whole and rows.min() >= lowest and rows.max() < V):
      free = "-2 (free), " if lowest == FREE else ""
      raise InputError(
        f"{who}: {name} of {rows.dtype}, shape {rows.shape}; expected integers [R, {S}], {free}-1 "
        f"(hole) to {V - 1}"
      )
    if len(rows) > self.max_rows:
      raise InputError(
        f"{who}: {name} of {len(rows)} rows; expected at most the {self.max_rows} of a context"
      )
    return rows.astype(np.int32)


def fill(engine: Engine, grid: np.ndarray, policy: Policy = _GREEDY, seed: int = 0) -> np.ndarray:
  """Returns int32 [N, R, S] with the `FREE` cells written by the model, a session for each of N.

  Free cells of a session's first row and those after a hole are silence, for there is nothing to
  write them from.

  Raises:
    InputError: a cell that is neither a token, a hole nor free.
    RunError: the model's logits are not finite.
  """
  stop = Stop(rows=grid.shape[1])
  sessions = [
    engine.join(policies=policy, seed=seed, number=n, stop=stop, script=rows)
    for n, rows in enumerate(grid)
  ]
  while engine.sessions:
    engine.step()
  for session in sessions:
    session.check()
  return np.stack([session.rows for session in sessions])


def _key(session: Session) -> jax.Array:
  """What all that is drawn in a session depends on."""
  return jax.random.fold_in(jax.random.key(session.seed), session.number)


def _bucket(rows: int) -> int:
  """The next power of two, so that prompts of like lengths share a program."""
  return 1 << (rows - 1).bit_length()
