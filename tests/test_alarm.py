import threading

import jax
import pytest

from msjax import alarm
from msjax.alarm import Alarm
from msjax.errors import InputError, RunError, Stopped


class Service:
  """What `jax.distributed` has; tells what was asked of it, in order."""

  def __init__(self):
    self.client, self.words, self.calls = self, {}, []

  def key_value_try_get(self, key):
    if key not in self.words:
      raise jax.errors.JaxRuntimeError("NOT_FOUND")
    return self.words[key]

  def key_value_set(self, key, word):
    if key in self.words:
      raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
    self.words[key] = word
    self.calls.append("said")

  def wait_at_barrier(self, name, milliseconds):
    self.calls.append("all have heard")

  def shutdown(self):
    self.calls.append("left")


class Absent(Service):
  def wait_at_barrier(self, name, milliseconds):
    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def ends(monkeypatch):
  """The status with which this process would end at its exit."""
  registered = []
  monkeypatch.setattr(alarm.atexit, "register", lambda f, *args: registered.append((f, *args)))
  return registered


@pytest.fixture(autouse=True)
def often(monkeypatch):
  monkeypatch.setattr(alarm, "_LOOK_SECONDS", 0.01)


@pytest.mark.parametrize(
  "error, status, what",
  [
    (InputError("a: 1; expected 2"), 2, "a: 1; expected 2"),
    (RunError("no disk"), 1, "no disk"),
    (OSError(28, "No space left"), 1, "[Errno 28] No space left"),
    (ZeroDivisionError("by 0"), 1, "ZeroDivisionError('by 0')"),
  ],
)
def test_an_error_is_told_heard_and_ends_this_process_too(ends, error, status, what):
  service = Service()
  with pytest.raises(type(error)), Alarm(service, "process 1 (host b)"):
    raise error
  assert service.words == {
    "msjax/alarm": f'{{"status": {status}, "what": "process 1 (host b): {what}"}}'
  }
  assert service.calls == ["said", "all have heard", "left"]
  assert ends == [(alarm._end, status)]


@pytest.mark.parametrize("error", [None, Stopped("saved")])
def test_what_ends_all_alike_is_not_told(ends, error):
  service = Service()
  try:
    with Alarm(service, "me"):
      if error:
        raise error
  except Stopped:
    pass
  assert (service.calls, ends) == ([], [])


def test_a_second_interrupt_waits_for_nobody(ends):
  service = Service()
  with pytest.raises(KeyboardInterrupt), Alarm(service, "me"):
    raise KeyboardInterrupt
  assert (service.calls, ends) == (["said"], [])
  assert "me: interrupted" in service.words["msjax/alarm"]


def test_who_is_second_adds_nothing(ends, monkeypatch):
  monkeypatch.setattr(alarm, "_LOOK_SECONDS", 60)
  service = Service()
  with pytest.raises(RunError), Alarm(service, "me"):
    service.words["msjax/alarm"] = "{"
    raise RunError("mine")
  assert service.calls == ["all have heard", "left"] and service.words["msjax/alarm"] == "{"


def test_who_is_dead_is_not_waited_for(ends):
  service = Absent()
  with pytest.raises(RunError), Alarm(service, "me"):
    raise RunError("another process is gone")
  assert service.calls == ["said"] and ends == [(alarm._end, 1)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_hears_says_it_and_ends_with_the_same_status(monkeypatch, capsys):
  service, ended = Service(), threading.Event()
  statuses = []

  def end(status):
    statuses.append(status)
    ended.set()
    raise SystemExit  # ends the thread; the real one ends the process

  monkeypatch.setattr(alarm, "_end", end)
  with Alarm(service, "me"):
    service.words["msjax/alarm"] = '{"status": 2, "what": "process 3 (host d): x: 1; expected 2"}'
    assert ended.wait(60)
  assert statuses == [2]
  assert service.calls == ["all have heard", "left"]
  assert capsys.readouterr().err.endswith(": error: process 3 (host d): x: 1; expected 2\n")
