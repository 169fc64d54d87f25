"""A session's log, and the same rows from it once more.

A log is JSON lines: what the session was told when it began, then its events. `{"block": rows}`
was read at once; `{"row": row, "given": cells, "reading": bool}` was fed by a tick, where of the
cells those that are -2 (`FREE`) were the model's, and inputs were known to speak in the next row or
not; `{"slide": ...}` says which rows were kept then; `{"number": [old, new]}` that a fork began.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import msjax
from msjax import sharding
from msjax.decoding.engine import Engine
from msjax.decoding.session import PAUSED, READING, RUNNING, Session, Setting, plain
from msjax.decoding.stop import Stop
from msjax.errors import InputError, RecordError, RunError

FORMAT = "msjax log 2"


class Log:
  """Writes down a session as it goes on."""

  def __init__(
    self,
    path: str | os.PathLike,
    engine: Engine,
    session: Session,
    about: Mapping[str, Any] | None = None,
  ):
    """Begins a file, in place of what is there; `about` is kept for whoever reads it.

    Raises:
      InputError: a session with a grammar, or a file that cannot be written.
    """
    self._session, self._written = session, 0
    number = next((e["number"][0] for e in session.events if "number" in e), session.number)
    header = {
      "format": FORMAT,
      "identity": engine.identity(),
      "made_by": _made_by(),
      "engine": engine_options(engine),
      "chips": _chips(),
      "streams": engine.streams.to_json(),
      "setting": session.setting.to_json(f"session {session.number}") | {"number": number},
      "about": dict(about or {}),
    }
    header = _line(header)  # before what is there is given up
    try:
      self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
      raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    self._file.write(header)
    self.write()

  def write(self) -> None:
    """Writes the events since the last time."""
    for event in self._session.events[self._written :]:
      self._file.write(_line(event))
    self._written = len(self._session.events)
    self._file.flush()

  def __enter__(self) -> "Log":
    """Is itself."""
    return self

  def __exit__(self, *_) -> None:
    """Writes what is left, and closes the file."""
    self.write()
    self._file.close()


@dataclasses.dataclass(frozen=True)
class Logged:
  """What a log holds.

  Attributes:
    path: of the log.
    header: its first line.
    events: the others; a last line that was cut off is none.
  """

  path: pathlib.Path
  header: Mapping[str, Any]
  events: list[dict[str, Any]]

  @classmethod
  def read(cls, path: str | os.PathLike) -> "Logged":
    """Reads a log.

    Raises:
      InputError: a file that is none, or of another version.
    """
    path = pathlib.Path(path)
    try:
      lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
      raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
      raise InputError(f"{path}: is no text; expected the log of a session") from None
    header, *events = [_parsed(path, n, line) for n, line in enumerate(lines, 1)] or [{}]
    if header.get("format") != FORMAT:
      raise InputError(f"{path}: format {header.get('format')!r}; this msjax reads {FORMAT!r}")
    return cls(path, header, events)

  @property
  def engine(self) -> dict[str, Any]:
    """The options of an `Engine` that can replay it."""
    return self.header["engine"]


def _line(data: Mapping[str, Any]) -> str:
  return json.dumps(data, separators=(",", ":"), default=plain) + "\n"


def engine_options(engine: Engine) -> dict[str, Any]:
  """What of an engine its sessions' rows depend on."""
  return {
    "places": engine.places,
    "max_rows": engine.bounds.max_rows,
    "rows_at_once": engine.rows_at_once,
    "remembers": engine.remembers,
  }


def _chips() -> dict[str, int]:
  """Into how many parts the mesh in use cuts sessions and heads, by which sums are made."""
  return {"sessions": sharding.chips("batch"), "heads": sharding.chips("heads")}


def replay(engine: Engine, logged: Logged) -> Iterator[np.ndarray]:
  """Returns the rows int32 [S] of a log, drawn once more; other sessions may go on beside it.

  Raises:
    InputError: a log of another model, other streams, another mesh, or an engine of other sizes.
    RunError: while rows are made: one that comes out otherwise; no place gets free.
  """
  _check(engine, logged)
  return _rows(engine, logged)


def _rows(engine, logged):
  session, told = engine.admit(_Replayed(engine, logged)), 0
  try:
    while True:
      yield from session.rows[told:]
      told = len(session.rows)
      if session.reason is not None:
        break
      while (number := session.next_number) is not None:
        engine.renumber(session, number)
      engine.step_towards(session)
    session.check_all()
  finally:
    session.end(session.reason or "not asked for any more")


