"""The three levels of data, one JSON object a line: messages, spans and tables.

Level 1 says who said what, level 2 in which row, level 3 with which tokens. Each level is checked
when it is read, and every error names file, line and field. `layout.py` turns one into the next.
"""

import codecs
import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
from absl import logging

from msjax.errors import InputError, RecordError, nearest
from msjax.files import replacing
from msjax.streams import HOLE, KINDS

LEVELS = {"messages": "messages", "spans": "spans", "table": "token_ids"}  # the field each needs
ON_BAD_RECORD = ("stop", "skip")


class Where(NamedTuple):
  """The place a record comes from, for messages to people."""

  path: str = "memory"
  line: int = 0

  def error(self, field: str, problem: str) -> RecordError:
    """Returns `path:line: field: problem`, to be raised."""
    return RecordError(self.path, self.line, field, problem)

  def __str__(self) -> str:
    """Returns `path:line`."""
    return f"{self.path}:{self.line}"


NOWHERE = Where()


class BadRecords:
  """What happens to wrong records: `stop` raises the first, `skip` counts and lists them all.

  Attributes:
    messages: one line for each record skipped so far.
  """

  def __init__(self, policy: str = "stop", tell: Callable[..., None] = logging.warning):
    """Takes `stop` or `skip`, and who is told of each that is skipped."""
    if policy not in ON_BAD_RECORD:
      raise InputError(
        f"on_bad_record: {policy!r} is none of {', '.join(ON_BAD_RECORD)}"
        f"{nearest(policy, ON_BAD_RECORD)}"
      )
    self.policy, self._tell = policy, tell
    self.messages: list[str] = []

  @contextlib.contextmanager
  def caught(self) -> Iterator[None]:
    """Applies the policy to a `RecordError` of the block."""
    try:
      yield
    except RecordError as error:
      if self.policy == "stop":
        raise
      self._tell("skipped: %s", error)
      self.messages.append(str(error))


@dataclasses.dataclass(frozen=True)
class Message:
  """Something one participant said; `time` in seconds is when it was sent."""

  role: str
  content: str
  stream: str | None = None
  time: float | None = None

  @classmethod
  def from_json(cls, obj: Any, where: Where, field: str) -> "Message":
    """Checks and reads `{"role", "content", "stream"?, "time"?}`."""
    take = _Object(obj, where, field, "role content stream time").take
    time = take("time", _NUMBER, None)
    return cls(
      role=take("role", _NAME),
      content=take("content", _SAID),
      stream=take("stream", _NAME, None),
      time=None if time is None else float(time),
    )


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Level 1: who said what, one message after another."""

  messages: tuple[Message, ...]
  id: str | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  where: Where = dataclasses.field(default=NOWHERE, compare=False)
  level: ClassVar[str] = "messages"

  @classmethod
  def from_json(cls, obj: Any, where: Where) -> "Conversation":
    """Checks and reads `{"id"?, "messages": [...], "meta"?}`."""
    record = _Object(obj, where, "record", "id messages meta")
    messages = record.items("messages", Message.from_json)
    return cls(messages, *record.id_and_meta(), where)

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads."""
    return _compact(
      id=self.id, messages=[_compact(**vars(m)) for m in self.messages], meta=self.meta
    )


@dataclasses.dataclass(frozen=True)
class RecordStream:
  """A stream that a record names; `role` is for people and passed on."""

  name: str
  kind: str | None = None
  role: str | None = None

  @classmethod
  def from_json(cls, obj: Any, where: Where, field: str) -> "RecordStream":
    """Checks and reads a name or `{"name", "kind"?, "role"?}`."""
    obj = {"name": obj} if isinstance(obj, str) else obj
    take = _Object(obj, where, field, "name kind role").take
    return cls(take("name", _NAME), take("kind", _KIND, None), take("role", _NAME, None))


