"""Where the time of a run went, over all its restarts: `goodput.json`.

At every moment the run is at exactly one of `ACTIVITIES`, so their seconds add up to the wall time
since the run was first started, and the share that went into steps is its goodput.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from msjax.errors import InputError, RunError
from msjax.workdir import write_json

FORMAT_VERSION = 1
ACTIVITIES = (
  "start",  # of a process, up to the first batch
  "compile",  # the training step
  "data_wait",
  "steps",  # that count
  "evaluation",
  "saves",  # as long as they keep steps waiting
  "lost_steps",  # taken, but gone with a process that had not saved them
  "idle",  # from the last sign of life of one process to the start of the next
)
_MARKS = 8


@dataclasses.dataclass
class Ledger:
  """What `goodput.json` holds.

  Attributes:
    first_start: Unix time.
    last_sign_of_life: Unix time.
    starts: of processes.
    steps: taken so far, as far as they count.
    lost_steps: that had to be taken again.
    seconds: by activity.
    marks: what `seconds["steps"]` was when so many steps had been saved.
  """

  first_start: float
  last_sign_of_life: float
  starts: int = 0
  steps: int = 0
  lost_steps: int = 0
  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0)
  )
  marks: dict[int, float] = dataclasses.field(default_factory=lambda: {0: 0.0})

  @property
  def wall_seconds(self) -> float:
    """Since the first start."""
    return sum(self.seconds.values())

  @property
  def goodput(self) -> float:
    """Share of the wall time that went into steps that count."""
    return self.seconds["steps"] / max(self.wall_seconds, 1e-9)

  def start(self, began: float) -> None:
    """Counts a process that began at this Unix time, after the last sign of life."""
    self.seconds["idle"] += began - self.last_sign_of_life
    self.starts += 1

  def go_on(self, step: int) -> None:
    """Goes back to where a checkpoint stands; time between two marks is shared out by steps."""
    marks = sorted(({self.steps: self.seconds["steps"]} | self.marks).items())
    kept = float(np.interp(step, *zip(*marks)))
    self.seconds["lost_steps"] += self.seconds["steps"] - kept
    self.lost_steps += max(self.steps - step, 0)
    self.seconds["steps"], self.steps = kept, step
    self.marks = {s: seconds for s, seconds in self.marks.items() if s < step}
    self.mark(step)

  def mark(self, step: int) -> None:
    """Notes what so many steps took; the first mark stays, and the latest ones."""
    self.marks[step] = self.seconds["steps"]
    if len(self.marks) > _MARKS:
      del self.marks[sorted(self.marks)[1]]

  def to_json(self) -> dict[str, Any]:
    """Returns what the file holds; seconds to the millisecond, times in UTC."""
    rounded = lambda seconds: {str(key): round(value, 3) for key, value in seconds.items()}
    return {
      "format_version": FORMAT_VERSION,
      "goodput": round(self.goodput, 4),
      "wall_seconds": round(self.wall_seconds, 3),
      "seconds": rounded(self.seconds),
      "starts": self.starts,
      "steps": self.steps,
      "lost_steps": self.lost_steps,
      "first_start": _to_text(self.first_start),
      "last_sign_of_life": _to_text(self.last_sign_of_life),
      "step_seconds_when_saved": rounded(self.marks),
    }

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> "Ledger":
    """Reads what `to_json` wrote; anything else is a KeyError, TypeError or ValueError."""
    return cls(
      first_start=_from_text(data["first_start"]),
      last_sign_of_life=_from_text(data["last_sign_of_life"]),
      starts=int(data["starts"]),
      steps=int(data["steps"]),
      lost_steps=int(data["lost_steps"]),
      seconds={name: float(data["seconds"][name]) for name in ACTIVITIES},
      marks={int(s): float(seconds) for s, seconds in data["step_seconds_when_saved"].items()},
    )


class Goodput:
  """Keeps the ledger of a run; a context manager around all that a process does for it.

  Time outside of spans is the start's until `go_on`, and the steps' from there on. Process 0 reads
  and writes the file; the others count for themselves.
  """

  def __init__(self, path: pathlib.Path, began: float | None = None):
    """Opens the books.

    Args:
      path: of `goodput.json`.
      began: Unix time at which the process began to work for this run; by default now.

    Raises:
      InputError: the file is there, but is none that this msjax wrote.
    """
    now = time.time()
    began = now if began is None else began
    self._path = path if jax.process_index() == 0 else None
    self.ledger = (self._path and read(self._path)) or Ledger(began, began)
    began = max(began, self.ledger.last_sign_of_life)  # by this very process, if it trains again
    self.ledger.start(began)
    self._activity, self._since = "start", time.perf_counter() - max(now - began, 0.0)

  def __enter__(self) -> "Goodput":
    """Writes that there was a start."""
    self.write()
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Writes the last figures; a disk that is full tells nothing new after an error."""
    with contextlib.suppress(*(() if kind is None else (RunError,))):
      self.write()

  @contextlib.contextmanager
  def span(self, activity: str) -> Iterator[None]:
    """Counts the time of a block for one of `ACTIVITIES`; a span inside of it has its own."""
    before = self._turn_to(activity)
    try:
      yield
    finally:
      self._turn_to(before)

  def go_on(self, step: int) -> None:
    """The start is over, and the run stands at this step: what it had taken beyond is lost."""
    self._turn_to("steps")
    self.ledger.go_on(step)
    self.write()

  def step(self, step: int) -> None:
    """The step of this number has ended."""
    self.ledger.steps = step

  def saved(self, step: int) -> None:
    """A checkpoint of so many steps is on its way to the disk."""
    self._turn_to(self._activity)
    self.ledger.mark(step)
    self.write()

  def write(self) -> None:
    """Writes the file; what happens after the last write before a kill counts as idle.

    Raises:
      RunError: it cannot be written.
    """
    self._turn_to(self._activity)
    self.ledger.last_sign_of_life = time.time()
    if self._path is None:
      return
    try:
      write_json(self._path, self.ledger.to_json())
    except InputError as error:
      raise RunError(str(error)) from error

  def _turn_to(self, activity: str) -> str:
    """Books the time so far on the activity that ends, and returns its name."""
    now = time.perf_counter()
    self.ledger.seconds[self._activity] += now - self._since
    before, self._activity, self._since = self._activity, activity, now
    return before


def read(path: pathlib.Path) -> Ledger | None:
  """Reads a `goodput.json`; None where there is none.

  Raises:
    InputError: it is none that this msjax wrote.
  """
  try:
    data = json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error.strerror}") from None
  except ValueError:
    data = None
  version = data.get("format_version") if isinstance(data, dict) else None
  if isinstance(version, int) and version != FORMAT_VERSION:
    raise InputError(f"{path}: format_version {version}, this msjax reads {FORMAT_VERSION}")
  try:
    return Ledger.from_json(data)
  except (AttributeError, KeyError, TypeError, ValueError):
    raise InputError(
      f"{path}: holds what msjax did not write; expected where the run's time went; move it away"
    ) from None


def process_began() -> float:
  """Returns the Unix time at which this process began; where no /proc tells, which is off Linux,
  that at which this module was loaded."""
  try:
    stat = pathlib.Path("/proc/self/stat").read_text()
  except OSError:
    return _LOADED
  ticks = int(stat.rpartition(")")[2].split()[19])  # from boot to the start of the process
  age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  return time.time() - age


_LOADED = time.time()


def _to_text(unix: float) -> str:
  return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat(timespec="milliseconds")


def _from_text(text: str) -> float:
  return datetime.datetime.fromisoformat(text).timestamp()
