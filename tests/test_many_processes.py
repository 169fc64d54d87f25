"""The command `python -m msjax.train` in many processes."""

import fcntl
import json
import re
import shutil
import signal
import time

import forked
import jax
import numpy as np
import pytest
from test_rollcall import free_port
from train_cases import (
  DEADLINE,
  LOG_LINE,
  environment,  # noqa: F401 - a fixture
  write,
)

from msjax.training.checkpoint import load_params
from msjax.training.goodput import read
from msjax.workdir import WorkDir

pytestmark = pytest.mark.slow

# A step has no rounding noise that Adam would make large: the curve is the same on any mesh.
CONFIG = """
from msjax.config import *

def get_config():
  return Config(
    streams=("user:input", "output:output"),
    model=ModelConfig(dim=8, layers=1, heads=4, kv_heads=4, head_dim=4, mlp_dim=8),
    data=DataConfig(train="train.jsonl", valid="valid.jsonl", rows=16, pack=True),
    optim=OptimConfig(learning_rate=1e-2, eps=1e-2),
    train=TrainConfig(
      steps=100_000, batch=8, micro_batches=2, eval_every=0, save_every=100_000, log_every=1
    ),
  )
"""
GLOO = "[Gloo] Rank "


def table(number):
  rows = 3 + 5 * number % 13
  ids = [[(7 * number + stream + row) % 256 for row in range(rows)] for stream in range(2)]
  return {"num_rows": rows, "token_ids": ids}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory with a config and its data."""
  return furnished(tmp_path_factory.mktemp("place"))


def furnished(path):
  (path / "run.py").write_text(CONFIG)
  write(path / "train.jsonl", *(table(i) for i in range(37)))
  write(path / "valid.jsonl", *(table(i) for i in range(40, 45)))
  return path


class Run:
  """Processes that run the command, each in its own directory and with its own log file."""

  def __init__(self, places, *words, workdir="run", each=None):
    """Starts one process in each directory; `each` has words of each of them."""
    count, port = len(places), free_port()
    self.logs = [place / f"{workdir}-{port}-{i}.log" for i, place in enumerate(places)]
    self.processes = []
    for process, place in enumerate(places):
      arguments = [
        "--config=run.py",
        f"--workdir={workdir}",
        *words,
        *(each or {}).get(process, ()),
      ]
      if count > 1:
        arguments += [
          "--coordinator_address=localhost",
          f"--coordinator_port={port}",
          f"--num_processes={count}",
          f"--process_id={process}",
        ]
      log = self.logs[process]
      log.touch()
      self.processes.append(
        forked.start(
          "msjax.train",
          *arguments,
          cwd=place,
          stdout=log,
          stderr=log,
          umask=0o077 if process else 0o022,  # tells who has made a file
        )
      )
    self.workdir = WorkDir(places[0] / workdir)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self, process):
    return self.logs[process].read_text().splitlines()

  def wait_until(self, moment):
    deadline = time.monotonic() + DEADLINE
    while not moment():
      ended = [process.poll() for process in self.processes]
      assert set(ended) == {None} and time.monotonic() < deadline, (ended, self.said(0))
      time.sleep(0.02)

  def wait_for_step(self, step):
    self.wait_until(lambda: any(line["step"] >= step for line in metrics(self.workdir)))

  def wait_for_line(self, process, part):
    self.wait_until(lambda: any(part in line for line in self.said(process)))

  def ended(self):
    """Of each process its status and what it said apart from its log."""
    statuses = [process.wait(timeout=DEADLINE) for process in self.processes]
    complaints = [
      [line for line in self.said(process) if not LOG_LINE.match(line) and GLOO not in line]
      for process in range(len(self.processes))
    ]
    return list(zip(statuses, complaints))


def metrics(workdir):
  """Lines of metrics; the last may still be being written."""
  try:
    lines = workdir.metrics.read_text().splitlines(keepends=True)
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def saved(workdir):
  return sorted(int(path.name) for path in workdir.checkpoints.iterdir())


def between_checkpoints(workdir, after):
  """Whether a later one than `after` stands, and none is being written or soon will be."""
  names = [path.name for path in workdir.checkpoints.glob("*")]
  whole = all(name.isdigit() for name in names) and any(int(name) > after for name in names)
  return whole and 5 < metrics(workdir)[-1]["step"] % SAVE_EVERY < 30


def finished(places, steps, *words, **options):
  """The work directory of a run that ends well."""
  with Run(places, f"--config.train.steps={steps}", *words, **options) as run:
    assert run.ended() == [(0, [])] * len(places)
    return run.workdir


# Stopped, and gone on with by as many processes or another number.

COUNTS = (2, 4)


@pytest.fixture(scope="module")
def stopped(place):
  """By number of processes: what each ended with when one had been sent a signal, and the work
  directory."""
  runs = {}
  for count in COUNTS:
    with Run([place] * count, workdir=f"stopped-{count}") as run:
      run.wait_for_step(2)
      run.processes[-1].send_signal(signal.SIGTERM)
      runs[count] = run.ended(), run.workdir
  return runs


@pytest.fixture(scope="module")
def steps(stopped):
  """How many are taken in all."""
  return max(saved(workdir)[-1] for _, workdir in stopped.values()) + 5


@pytest.fixture(scope="module")
def whole(place, steps):
  """Uninterrupted runs by number of processes."""
  return {count: finished([place] * count, steps, workdir=f"whole-{count}") for count in COUNTS}


@pytest.fixture(scope="module")
def resumed(place, stopped, steps):
  """A function that goes on with a stopped run, once for each way to."""
  runs = {}

  def go_on(before, count, *words):
    key = before, count, *words
    if key not in runs:
      name = "-".join(map(str, ("resumed", before, count, len(words))))
      shutil.copytree(stopped[before][1].path, place / name)
      runs[key] = finished([place] * count, steps, *words, workdir=name)
    return runs[key]

  return go_on


def numbers(workdir):
  """All that a run has logged, but for times: [line, name], and what it is of."""
  lines = [{k: v for k, v in line.items() if timeless(k)} for line in metrics(workdir)]
  return [(line.pop("kind"), line.pop("step")) for line in lines], lines


def timeless(name):
  return "second" not in name and name != "format_version"


def params(workdir):
  return load_params(workdir.checkpoints, None)


@pytest.mark.parametrize("count", COUNTS)
def test_a_signal_to_one_process_ends_all_at_the_same_saved_step(stopped, count):
  ended, workdir = stopped[count]
  (step,) = saved(workdir)
  assert step == metrics(workdir)[-1]["step"]
  last_words = f"msjax.train: stopped: by a signal, saved at step {step}; run again to go on"
  for status, (*before, line) in ended:
    assert (status, line) == (42, last_words)
    assert all("SIGTERM caught" in noted for noted in before)  # by JAX, where the signal came


@pytest.mark.parametrize("count", COUNTS)
def test_as_many_processes_go_on_to_the_very_same(resumed, whole, count):
  again = resumed(count, count)
  assert numbers(again) == numbers(whole[count])
  same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert all(jax.tree.leaves(jax.tree.map(same, params(again), params(whole[count]))))


@pytest.mark.parametrize(
  "before, count, words",
  [
    (2, 4, ["--config.mesh.model=2"]),
    (4, 2, ["--config.mesh.data=2", "--config.mesh.fsdp=1"]),
    (2, 1, []),
    (4, 1, []),
  ],
)
def test_another_number_of_processes_goes_on_as_near_as_rounding(
  resumed, whole, before, count, words
):
  assert_near(resumed(before, count, *words), whole[before])


def test_two_and_four_processes_train_the_same(whole):
  assert_near(whole[2], whole[4])


def assert_near(one, other):
  (kinds, lines), (other_kinds, other_lines) = numbers(one), numbers(other)
  assert kinds == other_kinds
  for line, other_line in zip(lines, other_lines):
    assert line == pytest.approx(other_line, rel=1e-5)
  apart = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
  assert max(jax.tree.leaves(jax.tree.map(apart, params(one), params(other)))) < 1e-5


def test_process_0_alone_writes_but_for_its_part_of_checkpoints(stopped, resumed, steps):
  resumed(2, 2)
  workdir = resumed(2, 2)
  of_others = [
    str(path.relative_to(workdir.path))
    for path in workdir.path.rglob("*")
    if path.is_file() and not path.stat().st_mode & 0o044
  ]
  assert of_others and all(re.match(r"checkpoints/\d+/.*process_1", name) for name in of_others)
  trained = [(line["kind"], line["step"]) for line in metrics(workdir)]
  assert trained == [("train", step) for step in range(1, steps + 1)] + [("valid", steps)]
  ledger = read(workdir.goodput)
  assert (ledger.starts, ledger.steps, ledger.lost_steps) == (2, steps, 0)
  assert len(list((workdir.path / "tensorboard").iterdir())) == 2


# Refused.


def refused(*places, **options):
  """What each process says in the end: one line, and status 2."""
  with Run(places, "--config.train.steps=1", **options) as run:
    return last_words(run)


def last_words(run):
  statuses, said = zip(*run.ended())
  assert set(statuses) == {2}
  assert all(len(lines) == 1 for lines in said), said
  return [lines[0].removeprefix("msjax.train: error: ") for lines in said]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
  """Another host's directory."""
  return furnished(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module", autouse=True)
def unshared(place, elsewhere):
  """A run whose work directory is another on each host. It takes a minute to be sure of that."""
  with Run([place, elsewhere], workdir="unshared") as run:
    yield run


def whose(process, line):
  """What another process hears."""
  return re.compile(rf"process {process} \(host [^ ]+\): {re.escape(line)}")


def test_a_config_that_differs_is_told_by_its_field(place):
  here, there = refused(place, place, each={1: ["--config.optim.learning_rate=0.5"]})
  expected = "config.optim.learning_rate: 0.5 in process 1, 0.01 in process 0; expected the same"
  assert there.startswith(expected)
  assert whose(1, there).fullmatch(here)


def test_data_that_differ_are_told(place, elsewhere):
  write(elsewhere / "train.jsonl", *(table(i) for i in range(36)))
  here, there = refused(place, elsewhere, workdir="other-data")
  assert re.match(
    r"the digest of config.data.train: '\w+' in process 1, '\w+' in process 0;", there
  )
  assert whose(1, there).fullmatch(here)
  assert not (place / "other-data").exists()


def test_a_wrong_record_that_process_0_alone_reads_ends_all(place, elsewhere):
  write(elsewhere / "train.jsonl", table(0), "{")
  here, there = refused(elsewhere, place, workdir="wrong-data")
  assert here.startswith("train.jsonl:2: json: ")
  assert whose(0, here).fullmatch(there)


def test_a_locked_work_directory_ends_all(place):
  (place / "locked").mkdir()
  with open(place / "locked" / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write("4711")
    lock.flush()
    here, there = refused(place, place, workdir="locked")
  assert here == "locked: process 4711 is at work there; wait for it or use another directory"
  assert whose(0, here).fullmatch(there)


def test_what_process_0_alone_finds_wrong_later_ends_all(place):
  (place / "spoilt").mkdir()
  (place / "spoilt" / "goodput.json").write_text("{}")
  here, there = refused(place, place, workdir="spoilt")
  assert here.startswith("spoilt/goodput.json: holds what msjax did not write")
  assert whose(0, here).fullmatch(there)


# Killed.

SAVE_EVERY = 50


def test_what_becomes_of_a_run_whose_processes_are_killed(place):
  often = f"--config.train.save_every={SAVE_EVERY}"
  with Run([place] * 2, often, workdir="killed") as run:
    run.wait_until(lambda: between_checkpoints(run.workdir, 0))
    run.processes[1].kill()
    (status, said), _ = run.ended()
    assert status == 1
    (line,) = said
    assert re.match(r"msjax.train: error: another process is gone: .*; run again to go on$", line)
  last = saved(run.workdir)[-1]

  with Run([place] * 2, often, workdir="killed") as run:  # told to stop before it has begun
    run.wait_for_line(1, "work directory")
    run.processes[1].send_signal(signal.SIGTERM)
    assert [status for status, _ in run.ended()] == [42, 42]
    assert any(f"going on from step {last}" in line for line in run.said(0))
  now = saved(run.workdir)[-1]
  assert now > last

  with Run([place] * 2, often, workdir="killed") as run:
    run.wait_until(lambda: between_checkpoints(run.workdir, now))
    run.processes[0].kill()  # which JAX needs to tell the others
    _, (status, _) = run.ended()
    assert status != 0
  last = saved(run.workdir)[-1]

  with Run([place] * 2, often, workdir="killed") as run:
    run.wait_for_line(0, f"step {last + 2}/")  # metrics.jsonl may have had it
    for process in run.processes:  # as by Ctrl-C at a terminal
      process.send_signal(signal.SIGINT)
    assert [status for status, _ in run.ended()] == [42, 42]
    assert any(f"going on from step {last}" in line for line in run.said(0))
  steps = [line["step"] for line in metrics(run.workdir)]
  assert steps == list(range(1, saved(run.workdir)[-1] + 1))


def test_a_work_directory_that_is_not_shared_ends_all(unshared):
  here, there = last_words(unshared)
  assert there.startswith(
    "--workdir unshared: not the directory in which process 0 has left a mark"
  )
  assert whose(1, there).fullmatch(here)
