"""Which steps are traced, however a run starts and ends."""

import jax
import jax.numpy as jnp
import pytest

from msjax.training.trace import Trace


@pytest.fixture
def calls(monkeypatch):
  """What the profiler and the waiting were asked for, in order."""
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(f"start {path.name}"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  monkeypatch.setattr(jax, "block_until_ready", lambda result: calls.append(f"wait {result}"))
  return calls


def take(calls, path, first, last, steps):
  with Trace(path / "profile", first, last) as trace:
    for step in steps:
      trace.begin(step)
      calls.append(step)
      trace.end(step, "scalars")
  return calls


def test_the_named_steps_are_traced_and_waited_for(calls, tmp_path):
  expected = [1, "start profile", 2, 3, "wait scalars", "stop", 4, 5]
  assert take(calls, tmp_path, 2, 3, range(1, 6)) == expected


def test_one_step_alone(calls, tmp_path):
  assert take(calls, tmp_path, 1, 1, [1, 2]) == ["start profile", 1, "wait scalars", "stop", 2]


def test_by_default_nothing_is_traced(calls, tmp_path):
  assert take(calls, tmp_path, 0, 0, [1, 2]) == [1, 2]


def test_a_run_that_goes_on_past_them_traces_nothing(calls, tmp_path):
  assert take(calls, tmp_path, 2, 3, [4, 5]) == [4, 5]


def test_a_run_that_goes_on_within_them_traces_the_rest(calls, tmp_path):
  expected = ["start profile", 3, 4, "wait scalars", "stop", 5]
  assert take(calls, tmp_path, 2, 4, [3, 4, 5]) == expected


def test_a_run_that_ends_within_them_leaves_what_there_is(calls, tmp_path):
  assert take(calls, tmp_path, 2, 9, [1, 2, 3]) == [1, "start profile", 2, 3, "stop"]


def test_an_error_ends_the_trace_and_goes_on_its_way(calls, tmp_path):
  with pytest.raises(ZeroDivisionError), Trace(tmp_path / "profile", 1, 9) as trace:
    trace.begin(1)
    raise ZeroDivisionError
  assert calls == ["start profile", "stop"]


def test_the_first_process_alone_traces(calls, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert take(calls, tmp_path, 1, 2, [1, 2, 3]) == [1, 2, 3]


def test_the_profiler_leaves_a_trace(tmp_path):
  with Trace(tmp_path / "run" / "profile", 1, 1) as trace:
    trace.begin(1)
    trace.end(1, jnp.ones(3) + 1)
  (found,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
  assert found.stat().st_size