def _check(engine: Engine, logged: Logged) -> None:
  identity, streams = logged.header["identity"], logged.header["streams"]
  if identity != engine.identity():
    raise InputError(
      f"{logged.path}: is of model {identity or 'unnamed'}, this one is "
      f"{engine.identity() or 'unnamed'}; replay it with the parameters it was made with"
    )
  if streams != engine.streams.to_json():
    raise InputError(f"{logged.path}: is of streams {streams}; expected {engine.streams.to_json()}")
  if (chips := logged.header["chips"]) != _chips():
    how = f" (--model_chips={chips['heads']})" if chips["heads"] != _chips()["heads"] else ""
    raise InputError(
      f"{logged.path}: was made on a mesh that cuts {chips}; this one cuts {_chips()}; replay it "
      f"on one like its own{how}"
    )
  if logged.engine != engine_options(engine):
    raise InputError(
      f"{logged.path}: is of an Engine with {logged.engine}; expected that, not "
      f"{engine_options(engine)}"
    )


class _Replayed(Session):
  """Is given what its log says, and checks what comes of it."""

  def __init__(self, engine: Engine, logged: Logged):
    setting = Setting.from_json(logged.header["setting"])
    setting = dataclasses.replace(setting, stop=Stop())  # it ends with its log
    super().__init__(setting, engine.streams, engine.bounds)
    self._logged, self._coming = logged, collections.deque(logged.events)
    self._event: Mapping[str, Any] = {}  # whose row is being fed
    self._differs = ""
    self._end_with_log()

  needs_host = True  # so that only a row at a time is taken from the log

  @property
  def status(self) -> str:
    """A block is read where one comes; where it becomes another's, it waits for that."""
    status = super().status
    if status == RUNNING and self.next_number is not None:
      return PAUSED
    return READING if status == RUNNING and self.block_rows else status

  @property
  def is_sliding(self) -> bool:
    """It slides when it did."""
    return bool(self._coming) and "slide" in self._coming[0]

  @property
  def block_rows(self) -> int:
    """Rows of the blocks that come next."""
    count = 0
    for event in self._coming:
      if "block" not in event:
        break
      count += len(event["block"])
    return count

  @property
  def next_number(self) -> int | None:
    """Under which it goes on from here, where that changes."""
    return self._coming[0]["number"][1] if self._coming and "number" in self._coming[0] else None

  def next_block(self, rows: int) -> np.ndarray:
    """Takes what was read between two ticks."""
    return np.array(self._coming.popleft()["block"], np.int32)

  def next_row(self) -> np.ndarray:
    """Takes what was given of the next row."""
    self._event = self._coming.popleft()
    return np.array(self._event["given"], np.int32)

  @property
  def speaks_next(self) -> bool:
    """What was known of the row after it."""
    return self._event["reading"]

  def had_block(self, rows: np.ndarray) -> None:
    """Goes on in the log."""
    super().had_block(rows)
    self._end_with_log()

  def renumber(self, number: int) -> None:
    """Finds the same in the log."""
    super().renumber(number)
    self._coming.popleft()
    self._end_with_log()

  def slid(self) -> None:
    """Finds the same in the log."""
    super().slid()
    if self._coming:
      self._coming.popleft()
    self._end_with_log()

  def was_fed(self, row: np.ndarray, given: np.ndarray, reading: bool) -> None:
    """Compares a row with the log's."""
    super().was_fed(row, given, reading)
    theirs = self._event["row"]
    for name, here, there in zip(self.streams.names, row.tolist(), theirs):
      if here != there:
        self._differs = f"stream {name!r}: token {here} here, {there} in the log"
        self.rows.pop()
        self.end("differs from its log")
        return
    self._end_with_log()

  def check_all(self) -> None:
    """Raises where it did not come to the end of its log as its log has it.

    Raises:
      RunError: names the row.
    """
    if self._coming or self._differs:
      what = self._differs or f"the session ends here ({self.reason}), and goes on in the log"
      raise RunError(
        f"{self._logged.path}: row {len(self.rows)}, {what}, which was made by "
        f"{self._logged.header['made_by']}; this is {_made_by()}"
      )

  def _end_with_log(self) -> None:
    if not self._coming:
      self.end("log is over")


def _made_by() -> str:
  """Versions, and the kind of chip."""
  device = jax.devices()[0].device_kind
  return f"msjax {msjax.__version__}, jax {jax.__version__}, {device}"


def _parsed(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  try:
    found = json.loads(line)
  except ValueError as error:
    raise RecordError(path, number, "line", f"no JSON: {error}") from None
  if not isinstance(found, dict):
    raise RecordError(path, number, "line", f"{line[:40]!r}; expected a JSON object")
  return found
