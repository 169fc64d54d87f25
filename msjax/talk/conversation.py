"""Text in, rows of text out: one conversation, or many of them side by side."""

import collections
import dataclasses
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from msjax.decoding.engine import MAX_ROWS, Engine
from msjax.decoding.policy import Policy
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError
from msjax.streams import Streams

if TYPE_CHECKING:
  from msjax.model import Model

QUIET_ROWS = 4  # with no row count given, a conversation ends after so many rows of silence
_LONGEST_ANSWER = 256  # rows after the last given token, with no row count given
_ROWS_AT_ONCE = 16  # in one dispatch, where nobody waits for each


class Row(NamedTuple):
  """One row.

  Attributes:
    index: from 0.
    tokens: id by stream name.
    text: by stream name, what became readable with this row; silence adds nothing.
  """

  index: int
  tokens: dict[str, int]
  text: dict[str, str]


class Texts:
  """Makes text of a session's rows, as they come."""

  def __init__(self, model: "Model"):
    """Before the first row."""
    self._names = model.streams.names
    self._decoders = [model.tokenizer.stream_decoder() for _ in self._names]
    self._index = 0

  def row(self, tokens: np.ndarray, is_last: bool) -> Row:
    """The next row, int32 [S]; with the last comes what is left of half characters."""
    ids = [int(i) for i in tokens]
    text = [d.push(i) + (d.flush() if is_last else "") for d, i in zip(self._decoders, ids)]
    self._index += 1
    return Row(self._index - 1, dict(zip(self._names, ids)), dict(zip(self._names, text)))


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is said to a model.

  Attributes:
    inputs: text by input stream, read from row 0 on.
    at: (row, input stream, text): read from that row on; where the stream is still being read,
      right after.
    rows: how many to make; None: until the text is read and four rows passed in silence.
  """

  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  at: Sequence[tuple[int, str, str]] = ()
  rows: int | None = None

  @classmethod
  def of(cls, found: "Prompt | Mapping[str, Any]") -> "Prompt":
    """Makes one of its fields.

    Raises:
      InputError: other fields, or something else.
    """
    if isinstance(found, cls):
      return found
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(found, Mapping) or set(found) - set(names):
      raise InputError(f"prompt: {found!r:.80}; expected a Prompt, or a dict of {', '.join(names)}")
    return cls(**found)

  def schedule(self, model: "Model") -> "Schedule":
    """Returns which tokens are read when.

    Raises:
      InputError: an unknown stream, one that is no input, a row that is never reached, more rows
        than a context has.
    """
    if self.rows is not None and not (isinstance(self.rows, numbers.Integral) and self.rows >= 1):
      raise InputError(f"rows: {self.rows!r}; expected 1 or more")
    if not isinstance(self.inputs, Mapping):
      raise InputError(
        f"inputs: {self.inputs!r}; expected text by stream, as in {{'user': 'hello'}}"
      )
    schedule = Schedule(model.streams)
    given = [(0, stream, text) for stream, text in self.inputs.items()]
    given = [(row, stream, model.said(text)) for row, stream, text in (*given, *_placed(self.at))]
    for row, stream, ids in sorted(given, key=lambda g: g[0]):  # no text is cut by an earlier one
      schedule.put(row, stream, ids)
    for name, count in (("text", schedule.rows), ("rows", self.rows or 0)):
      if count > MAX_ROWS:
        raise InputError(f"{name}: {count} rows; expected at most the {MAX_ROWS} of a context")
    if self.rows is not None and schedule.rows > self.rows:
      raise InputError(
        f"rows: {self.rows} end before the given text, which takes {schedule.rows} rows"
      )
    return schedule


class Conversation:
  """A session that reads a prompt, and what it says.

  Attributes:
    session: of the engine.
  """

  def __init__(
    self,
    model: "Model",
    engine: Engine,
    schedule: "Schedule",
    rows: int | None,
    **options: Any,
  ):
    """Joins an engine of the model; options are those of `Engine.join`."""
    self._model, self._schedule, self._may_end = model, schedule, rows is None
    self._limit = limit_of(schedule, rows)
    script = np.stack([schedule.row(r) for r in range(self._limit)])
    self.session = engine.join(script=script, stop=Stop(rows=self._limit), **options)
    self._texts = Texts(model)
    self._told = self._quiet = 0

  def rows(self) -> Iterator[Row]:
    """Yields the rows since the last time; ends the session where nothing more is said.

    Raises:
      RunError: the model's logits are not finite.
    """
    self.session.check()
    while self._told < len(self.session.rows) and not self.is_over:
      row = self.session.rows[self._told]
      hushed = self._told >= self._schedule.rows and is_hushed(self._model, row)
      self._quiet = self._quiet + 1 if hushed else 0
      self._told += 1
      yield self._texts.row(row, self.is_over)
    if self.is_over and self.session.reason is None:
      self.session.end("silence")

  @property
  def is_over(self) -> bool:
    """Whether the last row is told."""
    session = self.session
    ended = session.reason is not None and self._told == len(session.rows)
    return ended or self._told == self._limit or (self._may_end and self._quiet == QUIET_ROWS)

  @property
  def reason(self) -> str:
    """Why it is over."""
    if self._quiet == QUIET_ROWS and self._may_end:
      return "silence"
    return "rows" if self._told == self._limit else str(self.session.reason)


def limit_of(schedule: "Schedule", rows: int | None) -> int:
  """How many rows a conversation has at most."""
  return schedule.rows + _LONGEST_ANSWER if rows is None else rows


def begun(model: "Model", prompt: Prompt, policies: Any, seed: int) -> tuple[Engine, Conversation]:
  """Returns an engine with one conversation."""
  schedule = prompt.schedule(model)
  engine = model.engine(
    rows=2 ** math.ceil(math.log2(limit_of(schedule, prompt.rows))),  # like lengths share a program
    remembers=remembers(policies),
  )
  options = {"policies": policies, "seed": seed}
  return engine, Conversation(model, engine, schedule, prompt.rows, **options)


def is_hushed(model: "Model", row: np.ndarray) -> bool:
  """Whether nothing that the model writes says anything in a row int32 [S]; ends are nothing."""
  hushed = model.streams.silence_id, model.tokenizer.end_id
  return all(row[s] in hushed for s in model.streams.of_kind("output", "internal"))


def answers(
  model: "Model", prompts: Iterable[tuple[int, Prompt]], places: int, policies: Any, seed: int
) -> Iterator[tuple[int, list[Row], str]]:
  """Lets many conversations go on side by side.

  Args:
    model: that is talked to.
    prompts: with the number of each, on which depends what is drawn.
    places: conversations at a time.
    policies: as for `Engine.join`.
    seed: likewise.

  Yields:
    The number, the rows and why they end, of each when it is over.

  Raises:
    InputError: a prompt that is none.
    RunError: the model's logits are not finite.
  """
  engine = model.engine(places, remembers=remembers(policies))
  waiting, going_on = iter(prompts), collections.OrderedDict()
  while True:
    while len(going_on) < places and (found := next(waiting, None)):
      number, prompt = found
      options = {"policies": policies, "seed": seed, "number": number}
      try:
        schedule = prompt.schedule(model)
      except InputError as error:
        raise InputError(f"prompt {number}: {error}") from None
      going_on[number] = Conversation(model, engine, schedule, prompt.rows, **options), []
    if not going_on:
      return
    engine.step(rows=_ROWS_AT_ONCE)
    for number, (conversation, rows) in list(going_on.items()):
      rows += conversation.rows()
      if conversation.is_over:
        del going_on[number]
        yield number, rows, conversation.reason


def remembers(policies: Mapping[str, Policy] | Policy) -> bool:
  """Whether an engine has to remember tokens for these."""
  found = [policies] if isinstance(policies, Policy) else policies.values()
  return any(policy.remembers for policy in found)


def _placed(at: Iterable[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
  """Checks what is said later."""
  if not isinstance(at, (tuple, list)):
    raise InputError(f"at: {at!r}; expected a list of (row, stream, text)")
  found = []
  for given in at:
    if not (isinstance(given, (tuple, list)) and len(given) == 3):
      raise InputError(f"at: {given!r}; expected tuples (row, stream, text)")
    row, stream, _ = given
    if not (isinstance(row, int) and row >= 0):
      raise InputError(f"row {row!r} for stream {stream!r}: expected a whole number, 0 or more")
    found.append(tuple(given))
  return found


class Schedule:
  """Which tokens the input streams get in which row.

  A model without input streams, such as a plain language model, is given text in any stream.
  """

  def __init__(self, streams: Streams):
    """Starts empty."""
    self.streams = streams
    self._cells: list[dict[int, int]] = [{} for _ in streams.names]  # token by row

  def put(self, row: int, stream: str, ids: list[int]) -> None:
    """Appends tokens to a stream from `row` on, or from where it has been read to."""
    s, inputs = self.streams.id(stream), self.streams.of_kind("input")
    if inputs and s not in inputs:
      names = ", ".join(self.streams.names[i] for i in inputs)
      raise InputError(
        f"stream {stream!r}: the model writes it; text can be put into input streams: {names}"
      )
    cells = self._cells[s]
    for id in ids:
      while row in cells:
        row += 1
      cells[row] = id

  @property
  def rows(self) -> int:
    """Rows up to the last given token, at least 1."""
    return max((max(cells) + 1 for cells in self._cells if cells), default=1)

  def row(self, index: int) -> np.ndarray:
    """Returns int32 [S]: given tokens, silence in idle input streams, FREE elsewhere."""
    idle = {"input": self.streams.silence_id}
    return np.array(
      [
        cells.get(index, idle.get(stream.kind, FREE))
        for stream, cells in zip(self.streams.streams, self._cells)
      ],
      np.int32,
    )
