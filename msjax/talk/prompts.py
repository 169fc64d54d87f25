"""A file of prompts answered side by side; what is answered already is not asked again."""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from msjax.decoding.policy import Policy
from msjax.errors import InputError, RecordError
from msjax.model import Model
from msjax.talk.conversation import Prompt, Row, answers

_FIELDS = ("id", "inputs", "at", "rows")
_BEGINNING = b'{"prompt": '  # of an answer


def answer(
  model: Model,
  path: str | os.PathLike,
  out: str | os.PathLike | None,
  places: int,
  policies: Mapping[str, Policy],
  seed: int,
) -> None:
  """Answers JSON lines with JSON lines, in the order in which they are done.

  A prompt has `inputs` (text by input stream), and if wanted `at` ([row, stream, text]s), `rows`
  and `id`. An answer has `prompt` (which line, from 0), `id`, `run` (a name of all that it depends
  on), `reason`, `text` by stream, and `tokens`, a list a row.

  Args:
    model: that answers.
    path: of the prompts.
    out: of the answers; those in it are kept, and a line that was cut off is made anew. None:
      stdout.
    places: prompts at a time.
    policies: by stream.
    seed: with the number of the prompt it says what is drawn.

  Raises:
    InputError: a prompt that is none, all of which are looked at first, or answers of another run.
  """
  lines = _lines(pathlib.Path(path))
  prompts = [_prompt(path, n, line, model) for n, line in enumerate(lines)]
  told = {name: policy.to_json() for name, policy in policies.items()}
  run = json.dumps([model.identity, places, told, seed], sort_keys=True)
  names = [hashlib.sha256(f"{run}\n{line}".encode()).hexdigest()[:16] for line in lines]
  done = set() if out is None else _answered(pathlib.Path(out), names)
  waiting = ((n, prompt) for n, (_, prompt) in enumerate(prompts) if n not in done)
  made = answers(model, waiting, places, policies, seed)
  found = (_record(n, prompts[n][0], names[n], rows, reason) for n, rows, reason in made)
  if out is None:
    _write(sys.stdout, found)
    return
  try:
    with open(out, "a", encoding="utf-8") as file:
      _write(file, found)
  except OSError as error:
    raise InputError(f"{out}: cannot be written: {error.strerror}") from error
  print(f"{out}: {len(prompts) - len(done)} answered, beside {len(done)} that were there")


def _lines(path: pathlib.Path) -> list[str]:
  try:
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    return [*lines, last] if last else lines
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error.strerror}") from None
  except UnicodeDecodeError:
    raise InputError(f"{path}: is no text; expected a file of prompts") from None


def _prompt(path, number: int, line: str, model: Model) -> tuple[Any, Prompt]:
  """Reads a prompt; returns its id and what it says."""
  wrong = lambda field, problem: RecordError(path, number + 1, field, problem)
  try:
    found = json.loads(line)
  except ValueError as error:
    raise wrong("line", f"no JSON: {error}") from None
  if not isinstance(found, dict):
    raise wrong("line", f"{line[:40]!r}; expected a JSON object")
  for field in found:
    if field not in _FIELDS:
      raise wrong(field, f"unknown; expected {', '.join(_FIELDS)}")
  prompt = Prompt(found.get("inputs", {}), found.get("at", ()), found.get("rows"))
  try:
    prompt.schedule(model)
  except InputError as error:
    raise wrong("prompt", str(error)) from None
  return found.get("id"), prompt


def _answered(path: pathlib.Path, names: list[str]) -> set[int]:
  """Which prompts a file answers; a last line that was cut off is cut away."""
  if not path.exists():
    return set()
  data = path.read_bytes()
  whole = data.rfind(b"\n") + 1
  done = set()
  rest = data[whole:]
  if not _BEGINNING.startswith(rest[: len(_BEGINNING)]):
    raise RecordError(path, data.count(b"\n") + 1, "line", f"{rest[:40]!r}; expected an answer")
  for number, line in enumerate(data[:whole].decode("utf-8", "replace").split("\n")[:-1], 1):
    try:
      found = json.loads(line)
      prompt, run = found["prompt"], found["run"]
    except (ValueError, TypeError, KeyError):
      raise RecordError(path, number, "line", f"{line[:40]!r}; expected an answer") from None
    if not (isinstance(prompt, int) and 0 <= prompt < len(names) and names[prompt] == run):
      raise RecordError(
        path,
        number,
        "run",
        f"{run!r}; answers another prompt, model, policy, seed or number of sessions; "
        "expected answers of this run, or a new file",
      )
    done.add(prompt)
  if rest:
    os.truncate(path, whole)
  return done


def _record(number: int, id: Any, run: str, rows: list[Row], reason: str) -> dict[str, Any]:
  names = rows[0].text
  return {
    "prompt": number,
    **({} if id is None else {"id": id}),
    "run": run,
    "reason": reason,
    "text": {name: "".join(row.text[name] for row in rows) for name in names},
    "tokens": [list(row.tokens.values()) for row in rows],
  }


def _write(file: TextIO, records: Iterable[dict[str, Any]]) -> None:
  for record in records:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
