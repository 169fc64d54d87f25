"""Which steps are traced, however a run starts and ends."""

import os
import subprocess
import sys
from importlib import metadata

import jax
import pytest

from msjax.errors import InputError
from msjax.training import trace as trace_lib
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
  """In a process of its own: another test may have loaded a libtpu that its profiler dies of."""
  code = """
import pathlib, sys, jax.numpy as jnp
from msjax.training.trace import Trace
with Trace(pathlib.Path(sys.argv[1]), 1, 1) as trace:
  trace.begin(1)
  trace.end(1, jnp.ones(3) + 1)
"""
  directory = tmp_path / "run" / "profile"
  subprocess.run(
    [sys.executable, "-c", code, directory], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True
  )
  (found,) = directory.rglob("*.xplane.pb")
  assert found.stat().st_size


@pytest.fixture
def libtpu(monkeypatch):
  """A jax that was built for libtpu 0.0.42, beside 0.0.52, which it looks for."""
  needs = ["numpy>=2.0", 'libtpu==0.0.42.*; extra == "tpu"']
  monkeypatch.setattr(metadata, "requires", lambda _: needs)
  set_version = lambda version: monkeypatch.setattr(trace_lib, "libtpu_version", lambda: version)
  set_version("0.0.52")
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)
  yield set_version
  jax.config.update("jax_platforms", before)


@pytest.mark.usefixtures("libtpu")
def test_a_libtpu_that_would_crash_is_refused(tmp_path):
  expected = r"^config.train.profile_first_step: libtpu 0.0.52 .* expected 0.0.42.\*, by .* no TPU$"
  with pytest.raises(InputError, match=expected):
    Trace(tmp_path, 1, 2)
  Trace(tmp_path, 0, 0)


def test_a_libtpu_that_is_not_loaded_is_none_of_our_business(libtpu, tmp_path):
  jax.config.update("jax_platforms", "cpu")
  Trace(tmp_path, 1, 2)


@pytest.mark.parametrize("version", [None, "0.0.42", "0.0.42.1"])
def test_the_libtpu_that_jax_wants_is_taken(libtpu, tmp_path, version):
  libtpu(version)
  Trace(tmp_path, 1, 2)
