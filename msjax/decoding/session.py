"""A session as its users hold it: what it is to read, how it is written, what came of it."""

import collections
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from msjax.decoding.look import Look
from msjax.decoding.policy import Policy
from msjax.decoding.stop import Ending, Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import StreamDecoder

WAITING, READING, RUNNING, PAUSED, ENDED = "waiting", "reading", "running", "paused", "ended"
NOT_FINITE = "logits are not finite"  # a reason to end
CONTEXT_FULL = "context is full"  # another


def plain(number: Any) -> int | float:
  """Makes JSON of a number of numpy's or jax's."""
  return number.item()


@dataclasses.dataclass(frozen=True)
class Slide:
  """What a session keeps when its context is full, instead of ending.

  The rows that are kept are read anew, as if they had been all; those between are forgotten. What
  policies count goes on.

  Attributes:
    first: of the session's rows.
    last: of its rows.
  """

  first: int
  last: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a session is told when it begins, and never again.

  Attributes:
    number: of the session; with the seed it says what is drawn.
    seed: see number.
    policies: by stream id.
    stop: when it ends.
    slide: what it keeps when its context is full; None: it ends.
    looks: how many of the likeliest tokens a look at each row tells; 0: no looks.
  """

  number: int
  seed: int
  policies: tuple[Policy, ...]
  stop: Stop
  slide: Slide | None
  looks: int

  def to_json(self, who: str) -> dict[str, Any]:
    """Returns what `from_json` reads; `who` is not to be written where there is a grammar."""
    if any(policy.grammar for policy in self.policies):
      raise InputError(f"{who}: has a grammar, which no file can hold; expected none")
    return {
      **dataclasses.asdict(dataclasses.replace(self, policies=())),
      "policies": [policy.to_json() for policy in self.policies],
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Setting":
    """Reads what `to_json` made, after it has been through JSON."""
    policies = tuple(map(Policy.from_json, data["policies"]))
    slide = data["slide"] and Slide(**data["slide"])
    return cls(**{**data, "policies": policies, "stop": Stop(**data["stop"]), "slide": slide})


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What an engine lets its sessions have.

  Attributes:
    vocab_size: V.
    max_rows: of a context.
    queue_limit: tokens that may wait in one stream.
    decoder: makes text of a stream's tokens; None: the engine knows no text.
  """

  vocab_size: int
  max_rows: int
  queue_limit: int
  decoder: Callable[[], StreamDecoder] | None


