"""The command `python -m msjax.train`, from its command line to what it leaves on disk."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import forked
import jax
import numpy as np
import pytest
from train_cases import (
  CONFIG,
  DEADLINE,
  SUMS,
  chat,
  complaints,
  environment,  # noqa: F401 - a fixture
  write,
)

from msjax.errors import InputError
from msjax.text import tokenizer_file
from msjax.training.checkpoint import load_params
from msjax.workdir import WorkDir


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A directory, made the current one, with a config, `train.jsonl` and `valid.jsonl`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.py").write_text(CONFIG)
  write(tmp_path / "train.jsonl", *(script(i) for i in range(9)), *(table(i) for i in range(4)))
  write(tmp_path / "valid.jsonl", *(script(i) for i in range(20, 26)))
  return tmp_path


def script(number):
  """Spans in which the output says three rows later what it has heard."""
  text = chr(ord("a") + number) * (2 + number % 5)
  spans = [{"stream": "user", "row": 0, "text": text}, {"stream": "output", "row": 3, "text": text}]
  return {"id": f"script-{number}", "streams": ["user", "output"], "spans": spans}


def table(number):
  rows = 4 + 3 * number
  return {"num_rows": rows, "token_ids": [list(range(rows)), [None, *range(1, rows)]]}


def arguments(*words, config="run.py", workdir="run"):
  return [f"--config={config}", f"--workdir={workdir}", *words]


def command(*words, **options):
  return forked.run("msjax.train", *arguments(*words, **options), timeout=DEADLINE)


def started(*words, log=os.devnull, **options):
  return forked.start("msjax.train", *arguments(*words, **options), stdout=os.devnull, stderr=log)


def metrics(workdir="run"):
  """Lines of metrics; the last may still be being written."""
  try:
    lines = WorkDir(workdir).metrics.read_text().splitlines(keepends=True)
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def saved(workdir="run"):
  """Steps of the whole checkpoints, and names of the others."""
  directory = WorkDir(workdir).checkpoints
  names = os.listdir(directory) if directory.exists() else []
  return (
    sorted(int(name) for name in names if name.isdigit()),
    [name for name in names if not name.isdigit()],
  )


def timeless(lines):
  return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same_parameters(one, other):
  read = lambda workdir: load_params(WorkDir(workdir).checkpoints, None)
  same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert all(jax.tree.leaves(jax.tree.map(same, read(one), read(other))))


# Killed at any moment.


def kill(process, moment):
  """Kills a process at a moment: freezes it, looks, and lets it go on until it is there."""
  deadline = time.monotonic() + DEADLINE
  try:
    while time.monotonic() < deadline:
      assert process.stop(), "the run ended before the moment came"
      if moment():
        return
      process.send_signal(signal.SIGCONT)
      time.sleep(0.002)
    raise AssertionError("the moment did not come")
  finally:
    process.kill()
    process.wait()


def before_the_first_step():
  return (WorkDir("run").path / "config.json").exists() and not metrics()


def between_two_checkpoints():
  steps, writing = saved()
  return bool(steps) and not writing and metrics()[-1]["step"] % 20 > 3


def while_a_checkpoint_is_written():
  steps, writing = saved()
  return bool(steps) and any(name.endswith(".orbax-checkpoint-tmp") for name in writing)


def in_an_evaluation():
  last = metrics()[-1:]
  return bool(last) and last[0]["kind"] == "train" and last[0]["step"] in (45, 90, 100)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_very_same_parameters(place):
  assert command(workdir="whole").returncode == 0
  moments = (
    before_the_first_step,
    while_a_checkpoint_is_written,
    between_two_checkpoints,
    in_an_evaluation,
  )
  for moment in moments:
    kill(started(), moment)
    assert moment()  # so it was left
  done = command()
  assert (done.returncode, complaints(done.stderr)) == (0, [])
  assert_same_parameters("run", "whole")
  assert timeless(metrics("run")) == timeless(metrics("whole"))
  assert saved("run") == saved("whole")
  counted = [(line["kind"], line["step"]) for line in metrics("run")]
  assert len(set(counted)) == len(counted) == 100 + 3


# Stopped by a signal, and reported.

CHATS = """
import run

def get_config():
  return run.get_config().changed({
    "data.pack": False,
    "data.rows": 32,
    "data.tokenizer": "bpe:300",
    "data.layout": "wait_k",
    "data.wait_k": 3,
    "train.steps": 400,
    "report": "likelihood",
    "baseline": {"data.only_one_stream": True, "train.batch": 16, "train.steps": 10},
  })
