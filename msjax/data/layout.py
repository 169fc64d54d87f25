"""From messages to spans to tables: which token stands in which row of which stream.

A layout gives every message of a conversation its first row:

  turn        one message after another; who answers starts as soon as the end can be known.
  wait_k      an answer starts k rows after its question has started, and runs beside it.
  timestamps  a message ends in the row of the moment it was sent.

Streams that a record lacks are holes; what its own streams leave free is silence.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from msjax.data.formats import (
  LEVELS,
  Conversation,
  Message,
  Record,
  RecordStream,
  Script,
  Span,
  Table,
  Where,
)
from msjax.errors import InputError, nearest
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import Tokenizer

LAYOUTS = {"turn": (), "wait_k": ("wait_k",), "timestamps": ("rows_per_second", "max_pause")}
MAX_ROWS = 2**20  # of one record; more is a slip of units, not data
_ROLES = {"assistant": "output", "user": "input", "human": "input"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How messages are placed.

  Attributes:
    name: `turn`, `wait_k` or `timestamps`.
    wait_k: rows from the start of a question to its answer; 0: the least possible.
    rows_per_second: timestamps: how fast rows pass.
    max_pause: timestamps: longer pauses between messages are cut to this many seconds.
    end_token: whether <end> follows each message.
  """

  name: str = "turn"
  wait_k: int = 0
  rows_per_second: float = 1.0
  max_pause: float = 8.0
  end_token: bool = True

  def __post_init__(self):
    """Checks every field."""
    if self.name not in LAYOUTS:
      raise InputError(
        f"layout: {self.name!r} is none of {', '.join(LAYOUTS)}{nearest(self.name, LAYOUTS)}"
      )
    if self.wait_k < 0:
      raise InputError(
        f"wait_k: {self.wait_k} is negative; expected rows, or 0 for the least possible"
      )
    if not 0 < self.rows_per_second < math.inf:
      raise InputError(f"layout rows_per_second: {self.rows_per_second}; expected more than 0")
    if not self.max_pause > 0:
      raise InputError(f"layout max_pause: {self.max_pause}; expected seconds, more than 0")

  def wait(self, streams: Streams) -> int:
    """Returns k, or raises where no answer can be known so early under the streams' rule."""
    if 0 < self.wait_k < streams.lag:
      raise InputError(
        f"wait_k: {self.wait_k} is too early: with same_row={streams.same_row} a cell can answer "
        f"what stands {streams.lag} rows before it; expected at least {streams.lag}"
      )
    return self.wait_k or streams.lag


def convert(
  record: Record, to: str, streams: Streams, tokenizer: Tokenizer, layout: Layout
) -> Record:
  """Turns a record into the same or a later level: `messages`, `spans` or `table`."""
  if to not in LEVELS:
    raise InputError(f"level {to!r} is none of {', '.join(LEVELS)}{nearest(to, LEVELS)}")
  levels = list(LEVELS)
  if levels.index(record.level) > levels.index(to):
    raise InputError(
      f"{record.where}: {record.level} cannot be turned back into {to}; "
      f"expected {' or '.join(levels[: levels.index(to) + 1])}"
    )
  if to == "table":
    return to_table(record, streams, tokenizer, layout)
  return record if record.level == to else to_script(record, streams, tokenizer, layout)


def to_script(
  conversation: Conversation, streams: Streams, tokenizer: Tokenizer, layout: Layout
) -> Script:
  """Gives every message its row.

  Raises:
    RecordError: a role without a stream, an unknown stream, times missing or running backwards.
    InputError: `wait_k` with a k that the rule of the streams makes impossible.
  """
  return _place(conversation, streams, tokenizer, layout)[0]


def to_table(record: Record, streams: Streams, tokenizer: Tokenizer, layout: Layout) -> Table:
  """Turns a record of any level into a table with a column for each of the run's streams.

  Raises:
    RecordError: besides those of `to_script`: overlapping spans, streams the run does not have or
      has as another kind, a token id outside the vocabulary, too many rows.
  """
  if isinstance(record, Table):
    return _aligned(record, streams, tokenizer.vocab_size)
  if isinstance(record, Conversation):
    return _fill(*_place(record, streams, tokenizer, layout), streams)
  encoded = [
    _encode(s.text, s.end, tokenizer, record.where, f"spans[{i}].text")
    for i, s in enumerate(record.spans)
  ]
  return _fill(record, encoded, streams)


