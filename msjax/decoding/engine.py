"""Many live sessions of one model: they come and go, read and write, a row of each at a time.

The devices hold a fixed number of places. What a session reads at once, such as its prompt, it
reads by itself, some rows between two ticks of the others, and is then put into its place; ticks
take a row of every place, so that what a session writes does not depend on who has the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from msjax.decoding import sampling
from msjax.decoding import tick as tick_lib
from msjax.decoding.policy import Knobs, Policy, of_streams
from msjax.decoding.prepared import Prepared
from msjax.decoding.reader import Reader
from msjax.decoding.session import (
  CONTEXT_FULL,
  ENDED,
  NOT_FINITE,
  PAUSED,
  READING,
  RUNNING,
  WAITING,
  Bounds,
  Session,
  Setting,
  Slide,
)
from msjax.decoding.snapshot import Snapshot
from msjax.decoding.stop import Limits, Stop
from msjax.decoding.tick import FREE, NOT_FED, State
from msjax.errors import InputError, RunError
from msjax.mesh import check_sessions
from msjax.text.tokenizer import StreamDecoder

MAX_ROWS = 1 << 16  # of a context, where nothing else is said
_GREEDY, _NO_STOP = Policy(), Stop()
_AT_ONCE = 32  # rows that are read between two ticks

Fed = list[tuple[Session, np.ndarray]]


class Engine:
  """Up to B sessions; see the module.

  Attributes:
    model: prepared, on the mesh in use.
    streams: of the model.
    state: what the devices hold.
    rows_at_once: that a session reads between two ticks.
    remembers: whether policies may ask which tokens a stream has had.
    bounds: what it lets its sessions have.
    identity: says which model this is.
  """

  def __init__(
    self,
    model: Prepared,
    places: int = 1,
    rows: int = 64,
    max_rows: int = MAX_ROWS,
    rows_at_once: int | None = None,
    remembers: bool = False,
    queue_limit: int = 1 << 16,
    decoder: Callable[[], StreamDecoder] | None = None,
    identity: Callable[[], str] = lambda: "",
  ):
    """Makes room.

    Args:
      model: prepared, on the mesh in use.
      places: B, sessions that advance together; a multiple of the chips on `data`.
      rows: that there is room for to begin with; it doubles as sessions grow.
      max_rows: of a session's context.
      rows_at_once: that a session reads between two ticks of the others; None: as many as take
        about as long as a tick.
      remembers: whether policies may ask which tokens a stream has had.
      queue_limit: tokens that may wait in one stream of a session.
      decoder: makes text of a stream's tokens, for `Stop.texts`.
      identity: says which model this is, for logs and snapshots.

    Raises:
      InputError: a number below 1, or places that the mesh in use cannot deal out.
    """
    if rows_at_once is None:
      # Where arithmetic takes the time, as many cells as a tick has; else reading weights does.
      by_arithmetic = jax.default_backend() == "cpu" and places > 1
      rows_at_once = min(max(places, 4), _AT_ONCE) if by_arithmetic else _AT_ONCE
    sizes = {"places": places, "rows": rows, "max_rows": max_rows, "rows_at_once": rows_at_once}
    for name, size in sizes.items():
      if size < 1:
        raise InputError(f"{name}: {size}; expected 1 or more")
    check_sessions(model.trunk.cfg, places)
    self.model, self.streams = model, model.trunk.streams
    self.rows_at_once, self.remembers, self.identity = rows_at_once, remembers, identity
    self.bounds = Bounds(model.vocab_size, max_rows, queue_limit, decoder)
    self.state = tick_lib.room(model, places, min(rows, max_rows), remembers)
    self._told = np.full((places, len(self.streams)), self.streams.silence_id, np.int32)
    self._places: list[Session | None] = [None] * places
    self._waiting: list[Session] = []
    self._states: dict[Session, State] = {}  # of those waiting who have been here before
    self._reader: Reader | None = None
    self._knobs: Knobs | None = None
    self._numbers = 0

  @property
  def places(self) -> int:
    """B."""
    return len(self._places)

  @property
  def sessions(self) -> list[Session]:
    """All that have not ended, by number."""
    everyone = [*filter(None, self._places), *self._waiting]
    going_on = (session for session in everyone if session.status != ENDED)
    return sorted(going_on, key=lambda session: session.number)

  # Sessions come, and are copied.

  def join(
    self,
    prompt: np.ndarray | None = None,
    policies: Mapping[str, Policy] | Policy = _GREEDY,
    seed: int = 0,
    number: int | None = None,
    stop: Stop = _NO_STOP,
    script: np.ndarray | None = None,
    slide: Slide | None = None,
    looks: int = 0,
  ) -> Session:
    """Lets a session come; it gets the next free place.

    Args:
      prompt: rows int32 [R, S] that it reads first, token ids and holes; None for none.
      policies: by stream, others as by `Policy()`; or one for all.
      seed: with the number, and for each row and stream, says what is drawn.
      number: of the session; None: one more than the last.
      stop: when it ends.
      script: rows int32 [R, S] that come after the prompt: token ids, holes, and `FREE` for what
        the model writes.
      slide: what it keeps when its context is full; None: it ends.
      looks: how many of the likeliest tokens a look at each row tells; 0: no looks.

    Raises:
      InputError: a row that is none, more rows than the context has, an unknown stream, a policy
        out of range.
    """
    number = self._numbers if number is None else number
    setting = Setting(number, seed, self._by_stream(policies), stop, slide, looks)
    self._check(setting)
    session = Session(setting, self.streams, self.bounds)
    session.read_rows([] if prompt is None else prompt)
    session.follow([] if script is None else script)
    return self.admit(session)

  def admit(self, session: Session) -> Session:
    """Lets a session come that was made for this engine."""
    self._numbers = max(self._numbers, session.number + 1)
    self._waiting.append(session)
    return session

  def snapshot(self, session: Session) -> Snapshot:
    """Copies a session as it stands, with all that the devices know of it."""
    if session.status == ENDED:
      raise InputError(f"session {session.number} has ended ({session.reason}); nothing is kept")
    reader, state = self._reader, self._states.get(session)
    if reader and reader.session is session:
      state = reader.before or jax.tree.map(jnp.copy, reader.state)
    elif state is None and session.has_begun:
      state = tick_lib.take(self.model, self.state, np.int32(session.place))
    return Snapshot(session.setting, session.to_json(), state, self.identity())

  def restore(self, snapshot: Snapshot, number: int | None = None) -> Session:
    """Lets a session go on from a snapshot; under another number it goes on in its own way.

    Raises:
      InputError: a snapshot of another model.
    """
    snapshot.check(self.identity(), self.state)
    self._check(snapshot.setting)
    session = Session.again(snapshot.setting, self.streams, self.bounds, snapshot.session)
    if number is not None:
      self.renumber(session, number)
    if snapshot.state is not None:
      self._states[session] = snapshot.state
    return self.admit(session)

  def renumber(self, session: Session, number: int) -> None:
    """Lets a session go on in its own way from here: other numbers draw other tokens."""
    session.renumber(number)
    self._numbers = max(self._numbers, number + 1)
    if session.place is not None and session.status != READING:
      self._put(session, tick_lib.take(self.model, self.state, np.int32(session.place)))

  def fork(self, session: Session) -> Session:
    """Lets a copy of a session come, under a number of its own."""
    return self.restore(self.snapshot(session), self._numbers)

  def park(self, session: Session) -> Snapshot:
    """Takes a session out, to be restored some day."""
    snapshot = self.snapshot(session)
    session.end("parked")
    return snapshot

  # Time goes on.

  def step(self, rows: int = 1) -> Fed:
    """Feeds a row to every running session, and reads in some rows of one that has a block.

    Args:
      rows: up to so many rows of each are fed in one dispatch, which is quicker but hears what is
        said afterwards only; where a session has a grammar or is looked at, it is one at a time.

    Returns:
      The sessions with the rows int32 [S] that they were fed, token ids and holes; first rows
      first.
    """
    if rows < 1:
      raise InputError(f"rows: {rows}; expected 1 or more")
    self._let_go()
    self._seat()
    self._read()
    running = [s for s in self._places if s is not None and s.status == RUNNING]
    if any(session.needs_host for session in running):
      rows = 1
    fed = (self._tick if rows == 1 else functools.partial(self._ticks, rows))(running)
    for session in running:
      self._look_at(session)
    self._let_go()
    return fed

  def proposed(self, session: Session) -> np.ndarray:
    """What the model would write in the next row of a session that runs or is paused, int32 [S]."""
    if session.status not in (RUNNING, PAUSED):
      raise InputError(f"{session}: nothing is proposed yet; expected one that runs or is paused")
    return self._told[session.place].copy()

  def step_towards(self, session: Session, rows: int = 1) -> None:
    """Takes a step for the sake of a session; `rows` as for `step`.

    Raises:
      RunError: it waits for a place, and steps free none: those who have them are paused.
    """
    fed, standing = self.step(rows), (WAITING, PAUSED)
    if not fed and session.status == WAITING and all(s.status in standing for s in self.sessions):
      raise RunError(
        f"session {session.number}: waits for a place, and paused sessions have all "
        f"{self.places}; expected one that goes on or ends, or an Engine with more places"
      )

  def _let_go(self) -> None:
    """Frees the places of sessions that have ended."""
    for place, session in enumerate(self._places):
      if session is not None and session.status == ENDED:
        self._places[place], self._knobs, session.place = None, None, None
        if session.reason == NOT_FINITE:
          self._clean(place)
        if self._reader and self._reader.session is session:
          self._reader = None
    self._waiting = [session for session in self._waiting if session.status != ENDED]
    self._states = {s: state for s, state in self._states.items() if s.status != ENDED}

  def _clean(self, place: int) -> None:
    """Clears what would turn all that is multiplied with it into NaN, be it by nought."""
    room = self._room_for_one(1).grown(self.state.cache.capacity)
    room = dataclasses.replace(room, cache=room.cache.cut(self.state.cache.capacity))
    self.state = tick_lib.put(self.model, self.state, room, np.int32(place))

  def _seat(self) -> None:
    """Gives free places to those that wait."""
    while self._waiting and None in self._places:
      session = self._waiting.pop(0)
      place = self._places.index(None)
      self._places[place], self._knobs, session.place = session, None, place
      if session.status != READING:
        if (state := self._states.pop(session, None)) is not None:
          self._put(session, state)
        else:
          key = _key(session)
          self.state = tick_lib.begin(self.model, self.state, np.int32(place), key)
          self._told[place] = self.streams.silence_id

  # Reading at once.

  def _read(self) -> None:
    """Reads some rows of a session that has a block, and puts it into its place after the last."""
    if self._reader and self._reader.session.is_sliding and not self._reader.before:
      self._put(self._reader.session, self._reader.state)  # more came than there is room for
      self._reader = None
    if self._reader is None:
      reading = [s for s in self._places if s is not None and s.status == READING]
      if not reading:
        return
      self._reader = self._opened(min(reading, key=lambda session: session.number))
    self._reader.read()
    if self._reader.is_done:
      self._put(self._reader.session, self._reader.state)
      self._reader = None

  def _opened(self, session: Session) -> Reader:
    """Takes a session out of its place, to read by itself."""
    if session in self._states:
      before = jax.tree.map(jnp.copy, self._states.pop(session))
    elif session.has_begun:
      before = tick_lib.take(self.model, self.state, np.int32(session.place))
    else:
      before = self._room_for_one(session.block_rows)
    before = dataclasses.replace(before, keys=_key(session)[None])
    if not session.is_sliding:
      return Reader(self.model, session, before, self.rows_at_once, None)
    slide = session.setting.slide
    kept = [*session.rows[: slide.first], *session.rows[-slide.last :]]
    room = dataclasses.replace(self._room_for_one(len(kept)), keys=_key(session)[None])
    return Reader(self.model, session, room, self.rows_at_once, (kept, before))

  def _room_for_one(self, rows: int) -> State:
    rows = 1 << (rows + self.rows_at_once - 1).bit_length()  # so that like lengths share a program
    return tick_lib.room(self.model, 1, rows, self.remembers, None)

  def _put(self, session: Session, one: State) -> None:
    """Puts a session into its place."""
    self._grow((session.context + 1) * len(self.streams))
    cache = one.cache
    if cache.capacity > (room := self.state.cache.capacity):  # it had room for more than it read
      cache = cache.cut(room)
    one = dataclasses.replace(one, cache=cache, keys=_key(session)[None])
    self._told[session.place] = np.asarray(one.proposal)[0]
    self.state = tick_lib.put(self.model, self.state, one, np.int32(session.place))

  def _grow(self, cells: int) -> None:
    """Doubles the room until it has so many cells."""
    self.state = self.state.grown(cells)

  # Ticks.

  def _tick(self, running: list[Session]) -> Fed:
    """Feeds one row."""
    if not running:
      return []
    self._make_room(np.ones(self.places, int))
    given = np.full((self.places, len(self.streams)), self.streams.silence_id, np.int32)
    active, reading = np.zeros((2, self.places), bool)
    knobs, looks = self._with_grammars(running), max(s.setting.looks for s in running)
    for session in running:
      given[session.place], active[session.place] = session.next_row(), True
      reading[session.place] = session.speaks_next
    fed = np.where(given == FREE, self._told, given)
    self.state, look = tick_lib.tick(
      self.model, self.state, knobs, given, active, reading, looks=looks
    )
    self._told, look = jax.device_get((self.state.proposal, look))
    self._told = np.array(self._told)
    for session in running:
      place = session.place
      session.was_fed(fed[place], given[place], reading[place])
      if session.setting.looks:
        session.looks[len(session.rows)] = look.of(place, session.setting.looks)
    return [(session, fed[session.place]) for session in running]

  def _ticks(self, rows: int, running: list[Session]) -> Fed:
    """Feeds up to so many rows."""
    if not running:
      return []
    shape = self.places, rows, len(self.streams)
    given, reading = np.full(shape, self.streams.silence_id, np.int32), np.zeros(shape[:2], bool)
    allowed = np.zeros(self.places, np.int32)
    for session in running:
      place, most = session.place, self.bounds.max_rows - session.context
      if session.setting.stop.rows is not None:
        most = min(most, session.setting.stop.rows - len(session.rows))
      if session.is_ending_block:  # which ends no session here, but would there
        most = 1
      allowed[place] = min(rows, max(most, 1))
      for n in range(allowed[place]):
        given[place, n], reading[place, n] = session.next_row(), session.speaks_next
    self._make_room(np.minimum(allowed + 1, rows))
    endings = [session and session.ending for session in self._places]
    limits = Limits.of(endings, allowed, self.streams)
    knobs = self._all_knobs()
    self.state, told = tick_lib.ticks(self.model, self.state, knobs, limits, given, reading)
    told = np.concatenate([self._told[:, None], np.asarray(told)], axis=1)
    fed = np.where(given == FREE, told[:, :-1], given)
    found = []
    for n in range(rows):
      for session in running:
        place = session.place
        if session.status != ENDED and told[place, n + 1, 0] != NOT_FED:
          session.was_fed(fed[place, n], given[place, n], reading[place, n])
          self._told[place] = told[place, n + 1]
          found.append((session, fed[place, n]))
    return found

  def _make_room(self, rows: np.ndarray) -> None:
    """Sees to it that there is room for so many rows [B] more."""
    # A tick writes into places that do not run, too, where their next row is going to be; where the
    # context is full, into its last row, which no one sees any more.
    needed = max(s.context + max(rows[s.place], 1) for s in self._places if s)
    self._grow(int(min(needed, self.bounds.max_rows)) * len(self.streams))

  def _all_knobs(self) -> Knobs:
    if self._knobs is None:
      idle = [_GREEDY] * len(self.streams)
      of = [session.setting.policies if session else idle for session in self._places]
      self._knobs = jax.tree.map(jnp.asarray, Knobs.of(of))
    return self._knobs

  def _with_grammars(self, running: list[Session]) -> Knobs:
    """Policies, with what grammars allow after the next rows; none is taken yet: they may raise."""
    knobs = self._all_knobs()
    fed = lambda row, place: np.where(row == FREE, self._told[place], row)
    asked = {s: s.allowed_after(fed(s.coming_row(), s.place)) for s in running if s.has_grammar}
    if not any(asked.values()):
      return knobs
    V = len(self.model.unembed)
    allowed = np.ones((self.places, len(self.streams), V), bool)
    for session, by_stream in asked.items():
      for s, mask in by_stream.items():
        allowed[session.place, s, : len(mask)] = mask
    return dataclasses.replace(knobs, allowed=allowed)

  def _look_at(self, session: Session) -> None:
    """Ends a session that cannot go on."""
    if session.status == ENDED:
      return
    if (self._told[session.place] == sampling.NOT_FINITE).any():
      session.end(NOT_FINITE)
    elif session.context >= self.bounds.max_rows and not session.setting.slide:
      session.end(CONTEXT_FULL)

  # What is handed in.

  def _by_stream(self, policies) -> tuple[Policy, ...]:
    by_name = of_streams(policies, self.streams, _GREEDY)
    return tuple(by_name[name] for name in self.streams.names)

  def _check(self, setting: Setting) -> None:
    """Refuses what is out of range, or what this engine has not."""
    who, most = f"session {setting.number}", self.bounds.max_rows
    for name, policy in zip(self.streams.names, setting.policies):
      policy.check(f"{who}, stream {name!r}", self.model.vocab_size)
      if policy.remembers and not self.remembers:
        raise InputError(
          f"{who}, stream {name!r}: repetition_penalty or presence_penalty; expected an Engine "
          "made with remembers=True"
        )
    setting.stop.check(who, self.streams)
    if setting.stop.texts and self.bounds.decoder is None:
      raise InputError(f"{who}: stop.texts {setting.stop.texts}; expected an Engine with a decoder")
    slide = setting.slide
    if slide and not (slide.first >= 0 < slide.last and slide.first + slide.last < most):
      raise InputError(
        f"{who}: {slide}; expected the last row at least, and together fewer than the {most} of a "
        "context"
      )
    if setting.looks < 0:
      raise InputError(f"{who}: looks: {setting.looks}; expected 0 (none) or more")


def fill(engine: Engine, grid: np.ndarray, policy: Policy = _GREEDY, seed: int = 0) -> np.ndarray:
  """Returns int32 [N, R, S] with the `FREE` cells written by the model, a session for each of N.

  Free cells of a session's first row and those after a hole are silence, for there is nothing to
  write them from.

  Raises:
    InputError: a cell that is neither a token, a hole nor free; more rows than a context has.
    RunError: the model's logits are not finite; no place gets free.
  """
  if grid.shape[1] > engine.bounds.max_rows:
    raise InputError(
      f"grid: {grid.shape[1]} rows; expected at most the {engine.bounds.max_rows} of a context"
    )
  stop = Stop(rows=grid.shape[1])
  sessions = [
    engine.join(policies=policy, seed=seed, number=n, stop=stop, script=rows)
    for n, rows in enumerate(grid)
  ]
  for session in sessions:
    while session.status != ENDED:
      engine.step_towards(session, _FILLED_AT_ONCE)
    session.check()
  return np.stack([session.rows for session in sessions])


_FILLED_AT_ONCE = 16


def _key(session: Session) -> jax.Array:
  """What all that is drawn in a session depends on."""
  return jax.random.fold_in(jax.random.key(session.setting.seed), session.number)
