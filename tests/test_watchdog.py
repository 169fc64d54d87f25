"""Stalls, by a clock that moves when told to."""

import logging
import threading

import pytest

from msjax.training.watchdog import Watchdog


class Clock:
  def __init__(self):
    self.now = 500.0

  def __call__(self, seconds):
    self.now += seconds


@pytest.fixture
def passes(monkeypatch):
  """`passes(s)`: s seconds pass."""
  clock = Clock()
  monkeypatch.setattr("time.monotonic", lambda: clock.now)
  return clock


@pytest.fixture
def watchdog(passes, tmp_path):
  """Waits a minute; nobody calls `check` but the test."""
  return Watchdog(tmp_path / "stalls" / "process0.txt", 60)


def stalls(watchdog):
  """How many the file tells of."""
  return watchdog.path.read_text().count("no step has ended") if watchdog.path.exists() else 0


def test_a_step_in_time_is_no_stall(watchdog, passes):
  for step in range(1, 10):
    passes(59)
    watchdog.check()
    watchdog.step(step)
  assert not watchdog.path.parent.exists()


def test_stacks_of_all_threads_are_written_and_told_of(watchdog, passes, caplog):
  watchdog.step(7)
  passes(61)
  hangs, ready = threading.Event(), threading.Event()

  def a_reader_that_hangs():
    ready.set()
    hangs.wait()

  thread = threading.Thread(target=a_reader_that_hangs)
  thread.start()
  ready.wait()
  watchdog.check()
  hangs.set()
  thread.join()
  said, *stacks = watchdog.path.read_text().splitlines()
  assert said.endswith("no step has ended for 61 s, the last one was step 7")
  assert any("in a_reader_that_hangs" in line for line in stacks)
  assert any("in test_stacks_of_all_threads" in line for line in stacks)
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert record.message.endswith(f"step 7; the stacks of all threads are in {watchdog.path}")


def test_the_first_step_is_watched_too(watchdog, passes):
  passes(60)
  watchdog.check()
  assert stalls(watchdog) == 1


def test_a_stall_is_told_once(watchdog, passes, caplog):
  for _ in range(10):
    passes(50)
    watchdog.check()
  assert stalls(watchdog) == len(caplog.records) == 1


def test_the_next_stall_is_told_again_and_the_first_is_kept(watchdog, passes):
  passes(61)
  watchdog.check()
  watchdog.step(1)
  watchdog.check()
  assert stalls(watchdog) == 1
  passes(61)
  watchdog.check()
  assert stalls(watchdog) == 2


def test_what_takes_longer_than_a_step_may_take_ten_times_as_long(watchdog, passes):
  passes(59)
  with watchdog.patient():
    with watchdog.patient():
      passes(599)
      watchdog.check()
    passes(599)
    watchdog.check()
  passes(59)  # counts from the end of the block
  watchdog.check()
  assert stalls(watchdog) == 0
  with watchdog.patient():
    passes(600)
    watchdog.check()
    assert stalls(watchdog) == 1
  passes(60)
  watchdog.check()
  assert stalls(watchdog) == 2


def test_patience_ends_with_an_error_too(watchdog, passes):
  with pytest.raises(ZeroDivisionError), watchdog.patient():
    raise ZeroDivisionError
  passes(60)
  watchdog.check()
  assert stalls(watchdog) == 1


def test_what_cannot_be_written_is_told_and_ends_nothing(watchdog, passes, caplog):
  watchdog.path.parent.write_text("a file")
  passes(60)
  watchdog.check()
  (record,) = caplog.records
  assert record.levelno == logging.ERROR
  assert "stacks cannot be written to" in record.message


def test_the_thread_checks_until_the_end(tmp_path, monkeypatch):
  checked = threading.Semaphore(0)
  watchdog = Watchdog(tmp_path / "stalls" / "process0.txt", 0.001)
  monkeypatch.setattr(watchdog, "check", checked.release)
  with watchdog:
    assert checked.acquire(timeout=60) and checked.acquire(timeout=60)
    (thread,) = (t for t in threading.enumerate() if t.name == "stall watchdog")
    assert thread.daemon
  assert not thread.is_alive()


def test_zero_seconds_watch_nothing(tmp_path):
  with Watchdog(tmp_path / "stalls" / "process0.txt", 0):
    assert "stall watchdog" not in [thread.name for thread in threading.enumerate()]