def _encode(text: str, end: bool, tokenizer: Tokenizer, where: Where, field: str) -> list[int]:
  """Returns the tokens of a text, at least one, and <end> if it has one."""
  try:
    ids = tokenizer.encode(text)
  except InputError as error:
    raise where.error(field, str(error)) from None
  if not ids:
    raise where.error(field, f"{text!r} gives no tokens; expected some text")
  return [*ids, tokenizer.end_id] if end else ids


# Messages to spans.


def _place(
  conversation: Conversation, streams: Streams, tokenizer: Tokenizer, layout: Layout
) -> tuple[Script, list[list[int]]]:
  """Returns the spans of a conversation and the tokens of each, so that text is encoded once."""
  messages, where = conversation.messages, conversation.where
  ids = [_stream_id(m, streams, conversation, i) for i, m in enumerate(messages)]
  encoded = [
    _encode(m.content, layout.end_token, tokenizer, where, f"messages[{i}].content")
    for i, m in enumerate(messages)
  ]
  lengths = [len(e) for e in encoded]
  if layout.name == "turn":
    rows = _turn(ids, lengths, streams)
  elif layout.name == "wait_k":
    rows = _wait_k(ids, lengths, streams, layout.wait(streams))
  else:
    rows = _timestamps(ids, lengths, _timeline(conversation, layout.max_pause), layout)
  spans = tuple(
    Span(streams.names[s], row, m.content, end=layout.end_token)
    for s, row, m in zip(ids, rows, messages)
  )
  named = tuple(RecordStream(streams.names[s], streams.streams[s].kind) for s in sorted(set(ids)))
  return Script(named, spans, conversation.id, conversation.meta, where), encoded


def _stream_id(message: Message, streams: Streams, conversation: Conversation, index: int) -> int:
  """The stream of a message: the one it names, else its role's, else the first of that kind."""
  names, error = streams.names, conversation.where.error
  if message.stream is not None:
    if message.stream not in names:
      raise error(
        f"messages[{index}].stream",
        f"{message.stream!r} is none of this run's streams ({', '.join(names)})"
        f"{nearest(message.stream, names)}",
      )
    return names.index(message.stream)
  if message.role in names:
    return names.index(message.role)
  of_kind = streams.of_kind(_ROLES[message.role]) if message.role in _ROLES else ()
  if not of_kind:
    known = [*names, *(role for role, kind in _ROLES.items() if streams.of_kind(kind))]
    raise error(
      f"messages[{index}].role",
      f"{message.role!r} has no stream among {', '.join(map(str, streams.streams))}; expected a "
      f"stream of that name or a 'stream' in the message{nearest(message.role, known)}",
    )
  return of_kind[0]


def _turn(ids: Sequence[int], lengths: Sequence[int], streams: Streams) -> list[int]:
  """First rows of messages said one after another.

  An input, or more of the same stream, follows in the next row; whoever answers another stream has
  to see its last token first, which takes the lag of the rule.
  """
  rows: list[int] = []
  for i, stream in enumerate(ids):
    if not i:
      rows.append(0)
      continue
    fed = stream in streams.of_kind("input")  # from outside: no rule holds it back
    lag = 1 if fed else streams.lag_between(ids[i - 1], stream)
    rows.append(rows[-1] + lengths[i - 1] - 1 + lag)
  return rows


def _wait_k(ids: Sequence[int], lengths: Sequence[int], streams: Streams, k: int) -> list[int]:
  """First rows where answers start k rows after the start of their question.

  An exchange is a run of messages of input streams and the others up to the next input. Messages
  of one stream queue; the next exchange begins when all of this one has ended.
  """
  inputs = streams.of_kind("input")
  rows: list[int] = []
  start, free = 0, {}  # first row of the exchange; next free row of each of its streams
  for i, (stream, length) in enumerate(zip(ids, lengths)):
    if i and stream in inputs and ids[i - 1] not in inputs:
      start, free = max(free.values()), {}
    rows.append(free.get(stream, start if stream in inputs else start + k))
    free[stream] = rows[-1] + length
  return rows


def _timestamps(
  ids: Sequence[int], lengths: Sequence[int], timeline: Sequence[float], layout: Layout
) -> list[int]:
  """First rows where messages end when they were sent; those that would collide queue up."""
  rows: list[int] = []
  free: dict[int, int] = {}  # next free row of each stream
  for stream, length, seconds in zip(ids, lengths, timeline):
    sent = math.floor(seconds * layout.rows_per_second)
    rows.append(max(sent - length + 1, free.get(stream, sent - length + 1)))
    free[stream] = rows[-1] + length
  return [row - min(rows) for row in rows]


