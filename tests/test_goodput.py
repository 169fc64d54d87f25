"""The account of a run's time, by a clock that moves when told to."""

import json
import subprocess
import sys
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.errors import InputError, RunError
from msjax.training import goodput as goodput_lib
from msjax.training.goodput import ACTIVITIES, Goodput, Ledger, process_began, read


class Clock:
  """Wall time and `perf_counter`, which differ by a constant."""

  def __init__(self):
    self.now = 1_000_000.0

  def __call__(self, seconds):
    self.now += seconds


@pytest.fixture
def passes(monkeypatch):
  """`passes(s)`: s seconds pass."""
  clock = Clock()
  monkeypatch.setattr("time.time", lambda: clock.now)
  monkeypatch.setattr("time.perf_counter", lambda: clock.now - 999_000.0)
  return clock


@pytest.fixture
def path(tmp_path):
  return tmp_path / "goodput.json"


def seconds(path):
  """What is not 0, by activity."""
  return {name: value for name, value in json.loads(path.read_text())["seconds"].items() if value}


def steps(goodput, passes, first, last, each=2):
  """Takes steps of so many seconds."""
  for step in range(first, last + 1):
    passes(each)
    goodput.step(step)


def run(path, passes, start, last, saves=(), each=2):
  """A process that starts for 10 seconds, takes steps, saves after some of them, and is killed."""
  goodput = Goodput(path).__enter__()
  passes(10)
  goodput.go_on(start)
  for step in range(start + 1, last + 1):
    steps(goodput, passes, step, step, each)
    if step in saves:
      goodput.saved(step)
  goodput.write()
  return goodput.ledger


def test_every_second_is_booked_once(path, passes):
  with Goodput(path) as goodput:
    passes(3)
    goodput.go_on(0)
    with goodput.span("data_wait"):
      passes(1)
    with goodput.span("compile"):
      passes(20)
    steps(goodput, passes, 1, 10)
    with goodput.span("evaluation"):
      passes(4)
      with goodput.span("saves"):
        passes(5)
      passes(0.5)
    steps(goodput, passes, 11, 15)
  expected = {"start": 3, "compile": 20, "data_wait": 1, "steps": 30}
  assert seconds(path) == {**expected, "evaluation": 4.5, "saves": 5}
  data = json.loads(path.read_text())
  assert (data["starts"], data["steps"], data["lost_steps"]) == (1, 15, 0)
  assert data["wall_seconds"] == 63.5
  assert data["goodput"] == pytest.approx(30 / 63.5, abs=1e-4)


def test_a_span_ends_with_an_error_too(path, passes):
  with pytest.raises(KeyError, match="1"), Goodput(path) as goodput:
    goodput.go_on(0)
    with goodput.span("evaluation"):
      passes(1)
      raise KeyError(1)
  assert seconds(path) == {"evaluation": 1}


def test_the_start_begins_with_the_process(path, passes):
  began = time.time()
  passes(5)
  with Goodput(path, began) as goodput:
    passes(2)
    goodput.go_on(0)
  assert seconds(path) == {"start": 7}
  assert read(path).first_start == began


def test_time_between_processes_is_idle(path, passes):
  run(path, passes, 0, 5, saves=[5])
  passes(100)
  began = time.time()
  passes(4)
  with Goodput(path, began) as goodput:
    passes(1)
    goodput.go_on(5)
  assert seconds(path) == {"start": 15, "steps": 10, "idle": 100}
  assert json.loads(path.read_text())["starts"] == 2
  assert read(path).wall_seconds == time.time() - 1_000_000


def test_a_process_that_trains_twice_starts_when_the_first_ends(path, passes):
  began = time.time()
  run(path, passes, 0, 5, saves=[5])
  passes(1)
  with Goodput(path, began) as goodput:
    goodput.go_on(5)
  assert seconds(path) == {"start": 11, "steps": 10}


def test_a_clock_that_was_set_back_makes_no_negative_time(path, passes):
  run(path, passes, 0, 5, saves=[5])
  passes(-1000)
  with Goodput(path) as goodput:
    passes(3)
    goodput.go_on(5)
  assert seconds(path) == {"start": 13, "steps": 10}


# Lost steps.


def test_steps_after_the_last_checkpoint_are_lost(path, passes):
  run(path, passes, 0, 10, saves=[4, 8])
  ledger = run(path, passes, 8, 12)
  assert (ledger.steps, ledger.lost_steps) == (12, 2)
  assert seconds(path) == {"start": 20, "steps": 24, "lost_steps": 4}


def test_steps_are_lost_twice_if_need_be(path, passes):
  run(path, passes, 0, 3)
  run(path, passes, 0, 6, saves=[4])
  ledger = run(path, passes, 4, 4)
  assert ledger.lost_steps == 3 + 2
  assert seconds(path) == {"start": 30, "steps": 8, "lost_steps": 10}


def test_a_step_that_did_not_end_is_lost_time(path, passes):
  with pytest.raises(KeyboardInterrupt), Goodput(path) as goodput:
    goodput.go_on(0)
    steps(goodput, passes, 1, 4)
    goodput.saved(4)
    passes(1)
    raise KeyboardInterrupt
  ledger = run(path, passes, 4, 4)
  assert ledger.lost_steps == 0
  assert seconds(path) == {"start": 10, "steps": 8, "lost_steps": 1}