@dataclasses.dataclass(frozen=True)
class Span:
  """Text whose first token stands in `row` of a stream; `end`: an <end> token follows it."""

  stream: str
  row: int
  text: str
  loss: float = 1.0
  end: bool = False

  @classmethod
  def from_json(cls, obj: Any, where: Where, field: str) -> "Span":
    """Checks and reads `{"stream", "row", "text", "loss"?, "end"?}`."""
    take = _Object(obj, where, field, "stream row text loss end").take
    return cls(
      stream=take("stream", _NAME),
      row=take("row", _COUNT),
      text=take("text", _TEXT),
      loss=float(take("loss", _WEIGHT, 1.0)),
      end=take("end", _FLAG, False),
    )


@dataclasses.dataclass(frozen=True)
class Script:
  """Level 2: which text begins in which row of which stream; what no span fills is silence."""

  streams: tuple[RecordStream, ...]
  spans: tuple[Span, ...]
  id: str | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  where: Where = dataclasses.field(default=NOWHERE, compare=False)
  level: ClassVar[str] = "spans"

  @classmethod
  def from_json(cls, obj: Any, where: Where) -> "Script":
    """Checks and reads `{"id"?, "streams": [...], "spans": [...], "meta"?}`.

    Overlaps show only when the text has become tokens: `layout.to_table` finds them.
    """
    record = _Object(obj, where, "record", "id streams spans meta")
    streams = record.items("streams", RecordStream.from_json)
    spans = record.items("spans", Span.from_json)
    names = _distinct_names(streams, where)
    for i, span in enumerate(spans):
      if span.stream not in names:
        raise where.error(
          f"spans[{i}].stream",
          f"{span.stream!r} is none of the record's streams ({', '.join(names)})"
          f"{nearest(span.stream, names)}",
        )
    return cls(streams, spans, *record.id_and_meta(), where)

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads."""
    spans = []
    for span in self.spans:
      weight = {} if span.loss == 1 else {"loss": span.loss}
      end = {"end": True} if span.end else {}
      spans.append({"stream": span.stream, "row": span.row, "text": span.text, **weight, **end})
    streams = [_compact(**vars(s)) for s in self.streams]
    return _compact(id=self.id, streams=streams, spans=spans, meta=self.meta)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Level 3: a token in every cell; a superset of the official release's `dataset.jsonl`.

  Attributes:
    tokens: int32 [R, S], -1 is a hole (`null` in JSON, where columns come first: [S][R]).
    weights: float32 [R, S], loss weight of the cell that is predicted, before its stream's weight.
    streams: one a column; none where the file leaves them to the run.
  """

  tokens: np.ndarray
  weights: np.ndarray
  streams: tuple[RecordStream, ...] = ()
  id: str | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  where: Where = NOWHERE
  level: ClassVar[str] = "table"

  @classmethod
  def from_json(cls, obj: Any, where: Where) -> "Table":
    """Checks and reads `{"id"?, "num_rows", "token_ids", "loss_mask"?, "streams"?, "meta"?}`."""
    record = _Object(obj, where, "record", "id num_rows token_ids loss_mask streams meta")
    rows = record.take("num_rows", _POSITIVE)
    columns = record.take("token_ids", _LIST)
    tokens = np.stack(
      [_tokens(c, rows, where, f"token_ids[{s}]") for s, c in enumerate(columns)], 1
    )
    masks = record.take("loss_mask", _LIST, [1.0] * len(columns))
    _check_length(masks, len(columns), "one entry a stream", where, "loss_mask")
    weights = np.stack(
      [_weights(m, rows, where, f"loss_mask[{s}]") for s, m in enumerate(masks)], 1
    )
    streams = ()
    if record.take("streams", _LIST, None):
      streams = record.items("streams", RecordStream.from_json)
      _check_length(streams, len(columns), "one name for each list of token_ids", where, "streams")
      _distinct_names(streams, where)
    return cls(tokens, weights, streams, *record.id_and_meta(), where)

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads; without `loss_mask` where every weight is 1."""
    columns = [[None if t == HOLE else t for t in column] for column in self.tokens.T.tolist()]
    return _compact(
      id=self.id,
      num_rows=len(self.tokens),
      token_ids=columns,
      loss_mask=None if (self.weights == 1).all() else self.weights.T.tolist(),
      streams=[_compact(**vars(s)) for s in self.streams],
      meta=self.meta,
    )


Record = Conversation | Script | Table
_RECORDS: dict[str, type[Record]] = {c.level: c for c in (Conversation, Script, Table)}


def level_of(obj: Any, where: Where = NOWHERE) -> str:
  """Returns `messages`, `spans` or `table` by the fields of a parsed record, or raises."""
  if not isinstance(obj, dict):
    raise where.error("record", f"{_shown(obj)}; expected one JSON object a line")
  found = [level for level, key in LEVELS.items() if key in obj]
  if len(found) != 1:
    has = "more than one" if found else "none"
    raise where.error("record", f"has {has} of {', '.join(LEVELS.values())}; expected exactly one")
  return found[0]


def read(path: str | os.PathLike, bad: BadRecords | None = None) -> Iterator[tuple[int, Record]]:
  """Yields line number (from 1) and record, of any level, reading the file as it goes.

  Args:
    path: a JSONL file in UTF-8; blank lines, CRLF and a byte order mark are all right.
    bad: what to do with wrong records; by default the first raises `RecordError`.

  Raises:
    InputError: no such file, or no record in it.
  """
  bad = bad or BadRecords()
  number = 0
  for number, line in _lines(path):
    with bad.caught():
      yield number, _parse(line, Where(str(path), number))
  if not number:
    raise InputError(f"{path}: the file has no records; expected one JSON object a line")


def write(path: str | os.PathLike, records: Iterable[Record]) -> int:
  """Writes one record a line and returns their number; a file appears only when all are written."""
  count = 0
  with replacing(path) as file:
    for record in records:
      file.write(json.dumps(record.to_json(), ensure_ascii=False).encode() + b"\n")
      count += 1
  return count


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
  """Number and bytes of each line that is not blank; only a line feed ends a line."""
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
          yield number, line
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes, where: Where) -> Record:
  """Makes a record of one line of JSON."""
  try:
    obj = json.loads(line.decode("utf-8"))
    if b"\\ud" in line.lower():  # half a surrogate pair is no text: find it before it is written
      json.dumps(obj, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise where.error("json", f"{error}; expected one JSON object a line") from None
  return _RECORDS[level_of(obj, where)].from_json(obj, where)


class _Check(NamedTuple):
  """What a JSON value has to be."""

  expected: str
  ok: Callable[[Any], bool]


_LARGEST = float(np.finfo(np.float32).max)


def _is_number(value: Any) -> bool:
  """Whether it is a number, finite in float32, and no bool."""
  return type(value) in (int, float) and abs(value) <= _LARGEST


_LIST = _Check("a list that is not empty", lambda v: isinstance(v, list) and bool(v))
_NAME = _Check("a name", lambda v: isinstance(v, str) and bool(v.strip()))
_TEXT = _Check("text that is not empty", lambda v: isinstance(v, str) and bool(v))
_SAID = _Check("text that is not blank", lambda v: isinstance(v, str) and bool(v.strip()))
_KIND = _Check(f"one of {', '.join(KINDS)}", lambda v: v in KINDS)
_ID = _Check("text or a whole number", lambda v: type(v) is int or _NAME.ok(v))
_META = _Check("an object", lambda v: isinstance(v, dict))
_NUMBER = _Check("a finite number", _is_number)
_WEIGHT = _Check(
  "true, false or a finite number that is not negative",
  lambda v: isinstance(v, bool) or (_is_number(v) and v >= 0),
)
_COUNT = _Check("a whole number, 0 or more", lambda v: type(v) is int and v >= 0)
_POSITIVE = _Check("a whole number, 1 or more", lambda v: type(v) is int and v >= 1)
_FLAG = _Check("true or false", lambda v: isinstance(v, bool))
_REQUIRED = object()


class _Object:
  """A JSON object in a record: hands out its fields, checked.

  Fields that msjax does not know are other people's and stay unread, unless one looks like a slip
  of a known name.
  """

  def __init__(self, value: Any, where: Where, field: str, known: str):
    if not isinstance(value, dict):
      raise where.error(field, f"{_shown(value)}; expected an object")
    self.value, self.where = value, where
    self.prefix = "" if field == "record" else field + "."
    for key in value.keys() - known.split():
      slip = difflib.get_close_matches(key, known.split(), n=1, cutoff=0.8)
      if slip and slip[0] not in value:
        raise where.error(self.prefix + key, f"no such field; did you mean {slip[0]!r}?")

  def take(self, key: str, check: _Check, default: Any = _REQUIRED) -> Any:
    """Returns a field that passes the check; `null` counts as absent where there is a default."""
    value = self.value.get(key)
    if value is None and default is not _REQUIRED:
      return default
    if not check.ok(value):
      found = _shown(value) if key in self.value else "missing"
      raise self.where.error(self.prefix + key, f"{found}; expected {check.expected}")
    return value

  def items(self, key: str, read_one: Callable[[Any, Where, str], Any]) -> tuple[Any, ...]:
    """Returns the entries of a list field, each read by `read_one(value, where, field)`."""
    return tuple(
      read_one(v, self.where, f"{key}[{i}]") for i, v in enumerate(self.take(key, _LIST))
    )

  def id_and_meta(self) -> tuple[str | None, dict[str, Any]]:
    """Returns the two fields that every level may have."""
    name = self.take("id", _ID, None)
    return None if name is None else str(name), self.take("meta", _META, {})


def _tokens(column: Any, rows: int, where: Where, field: str) -> np.ndarray:
  """One stream's token ids, int32 [R]."""
  _check_length(column, rows, "num_rows entries", where, field)
  for row, token in enumerate(column):
    if token is not None and not (type(token) is int and 0 <= token < 2**31):
      raise where.error(f"{field}[{row}]", f"{_shown(token)}; expected a token id or null")
  return np.array([HOLE if t is None else t for t in column], np.int32)