"""


def wait_for_step(process, step):
  deadline = time.monotonic() + DEADLINE
  while not metrics() or metrics()[-1]["step"] < step:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("name", "status", "word"),
  [("SIGTERM", 42, "stopped: by a signal"), ("SIGINT", 130, "interrupted")],
)
def test_a_signal_while_it_starts_is_one_line(place, monkeypatch, name, status, word):
  imports = f"import os, signal\nos.kill(os.getpid(), signal.{name})"
  (place / "stub").mkdir()
  (place / "stub" / "torch.py").write_text(imports)  # which tensorboardX tries
  monkeypatch.setenv("PYTHONPATH", str(place / "stub"), prepend=os.pathsep)
  done = subprocess.run(
    [sys.executable, "-m", "msjax.train", *arguments()],
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  assert (done.returncode, done.stdout) == (status, "")
  assert done.stderr == f"msjax.train: {word}; run again to go on\n"
  assert not (place / "run").exists()


@pytest.mark.slow
def test_a_run_is_stopped_goes_on_and_reports(place):
  (place / "chats.py").write_text(CHATS)
  write(place / "train.jsonl", *(chat(i) for i in range(12)))
  write(place / "valid.jsonl", *(chat(i) for i in range(12, 16)))
  process = started(config="chats.py", log="log")
  wait_for_step(process, 3)
  with pytest.raises(InputError, match=f"process {process.pid} is at work there"):
    WorkDir("run").lock().__enter__()
  process.send_signal(signal.SIGINT)
  assert process.wait(DEADLINE) == 42
  acknowledged, line = complaints((place / "log").read_text())
  assert acknowledged == "stopping: this step is taken and saved first"
  (step,) = re.fullmatch(
    r"msjax.train: stopped: by a signal, saved at step (\d+); run again to go on", line
  ).groups()
  step = int(step)
  assert saved()[0][-1] == step == metrics()[-1]["step"]
  tokenizer = (place / "run" / "tokenizer.json").read_bytes()
  assert tokenizer_file.load("run").vocab_size <= 300

  done = command(f"--config.train.steps={step + 20}", config="chats.py")
  assert (done.returncode, complaints(done.stderr)) == (0, [])
  assert f"going on from step {step}\n" in done.stderr
  assert f"config.train.steps: 400 until now, {step + 20} from here on\n" in done.stderr
  assert "━" not in done.stderr and "\r" not in done.stderr  # a bar is for terminals
  assert (place / "run" / "tokenizer.json").read_bytes() == tokenizer
  steps = [line["step"] for line in metrics() if line["kind"] == "train"]
  assert steps == list(range(1, step + 21))
  assert list((place / "run" / "tensorboard").glob("events.out.tfevents.*"))

  report, scores = WorkDir("run").report(), {"streams", "all"}
  assert set(report) == {*scores, "format_version", "train_seconds", "unigram", "baseline"}
  assert set(report["baseline"]) == {*scores, "train_seconds"}
  assert set(report["unigram"]) == scores
  assert set(report["streams"]) == {"user", "output"}
  (tokens,) = {part["all"]["tokens"] for part in (report, report["unigram"], report["baseline"])}
  assert tokens > 0  # the same cells are measured in all
  assert WorkDir("run/baseline").config().train.batch == 16
  for word in ("model", "unigram", "baseline", "bits a byte", "user", "output"):
    assert word in done.stdout


@pytest.mark.slow
def test_arithmetic_is_shown_and_reported_next_to_its_baseline(place):
  (place / "sums.py").write_text(SUMS)
  done = command(config="sums.py")
  assert (done.returncode, complaints(done.stderr)) == (0, [])
  report = WorkDir("run").report()
  figures = {"questions", "accuracy", "rows_to_first_answer", "rows_total", "train_seconds"}
  assert set(report) == {*figures, "format_version", "baseline"}
  assert set(report["baseline"]) == figures
  assert report["questions"] >= 500
  assert (report["baseline"]["rows_to_first_answer"], report["baseline"]["rows_total"]) == (12, 24)
  rows, _, table = done.stdout.rpartition("multi-stream")
  assert rows.count("  row  user") == 2  # two questions, row by row
  assert "=" in rows
  for label in ("accuracy on 500 held-out questions", "rows of the whole exchange", "24"):
    assert label in table


# What may go wrong on the way.


@pytest.mark.slow
def test_bad_records_are_skipped_counted_and_listed_and_a_terminal_gets_a_bar(place):
  late = chat(1)
  late["messages"][1]["time"] = -5
  write(place / "train.jsonl", "{", chat(0), {"messages": [{"role": "user"}]}, late, chat(2))
  words = ["--on_bad_record=skip", "--config.data.layout=timestamps", "--config.train.steps=4"]
  read_end, terminal = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, "-m", "msjax.train", *arguments(*words)],
    stdout=subprocess.DEVNULL,
    stderr=terminal,
  )
  os.close(terminal)
  shown = b""
  while chunk := read(read_end):
    shown += chunk
  os.close(read_end)
  assert process.wait(timeout=DEADLINE) == 0
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
  assert "━" in text and "4/4" in text  # the bar
  lines = re.findall(r"(?:^|[\n\r])\d\d:\d\d:\d\d  ([^\r]*)", text)  # it stands in no log line
  for number, problem in ((1, "json: "), (3, "messages[0].content: "), (4, "messages[1].time: ")):
    assert any(line.startswith(f"skipped: train.jsonl:{number}: {problem}") for line in lines)
  assert "3 bad records are left out" in lines
  assert "2 of 2 records are cut into windows of 16 rows" in lines
  assert any(line.startswith("step 4/4  eta 0:00  loss ") for line in lines)


def read(terminal):
  """What comes next, or nothing when the other end is closed."""
  try:
    return os.read(terminal, 2**16)
  except OSError:
    return b""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line(place):
  done = command("--config.optim.learning_rate=1e30", "--config.train.save_every=1")
  assert done.returncode == 1
  (line,) = complaints(done.stderr)
  assert re.match(
    r"msjax.train: error: step 2: loss \S+, gradient norm nan; last good checkpoint: "
    r"run/checkpoints/1; the batch's records: \S+",
    line,
  )
  assert saved() == ([1], [])
