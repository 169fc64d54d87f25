"""A session as its users hold it: what it is to read, how it is written, when it stops."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from msjax.decoding.policy import Policy
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.streams import HOLE, Streams

WAITING, RUNNING, PAUSED, ENDED = "waiting", "running", "paused", "ended"
NOT_FINITE = "logits are not finite"  # a reason to end


@dataclasses.dataclass(frozen=True)
class Stop:
  """When a session ends; it ends with the row in which one of these first holds.

  Attributes:
    rows: it has so many; None: when the context is full.
    end_id: a token that ends it, in the streams of `end_streams`.
    end_streams: names.
    silent_rows: so many rows in a row in which no stream spoke; 0: never.
    tokens: a stream has spoken so many, by name.
  """

  rows: int | None = None
  end_id: int | None = None
  end_streams: Sequence[str] = ()
  silent_rows: int = 0
  tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Session:
  """One of the sessions of an `Engine`, which makes it and drives it.

  Attributes:
    number: of the session; with the seed it says what is drawn.
    seed: see number.
    status: `waiting` to be read in, `running`, `paused` or `ended`.
    reason: why it has ended, else None.
    rows: of token ids, int32 [S] each, as they were fed.
    policies: by stream id.
  """

  def __init__(
    self,
    streams: Streams,
    vocab_size: int,
    number: int,
    seed: int,
    policies: Sequence[Policy],
    stop: Stop,
    queue_limit: int,
  ):
    """Starts with nothing to read."""
    self.streams, self.number, self.seed = streams, number, seed
    self.policies, self.stop = tuple(policies), stop
    self.status, self.reason = WAITING, None
    self.rows: list[np.ndarray] = []
    self.unread: collections.deque[np.ndarray] = collections.deque()  # whole rows, read in blocks
    self.script: collections.deque[np.ndarray] = (
      collections.deque()
    )  # rows to come, with FREE cells
    self._vocab_size, self._queue_limit = vocab_size, queue_limit
    self._queues = [collections.deque() for _ in streams.names]
    self._silent_rows = 0
    self._spoken = np.zeros(len(streams), int)

  def __repr__(self) -> str:
    """Says which it is and how far."""
    return f"Session({self.number}, {self.reason or self.status}, row {len(self.rows)})"

  def say(self, stream: str, ids: Sequence[int]) -> None:
    """Appends tokens to an input stream; the first enters with the next row that is fed."""
    s = self.streams.id(stream)
    if s not in self.streams.of_kind("input"):
      names = ", ".join(self.streams.names[i] for i in self.streams.of_kind("input"))
      raise InputError(
        f"session {self.number}: stream {stream!r} is written by the model; text goes into input "
        f"streams ({names}), or is forced"
      )
    self._append(s, ids)

  def force(self, stream: str, ids: Sequence[int]) -> None:
    """Writes tokens into a stream that the model else writes, from the next row on."""
    s = self.streams.id(stream)
    if s in self.streams.of_kind("input"):
      raise InputError(f"session {self.number}: stream {stream!r} is an input; say it")
    self._append(s, ids)

  def _append(self, s, ids):
    if isinstance(ids, str):
      raise InputError(f"session {self.number}: {ids!r}: expected token ids; encode text first")
    name, wrong = self.streams.names[s], [i for i in ids if not 0 <= i < self._vocab_size]
    if wrong:
      raise InputError(
        f"session {self.number}: stream {name!r}: {wrong[0]} is no token; expected 0 to "
        f"{self._vocab_size - 1}"
      )
    if len(self._queues[s]) + len(ids) > self._queue_limit:
      raise InputError(
        f"session {self.number}: stream {name!r}: {len(self._queues[s])} tokens wait to be read, "
        f"{len(ids)} more are over the limit of {self._queue_limit}; wait, or read them as a block"
      )
    self._queues[s].extend(int(i) for i in ids)

  def pause(self) -> None:
    """No row is fed until `resume`."""
    if self.status == RUNNING:
      self.status = PAUSED

  def resume(self) -> None:
    """Goes on after `pause`."""
    if self.status == PAUSED:
      self.status = RUNNING

  def end(self, reason: str) -> None:
    """No row is fed any more."""
    self.status, self.reason = ENDED, reason

  def check(self) -> None:
    """Raises for a session that the model broke off.

    Raises:
      RunError: its logits are not finite.
    """
    if self.reason == NOT_FINITE:
      raise RunError(
        f"session {self.number}, row {len(self.rows)}: logits are not finite; are the parameters?"
      )

  @property
  def speaks_next(self) -> bool:
    """Whether an input stream speaks in the next row, as far as is known."""
    inputs = list(self.streams.of_kind("input"))
    if self.script:
      given = self.script[0][inputs]
      return bool(((given >= 0) & (given != self.streams.silence_id)).any())
    return any(self._queues[s] for s in inputs)

  def next_row(self) -> np.ndarray:
    """Takes what is given of the next row, int32 [S]; `FREE` is the model's to write."""
    if self.script:
      return self.script.popleft()
    idle = {"input": self.streams.silence_id}
    return np.array(
      [
        queue.popleft() if queue else idle.get(stream.kind, FREE)
        for queue, stream in zip(self._queues, self.streams.streams)
      ],
      np.int32,
    )

  def was_fed(self, row: np.ndarray) -> None:
    """Notes a row, and ends the session if it is the last."""
    self.rows.append(row)
    spoke = (row != self.streams.silence_id) & (row != HOLE)
    self._spoken += spoke
    self._silent_rows = 0 if spoke.any() else self._silent_rows + 1
    stop, name = self.stop, self.streams.id
    if any(row[name(stream)] == stop.end_id for stream in stop.end_streams):
      self.end("end token")
    elif stop.silent_rows and self._silent_rows >= stop.silent_rows:
      self.end("silence")
    elif any(self._spoken[name(stream)] >= most for stream, most in stop.tokens.items()):
      self.end("tokens")
    elif stop.rows is not None and len(self.rows) >= stop.rows:
      self.end("rows")