def _weights(mask: Any, rows: int, where: Where, field: str) -> np.ndarray:
  """One stream's loss weights, float32 [R], from one for each row or one for all."""
  if not isinstance(mask, list):
    return _weights([mask] * rows, rows, where, field)
  _check_length(mask, rows, "num_rows entries", where, field)
  for row, weight in enumerate(mask):
    if not _WEIGHT.ok(weight):
      raise where.error(f"{field}[{row}]", f"{_shown(weight)}; expected {_WEIGHT.expected}")
  return np.array(mask, np.float32)


def _check_length(items: Any, length: int, expected: str, where: Where, field: str) -> None:
  if not isinstance(items, list | tuple):
    raise where.error(field, f"{_shown(items)}; expected a list")
  if len(items) != length:
    raise where.error(field, f"{len(items)} entries; expected {length}, {expected}")


def _distinct_names(streams: Iterable[RecordStream], where: Where) -> list[str]:
  """Returns the names of a record's streams, or raises where two are alike."""
  names = [s.name for s in streams]
  for i, name in enumerate(names):
    if name in names[:i]:
      raise where.error(f"streams[{i}]", f"{name!r} stands twice; names must differ")
  return names


def _compact(**fields: Any) -> dict[str, Any]:
  """The fields of an object that say something."""
  return {k: v for k, v in fields.items() if v is not None and v != {} and v != []}


def _shown(value: Any) -> str:
  """A JSON value in a message, cut where it is long."""
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else text[:57] + "..."
