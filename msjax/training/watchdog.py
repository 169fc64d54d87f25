"""A thread that writes down where a run hangs, when no step has ended for too long.

It ends nothing: a slow disk may come back, and whoever started the run decides. It sees whatever
waits in Python, for data, for a lock or for a device: all of these let other threads run.
"""

import contextlib
import datetime
import faulthandler
import pathlib
import threading
import time
from collections.abc import Iterator

from absl import logging

_CHECKS = 8  # in the time that is too long
_PATIENCE = 10  # times as long for what takes longer than a step


class Watchdog:
  """Watches from its `with` on; a context manager."""

  def __init__(self, path: pathlib.Path, seconds: float):
    """Names the file to which the stacks of a stall are appended, and how long is too long.

    Args:
      path: of this process's file, in a directory that is made when it is needed.
      seconds: without the end of a step; 0: nobody watches.
    """
    self.path, self.seconds = path, seconds
    self._step = 0
    self._since, self._patience = time.monotonic(), 1
    self._told: float | None = None  # of the stall that began then
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="stall watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    """Starts the thread."""
    if self.seconds:
      self._thread.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Ends it."""
    self._done.set()
    if self.seconds:
      self._thread.join()

  def step(self, step: int) -> None:
    """The step of this number has ended."""
    self._step, self._since = step, time.monotonic()

  @contextlib.contextmanager
  def patient(self) -> Iterator[None]:
    """No step is expected to end in this block, such as one that compiles, evaluates or saves, and
    ten times as long is not yet too long."""
    before, self._patience, self._since = self._patience, _PATIENCE, time.monotonic()
    try:
      yield
    finally:
      self._patience, self._since = before, time.monotonic()

  def check(self) -> None:
    """Tells of a stall if there is one that has not been told of."""
    since, now = self._since, time.monotonic()
    if since == self._told or now - since < self._patience * self.seconds:
      return
    self._told = since
    stall = f"no step has ended for {now - since:.0f} s, the last one was step {self._step}"
    try:
      self._write_stacks(stall)
    except OSError as error:
      logging.error("%s; stacks cannot be written to %s: %s", stall, self.path, error.strerror)
    else:
      logging.warning("%s; the stacks of all threads are in %s", stall, self.path)

  def _watch(self) -> None:
    while not self._done.wait(self.seconds / _CHECKS):
      self.check()

  def _write_stacks(self, stall: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self.path.parent.mkdir(exist_ok=True)
    with open(self.path, "a", encoding="utf-8") as file:
      file.write(f"{now} {stall}\n")
      faulthandler.dump_traceback(file)  # which flushes first, for it writes past the buffer
      file.write("\n")