def _timeline(conversation: Conversation, max_pause: float) -> list[float]:
  """Seconds from the first message to each, long pauses cut."""
  seconds = [0.0]
  for i, message in enumerate(conversation.messages):
    field = f"messages[{i}].time"
    if message.time is None:
      raise conversation.where.error(field, "missing; layout timestamps needs when it was sent")
    if not i:
      continue
    before = conversation.messages[i - 1].time
    if message.time < before:
      raise conversation.where.error(
        field, f"{message.time} runs backwards; expected {before}, of the message before, or later"
      )
    seconds.append(seconds[-1] + min(message.time - before, max_pause))
  return seconds


# Spans to table.


def _fill(script: Script, encoded: Sequence[Sequence[int]], streams: Streams) -> Table:
  """Puts the tokens of every span into a grid of silence."""
  columns = _columns(script, streams)
  ends = [span.row + len(tokens) for span, tokens in zip(script.spans, encoded)]
  _check_spans(script, ends)
  tokens = np.full((max(ends), len(streams)), HOLE, np.int32)
  tokens[:, list(columns.values())] = streams.silence_id
  weights = np.ones(tokens.shape, np.float32)
  for span, end, ids in zip(script.spans, ends, encoded):
    tokens[span.row : end, columns[span.stream]] = ids
    weights[span.row : end, columns[span.stream]] = span.loss
  return Table(tokens, weights, _all(streams), script.id, script.meta, script.where)


def _check_spans(script: Script, ends: Sequence[int]) -> None:
  """Raises where a span ends too far down or overlaps another."""
  before: dict[str, int] = {}  # the span before, in each stream
  for i in sorted(range(len(ends)), key=lambda i: (script.spans[i].row, i)):
    span, error = script.spans[i], script.where.error
    if ends[i] > MAX_ROWS:
      raise error(
        f"spans[{i}].row",
        f"ends in row {ends[i] - 1}; a record may have {MAX_ROWS} rows (with layout timestamps, "
        "times are seconds and max_pause shortens pauses)",
      )
    j = before.get(span.stream)
    if j is not None and ends[j] > span.row:
      raise error(
        f"spans[{i}]",
        f"rows {span.row} to {ends[i] - 1} of stream {span.stream!r} overlap spans[{j}] in rows "
        f"{script.spans[j].row} to {ends[j] - 1}; expected row {ends[j]} or later",
      )
    before[span.stream] = i


def _aligned(table: Table, streams: Streams, vocab_size: int) -> Table:
  """Checks the ids of a table and sorts its columns by the run's stream ids."""
  outside = table.tokens >= vocab_size
  if outside.any():
    s, r = np.argwhere(outside.T)[0]
    raise table.where.error(
      f"token_ids[{s}][{r}]",
      f"{table.tokens[r, s]} is outside the vocabulary; expected ids below {vocab_size}",
    )
  count = table.tokens.shape[1]
  if not table.streams and count != len(streams):
    raise table.where.error(
      "token_ids",
      f"{count} streams without names; expected this run's {len(streams)} "
      f"({', '.join(streams.names)}), or their names in 'streams'",
    )
  columns = list(_columns(table, streams).values()) if table.streams else list(range(count))
  tokens = np.full((len(table.tokens), len(streams)), HOLE, np.int32)
  weights = np.ones(tokens.shape, np.float32)
  tokens[:, columns], weights[:, columns] = table.tokens, table.weights
  return Table(tokens, weights, _all(streams), table.id, table.meta, table.where)


def _columns(record: Script | Table, streams: Streams) -> dict[str, int]:
  """The run's stream id for each stream of a record, in the record's order."""
  columns = {}
  for i, stream in enumerate(record.streams):
    field = f"streams[{i}]"
    if stream.name not in streams.names:
      raise record.where.error(
        field,
        f"{stream.name!r} is none of this run's streams ({', '.join(streams.names)})"
        f"{nearest(stream.name, streams.names)}",
      )
    columns[stream.name] = streams.names.index(stream.name)
    kind = streams.streams[columns[stream.name]].kind
    if stream.kind not in (None, kind):
      raise record.where.error(
        f"{field}.kind", f"{stream.kind!r}, but in this run {stream.name!r} is of kind {kind!r}"
      )
  return columns


def _all(streams: Streams) -> tuple[RecordStream, ...]:
  return tuple(RecordStream(s.name, s.kind) for s in streams.streams)
