"""Errors that a command tells in one line: wrong input, and a run that came to grief."""

import difflib
import os
import sys
from collections.abc import Iterable


class InputError(ValueError):
  """Something a user gave is wrong.

  The message is one sentence: what has the wrong value, the value, what was expected, what to do.
  Commands print it on one line and end with status 2; libraries let it rise.

  Attributes:
    exit_status: of a command that ends by it.
    kind: what the command calls it.
  """

  exit_status = 2
  kind = "error"


class RecordError(InputError):
  """A record of a data file is wrong: names the file, the line and the field."""

  def __init__(self, path, line: int, field: str, problem: str):
    """Builds `path:line: field: problem`."""
    super().__init__(f"{path}:{line}: {field}: {problem}")
    self.path, self.line, self.field, self.problem = str(path), line, field, problem


class RunError(RuntimeError):
  """Something befell a run that no input explains; one line says what, and what is left.

  Attributes:
    exit_status: of a command that ends by it.
    kind: what the command calls it.
  """

  exit_status = 1
  kind = "error"


class Stopped(RunError):
  """A signal asked the run to end; it is saved and goes on when started again."""

  exit_status = 42
  kind = "stopped"


def nearest(word: str, choices: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the choice nearest to `word`, or an empty string."""
  found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
  return f"; did you mean {found[0]!r}?" if found else ""


def complain(message: str) -> None:
  """Prints a line on stderr: the command's name and a message."""
  print(f"{_program()}: {message}".replace("\n", " "), file=sys.stderr, flush=True)


def _program() -> str:
  """Name of the command as `python -m` takes it."""
  spec = sys.modules["__main__"].__spec__
  return spec.name if spec else os.path.basename(sys.argv[0])