def test_the_save_is_known_after_a_kill_right_after_it(path, passes):
  goodput = Goodput(path).__enter__()
  goodput.go_on(0)
  steps(goodput, passes, 1, 4)
  goodput.saved(4)  # and nothing is written after that
  ledger = run(path, passes, 4, 4)
  assert (ledger.lost_steps, ledger.seconds["lost_steps"]) == (0, 0)


def test_a_checkpoint_that_nobody_noted_has_its_share(path, passes):
  """An earlier one was restored, by hand or because the last was never finished."""
  run(path, passes, 0, 100, saves=range(5, 101, 5))
  assert len(read(path).marks) == 8
  ledger = run(path, passes, 31, 31)
  assert ledger.lost_steps == 69
  assert seconds(path) == {"start": 20, "steps": 62, "lost_steps": 138}


def test_what_was_saved_and_is_gone_counts_no_more(path, passes):
  run(path, passes, 0, 8, saves=[4, 8])
  run(path, passes, 4, 10, each=5)
  run(path, passes, 9, 9)
  assert seconds(path) == {"start": 30, "steps": 8 + 5 * 5, "lost_steps": 8 + 5}


def test_a_run_that_was_begun_without_an_account_counts_from_here(path, passes):
  ledger = run(path, passes, 1000, 1005)
  assert (ledger.steps, ledger.lost_steps) == (1005, 0)
  assert run(path, passes, 1000, 1000).lost_steps == 5
  assert seconds(path) == {"start": 20, "lost_steps": 10}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.floats(0, 9)), max_size=8))
def test_seconds_add_up_whatever_happens(processes):
  ledger, now = Ledger(0.0, 0.0), 0.0
  for back, taken, pause in processes:
    now += pause
    ledger.start(now)
    ledger.go_on(max(ledger.steps - back, 0))
    for _ in range(taken):
      ledger.steps += 1
      ledger.seconds["steps"] += 0.5
      now += 0.5
      ledger.mark(ledger.steps)
    ledger.last_sign_of_life = now
    assert ledger.wall_seconds == pytest.approx(now)
    assert ledger.seconds["steps"] == pytest.approx(ledger.steps / 2)
    assert ledger.seconds["lost_steps"] == pytest.approx(ledger.lost_steps / 2)
  assert 0 <= ledger.goodput <= 1


# The file.


def test_the_file_is_whole_at_every_write(path, passes):
  with Goodput(path) as goodput:
    assert json.loads(path.read_text())["starts"] == 1
    goodput.go_on(0)
    steps(goodput, passes, 1, 3)
    goodput.write()
    assert json.loads(path.read_text())["steps"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["goodput.json"]


def test_the_file_reads_back(path, passes):
  ledger = run(path, passes, 0, 10, saves=[4, 8])
  assert read(path) == ledger
  data = json.loads(path.read_text())
  assert list(data["seconds"]) == list(ACTIVITIES)
  assert data["first_start"] == "1970-01-12T13:46:40.000+00:00"
  assert data["format_version"] == 1


@pytest.mark.parametrize(
  "text",
  [
    "",
    '{"format_vers',
    "\xff\xfe",
    "[]",
    "7",
    "{}",
    '{"goodput": 1.0}',
    '{"format_version": 1}',
    '{"format_version": "one"}',
  ],
)
def test_a_file_of_somebody_else_is_told_and_kept(path, text):
  path.write_text(text, encoding="latin-1")
  with pytest.raises(InputError, match=r"goodput.json: holds what msjax did not write; .* away$"):
    Goodput(path)
  assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("field", ["seconds", "steps", "first_start", "step_seconds_when_saved"])
@pytest.mark.parametrize("value", [None, "soon", [1], {"steps": "many"}])
def test_a_damaged_field_is_told(path, passes, field, value):
  run(path, passes, 0, 1)
  data = json.loads(path.read_text())
  path.write_text(json.dumps({**data, field: value}))
  with pytest.raises(InputError, match="did not write"):
    Goodput(path)


def test_a_later_format_is_told(path, passes):
  run(path, passes, 0, 1)
  path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
  with pytest.raises(InputError, match=r"goodput.json: format_version 2, this msjax reads 1$"):
    Goodput(path)


def test_what_cannot_be_read_is_told(path):
  path.mkdir()
  with pytest.raises(InputError, match=r"goodput.json: cannot be read: Is a directory"):
    Goodput(path)


def no_space(*_):
  raise InputError("goodput.json: cannot be written: No space left on device")


def test_a_full_disk_ends_the_run(path, monkeypatch):
  goodput = Goodput(path).__enter__()
  monkeypatch.setattr(goodput_lib, "write_json", no_space)
  with pytest.raises(RunError, match="cannot be written: No space left on device"):
    goodput.write()


def test_a_full_disk_hides_no_other_error(path, monkeypatch):
  with pytest.raises(ZeroDivisionError), Goodput(path):
    monkeypatch.setattr(goodput_lib, "write_json", no_space)
    raise ZeroDivisionError


def test_only_the_first_process_writes(path, passes, monkeypatch):
  run(path, passes, 0, 3)
  before = path.read_bytes()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert run(path, passes, 0, 3).seconds["steps"] == 6
  assert path.read_bytes() == before


def test_when_this_process_began():
  before = time.time()
  code = "from msjax.training import goodput; import time; print(goodput.process_began())"
  printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
  assert before - 0.1 <= float(printed) <= time.time()
  if sys.platform == "linux":
    assert process_began() < goodput_lib._LOADED