class Session:
  """One of the sessions of an `Engine`, which makes it and drives it.

  Attributes:
    setting: what it was told when it began.
    reason: why it has ended, else None.
    rows: of token ids, int32 [S] each, as they were fed.
    looks: by row, at what the model made it of, where asked for; see `Look`.
    events: all that was fed to it, in order; `msjax.decoding.log` says how.
    context: how many rows the model sees.
    place: where the engine has it, or None.
  """

  def __init__(self, setting: Setting, streams: Streams, bounds: Bounds):
    """Starts with nothing to read."""
    self.setting, self.streams, self._bounds = setting, streams, bounds
    self.reason: str | None = None
    self.place: int | None = None
    self.rows: list[np.ndarray] = []
    self.looks: dict[int, Look] = {}
    self.events: list[dict[str, Any]] = []
    self.context = 0
    self._block: collections.deque[np.ndarray] = collections.deque()  # rows to be read at once
    self._script: collections.deque[np.ndarray] = collections.deque()  # rows with FREE cells
    self._queues = [collections.deque() for _ in streams.names]
    self._ending = Ending(setting.stop, streams, bounds.decoder)
    self._is_paused = False
    idle = {"input": streams.silence_id}
    self._idle = np.array([idle.get(s.kind, FREE) for s in streams.streams], np.int32)
    self._inputs = list(streams.of_kind("input"))
    self._ends_block = False  # whether the next row that is fed does
    self._grammars = [s for s, policy in enumerate(setting.policies) if policy.grammar]
    self._said = {s: [] for s in self._grammars}  # tokens

  def __repr__(self) -> str:
    """Says which it is and how far."""
    return f"Session({self.number}, {self.reason or self.status}, row {len(self.rows)})"

  @property
  def number(self) -> int:
    """Of the session."""
    return self.setting.number

  @property
  def status(self) -> str:
    """`waiting` for a place, `reading` a block, `running`, `paused` or `ended`."""
    if self.reason is not None:
      return ENDED
    if self.place is None:
      return WAITING
    if len(self._block) > 1 or self.is_sliding:
      return READING
    return PAUSED if self._is_paused else RUNNING

  # What its users do.

  def say(self, stream: str, ids: Sequence[int]) -> None:
    """Appends tokens to an input stream; the first enters with the next row that is fed, or after
    what is read as a block and rows that were scripted."""
    self._append(self._input(stream), ids)

  def read(self, stream: str, ids: Sequence[int]) -> None:
    """Lets an input stream read tokens at once, after those that wait in it.

    They take a row each, in which all others are silent, and are fed many at a time.
    """
    s = self._input(stream)
    ids = [*self._queues[s], *self._checked(s, ids)]
    rows = np.full((len(ids), len(self.streams)), self.streams.silence_id, np.int32)
    rows[:, s] = ids
    self.read_rows(rows)
    self._queues[s].clear()

  def read_rows(self, rows: np.ndarray) -> None:
    """Lets it read rows int32 [R, S] at once, token ids and holes."""
    rows, most = self._checked_rows("block", rows, HOLE), self._bounds.max_rows
    slide = self.setting.slide
    kept = min(self.context, slide.first + slide.last) if slide else self.context
    left = most - kept - len(self._block)
    if len(rows) > left:
      raise InputError(
        f"{self._who}: block of {len(rows)} rows; expected at most {left}, for which there is room "
        f"in a context of {most}"
      )
    self._block.extend(rows)

  def follow(self, rows: np.ndarray) -> None:
    """Appends rows int32 [R, S] to what comes, `FREE` for what the model writes."""
    self._script.extend(self._checked_rows("script", rows, FREE))

  def force(self, stream: str, ids: Sequence[int]) -> None:
    """Writes tokens into a stream that the model else writes, from the next row on."""
    s = self.streams.id(stream)
    if s in self._inputs:
      raise InputError(f"{self._who}: stream {stream!r} is an input; say it")
    self._append(s, ids)

  def pause(self) -> None:
    """No row is fed until `resume`, but for blocks that are read."""
    self._is_paused = True

  def resume(self) -> None:
    """Goes on after `pause`."""
    self._is_paused = False

  def end(self, reason: str) -> None:
    """No row is fed any more."""
    self.reason = reason

  def check(self) -> None:
    """Raises for a session that the model broke off.

    Raises:
      RunError: its logits are not finite.
    """
    if self.reason == NOT_FINITE:
      raise RunError(
        f"{self._who}, row {len(self.rows)}: logits are not finite; are the parameters?"
      )

  # What its engine does.

  @property
  def ending(self) -> Ending:
    """What its rows have said so far about its end."""
    return self._ending

  @property
  def has_begun(self) -> bool:
    """Whether the devices know of it: it has been fed rows, or has a place and nothing to read."""
    return self.place is not None and (self.context > 0 or self.status != READING)

  @property
  def has_grammar(self) -> bool:
    """Whether a stream has one."""
    return bool(self._grammars)

  @property
  def needs_host(self) -> bool:
    """Whether the host has to see each row before the next."""
    return bool(self.setting.looks or self._grammars)

  @property
  def tokens_waiting(self) -> int:
    """Tokens that its streams have still to get, one a row."""
    return sum(map(len, self._queues))

  @property
  def speaks_next(self) -> bool:
    """Whether an input stream speaks in the next row, as far as is known."""
    if self._block or self._script:
      given = (self._block or self._script)[0][self._inputs]
      return bool(((given >= 0) & (given != self.streams.silence_id)).any())
    return any(self._queues[s] for s in self._inputs)

  def next_block(self, rows: int) -> np.ndarray:
    """Takes up to so many rows int32 [R, S] of what is read at once; the last is fed by a tick."""
    count = min(rows, len(self._block) - 1)
    return np.stack([self._block.popleft() for _ in range(count)])

  @property
  def block_rows(self) -> int:
    """Rows that `next_block` has left."""
    return max(len(self._block) - 1, 0)

  @property
  def is_sliding(self) -> bool:
    """Whether it has to forget rows before there is room for its next, or for its block."""
    needed = self.context + max(len(self._block), 1)
    return self.setting.slide is not None and needed > self._bounds.max_rows

  @property
  def is_ending_block(self) -> bool:
    """Whether the next row is the last of a block."""
    return len(self._block) == 1

  def coming_row(self) -> np.ndarray:
    """What is given of the next row, int32 [S]; `FREE` is the model's to write."""
    if self._block or self._script:
      return (self._block or self._script)[0]
    given = zip(self._queues, self._idle)
    return np.array([queue[0] if queue else idle for queue, idle in given], np.int32)

  def next_row(self) -> np.ndarray:
    """Takes `coming_row`."""
    if self._block:
      self._ends_block = True  # was_fed comes before the next of these
      return self._block.popleft()
    if self._script:
      return self._script.popleft()
    if not any(self._queues):
      return self._idle
    given = zip(self._queues, self._idle)
    return np.array([queue.popleft() if queue else idle for queue, idle in given], np.int32)

  def allowed_after(self, row: np.ndarray) -> dict[int, np.ndarray]:
    """By stream, what its grammar allows after a row int32 [S] that is going to be fed."""
    found = {}
    for s in self._grammars:
      said = self._said[s] if row[s] == HOLE else [*self._said[s], int(row[s])]
      allowed = self.setting.policies[s].grammar(said)
      if allowed is not None:
        found[s] = self._checked_mask(s, allowed)
    return found

  # Events, by which it has become what it is.

  def had_block(self, rows: np.ndarray) -> None:
    """Notes rows that were read at once."""
    self._take_in({"block": rows.tolist()})

  def was_fed(self, row: np.ndarray, given: np.ndarray, reading: bool) -> None:
    """Notes a row, what was given of it, and whether inputs were known to speak in the next; ends
    the session if it is the last."""
    event = {"row": row.tolist(), "given": given.tolist(), "reading": bool(reading)}
    if self._ends_block:
      event["ends_block"], self._ends_block = True, False
    self._take_in(event)

  def renumber(self, number: int) -> None:
    """Notes that it goes on under another number."""
    self.events.append({"number": [self.number, number]})
    self.setting = dataclasses.replace(self.setting, number=number)

  def slid(self) -> None:
    """Notes that it has forgotten rows."""
    self._take_in({"slide": dataclasses.asdict(self.setting.slide)})

  def _take_in(self, event: dict[str, Any]) -> None:
    self.events.append(event)
    if "slide" in event:
      self.context = event["slide"]["first"] + event["slide"]["last"]
    elif "block" in event:
      for row in event["block"]:
        self._note(row)
    elif "row" in event:
      self._note(event["row"])
      reason = (
        None if event.get("ends_block") else self._ending.after(self.rows[-1], len(self.rows))
      )
      if reason:
        self.end(reason)

  def _note(self, row: Sequence[int]) -> None:
    self.rows.append(np.array(row, np.int32))
    self.context += 1
    for s in self._grammars:
      if row[s] != HOLE:
        self._said[s].append(row[s])

  def to_json(self) -> dict[str, Any]:
    """Returns what `again` needs but for the setting: events, and what waits."""
    return {
      "events": list(self.events),
      "block": [row.tolist() for row in self._block],
      "script": [row.tolist() for row in self._script],
      "queues": [list(queue) for queue in self._queues],
      "paused": self._is_paused,
    }

  @classmethod
  def again(
    cls, setting: Setting, streams: Streams, bounds: Bounds, data: Mapping[str, Any]
  ) -> "Session":
    """Makes a session that has had the events of another; `data` is what `to_json` made."""
    session = cls(setting, streams, bounds)
    for event in data["events"]:
      session._take_in(event)
    rows = lambda found: [np.array(row, np.int32) for row in found]
    session._block.extend(rows(data["block"]))
    session._script.extend(rows(data["script"]))
    for queue, ids in zip(session._queues, data["queues"]):
      queue.extend(ids)
    session._is_paused, session.reason = data["paused"], None
    return session

  # What is handed in.

  @property
  def _who(self) -> str:
    return f"session {self.number}"

  def _input(self, stream: str) -> int:
    s = self.streams.id(stream)
    if s not in self._inputs:
      names = ", ".join(self.streams.names[i] for i in self._inputs)
      raise InputError(
        f"{self._who}: stream {stream!r} is written by the model; text goes into input streams "
        f"({names}), or is forced"
      )
    return s

  def _append(self, s: int, ids: Sequence[int]) -> None:
    if self.reason is not None:
      raise InputError(f"{self._who} has ended ({self.reason}); nothing is read any more")
    ids, limit, waiting = self._checked(s, ids), self._bounds.queue_limit, len(self._queues[s])
    if waiting + len(ids) > limit:
      raise InputError(
        f"{self._who}: stream {self.streams.names[s]!r}: {waiting} tokens wait to be read, "
        f"{len(ids)} more are over the limit of {limit}; wait, or read them as a block"
      )
    self._queues[s].extend(ids)

  def _checked(self, s: int, ids: Sequence[int]) -> list[int]:
    """Token ids that are handed in."""
    if isinstance(ids, str):
      raise InputError(f"{self._who}: {ids!r}: expected token ids; encode text first")
    V = self._bounds.vocab_size
    found = []
    for i in ids:
      try:
        found.append(operator.index(i))
      except TypeError:
        found.append(-1)
      if not 0 <= found[-1] < V:
        raise InputError(
          f"{self._who}: stream {self.streams.names[s]!r}: {i} is no token; expected 0 to {V - 1}"
        )
    return found

  def _checked_rows(self, name: str, rows: np.ndarray, lowest: int) -> np.ndarray:
    """Rows that are handed in, as int32."""
    rows = np.asarray(rows)
    S, V = len(self.streams), self._bounds.vocab_size
    if not rows.size:
      return np.zeros((0, S), np.int32)
    whole = rows.ndim == 2 and rows.shape[1] == S and np.issubdtype(rows.dtype, np.integer)
    if not (whole and rows.min() >= lowest and rows.max() < V):
      free = "-2 (free), " if lowest == FREE else ""
      raise InputError(
        f"{self._who}: {name} of {rows.dtype}, shape {rows.shape}; expected integers [R, {S}], "
        f"{free}-1 (hole) to {V - 1}"
      )
    return rows.astype(np.int32)

  def _checked_mask(self, s: int, allowed: np.ndarray) -> np.ndarray:
    """What a grammar says, as bool [V]."""
    allowed, V = np.asarray(allowed), self._bounds.vocab_size
    if not (allowed.shape == (V,) and allowed.dtype == bool and allowed.any()):
      raise InputError(
        f"{self._who}: stream {self.streams.names[s]!r}: its grammar gave {allowed.dtype}, shape "
        f"{allowed.shape}, {np.count_nonzero(allowed)} tokens; expected bool [{V}] with one or more"
      )
    return allowed
