"""Sessions at a terminal: rows are printed as they are made."""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

from msjax.data.show import RowPrinter
from msjax.decoding import log as log_lib
from msjax.decoding.engine import Engine
from msjax.decoding.policy import Policy
from msjax.decoding.session import ENDED, Session
from msjax.errors import InputError, complain
from msjax.model import Model
from msjax.talk.conversation import (
  QUIET_ROWS,
  Prompt,
  Row,
  Texts,
  begun,
  is_hushed,
  remembers,
)


class LogTo(NamedTuple):
  """Where the log of a session goes.

  Attributes:
    path: of the file; None: there is none.
    about: what the log says of the model.
  """

  path: str | None
  about: Mapping[str, Any]

  @contextlib.contextmanager
  def opened(self, engine: Engine, session: Session) -> Iterator[Callable[[], None]]:
    """Gives what writes down the events since the last time."""
    if self.path is None:
      yield lambda: None
      return
    with log_lib.Log(self.path, engine, session, self.about) as log:
      yield log.write


class Printer:
  """Prints rows as a table or as JSON lines, and under a table what each stream said."""

  def __init__(self, model: Model, as_json: bool):
    """Before the first row."""
    self._tokenizer, self._as_json = model.tokenizer, as_json
    self._printer = RowPrinter(model.streams.names, mode="jsonl" if as_json else None)
    self._said = {name: [""] for name in model.streams.names}  # messages

  def row(self, row: Row) -> None:
    """Prints one."""
    ids = list(row.tokens.values())
    cells = row.text.values() if self._as_json else map(self._tokenizer.cell_text, ids)
    self._printer.row(row.index, list(cells), ids)
    for name, text in row.text.items():
      self._said[name][-1] += text
      if row.tokens[name] == self._tokenizer.end_id:
        self._said[name].append("")

  def end(self) -> None:
    """Prints what was said."""
    if self._as_json:
      return
    print()
    for name, messages in self._said.items():
      for message in filter(None, messages):
        print(f"{name}: {message}")


def show(
  model: Model,
  prompt: Prompt,
  as_json: bool,
  log: LogTo,
  policies: Mapping[str, Policy],
  seed: int,
) -> None:
  """Prints one conversation."""
  engine, conversation = begun(model, prompt, policies, seed)
  printer = Printer(model, as_json)
  with log.opened(engine, conversation.session) as write:
    while not conversation.is_over:
      engine.step()
      write()
      for row in conversation.rows():
        printer.row(row)
  printer.end()


def replay(model: Model, logged: log_lib.Logged, as_json: bool) -> None:
  """Prints the rows of a log, drawn once more."""
  rows = log_lib.replay(model.engine(**logged.engine), logged)
  texts, printer = Texts(model), Printer(model, as_json)
  for row in rows:
    printer.row(texts.row(row, is_last=False))
  printer.end()


def interact(
  model: Model,
  as_json: bool,
  log: LogTo,
  policies: Mapping[str, Policy],
  seed: int,
  file: TextIO | None = None,
) -> None:
  """Reads lines while the model reads and writes; when all is quiet, waits for the next.

  A line goes into the stream `user`, or the first input stream; `STREAM: text` into another, if
  there is one of that name: else that is text, too. After the last line it ends as soon as all is
  quiet, or when the context is full.
  """
  inputs = [model.streams.names[s] for s in model.streams.of_kind("input")]
  if not inputs:
    raise InputError("--interactive: the model has no input stream; expected one, as in user:input")
  engine = model.engine(rows=512, remembers=remembers(policies))
  session, printer = engine.join(policies=policies, seed=seed), Printer(model, as_json)
  lines, texts, quiet, more = _lines(file or sys.stdin), Texts(model), QUIET_ROWS, True
  with log.opened(engine, session) as write:
    while session.status != ENDED:
      for line in _heard(lines, wait=more and quiet >= QUIET_ROWS):
        more = line is not None
        if more:
          _say(model, session, inputs, line.rstrip("\n"))
      if session.tokens_waiting:
        quiet = -1  # the row that is fed now says something
      elif quiet >= QUIET_ROWS:
        if not more:
          session.end("silence")
        continue
      for _, row in engine.step():
        quiet = quiet + 1 if quiet < 0 or is_hushed(model, row) else 0
        printer.row(texts.row(row, is_last=False))
      write()
  session.check()
  printer.end()


def _say(model: Model, session: Session, inputs: list[str], line: str) -> None:
  """Puts a line into an input stream; what cannot be said is told, and the session goes on."""
  stream, colon, text = line.partition(":")
  if not (colon and stream in model.streams.names):
    stream, text = "user" if "user" in inputs else inputs[0], line
  try:
    session.say(stream, model.said(text.strip()))
  except InputError as error:
    complain(f"error: {error}")


def _lines(file: TextIO) -> queue.SimpleQueue:
  """Reads lines in a thread; None comes after the last."""
  lines = queue.SimpleQueue()

  def read():
    for line in file:
      lines.put(line)
    lines.put(None)

  threading.Thread(target=read, daemon=True).start()
  return lines


def _heard(lines: queue.SimpleQueue, wait: bool) -> Iterator[str | None]:
  """Yields the lines that are there; if wanted, waits for the first."""
  with contextlib.suppress(queue.Empty):
    while True:
      yield lines.get(block=wait)
      wait = False
