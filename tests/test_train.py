"""The command `python -m msjax.train`, from its command line to what it leaves on disk."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from msjax.errors import InputError
from msjax.text import tokenizer as tokenizers
from msjax.training.checkpoint import load_params
from msjax.workdir import WorkDir

DEADLINE = 180  # seconds, for anything that is waited for
CONFIG = """
from msjax.config import *

def get_config():
  return Config(
    streams=("user:input", "output:output"),
    model=ModelConfig(
      dim=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, attention_dropout=0.2
    ),
    data=DataConfig(train="train.jsonl", valid="valid.jsonl", rows=64, pack=True),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(
      steps=60, batch=8, micro_batches=2, eval_every=25, save_every=20, log_every=1
    ),
  )
"""
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d  ")


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
  """Commands compile the same few programs: once, and not for speed."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    yield


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A directory, made the current one, with a config, `train.jsonl` and `valid.jsonl`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.py").write_text(CONFIG)
  write(tmp_path / "train.jsonl", *(script(i) for i in range(9)), *(table(i) for i in range(4)))
  write(tmp_path / "valid.jsonl", *(script(i) for i in range(20, 26)))
  return tmp_path


def write(path, *records):
  lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
  path.write_text("".join(line + "\n" for line in lines))


def script(number):
  """Spans in which the output says three rows later what it has heard."""
  text = chr(ord("a") + number) * (2 + number % 5)
  spans = [{"stream": "user", "row": 0, "text": text}, {"stream": "output", "row": 3, "text": text}]
  return {"id": f"script-{number}", "streams": ["user", "output"], "spans": spans}


def table(number):
  rows = 4 + 3 * number
  return {"num_rows": rows, "token_ids": [list(range(rows)), [None, *range(1, rows)]]}


def chat(number, **fields):
  """Messages; the assistant answers 2 seconds after the user."""
  said = f"quark {number} with bread"
  return {
    "messages": [
      {"role": "user", "content": said, "time": 0},
      {"role": "assistant", "content": said.upper(), "time": 2, **fields},
    ]
  }


def arguments(*words, workdir="run"):
  return ["--config=run.py", f"--workdir={workdir}", *words]


def command(*words, **options):
  return subprocess.run(
    [sys.executable, "-m", "msjax.train", *arguments(*words, **options)],
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )


def started(*words, **options):
  return subprocess.Popen(
    [sys.executable, "-m", "msjax.train", *arguments(*words, **options)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def complaints(stderr):
  """What a command says apart from its log."""
  return [line for line in stderr.splitlines() if not LOG_LINE.match(line)]


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
  while time.monotonic() < deadline:
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the run ended before the moment came"
    if moment():
      process.kill()
      process.communicate()
      return
    process.send_signal(signal.SIGCONT)
    time.sleep(0.002)
  process.kill()
  raise AssertionError("the moment did not come")


def before_the_first_step():
  return (WorkDir("run").path / "config.json").exists() and not metrics()


def between_two_checkpoints():
  steps, writing = saved()
  return bool(steps) and not writing and metrics()[-1]["step"] % 5 in (2, 3)


def while_a_checkpoint_is_written():
  steps, writing = saved()
  return bool(steps) and any(name.endswith(".orbax-checkpoint-tmp") for name in writing)


def in_the_last_evaluation():
  last = metrics()[-1:]
  return bool(last) and (last[0]["kind"], last[0]["step"]) == ("train", 40)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_very_same_parameters(place):
  assert command(workdir="whole").returncode == 0
  moments = (
    before_the_first_step,
    between_two_checkpoints,
    while_a_checkpoint_is_written,
    in_the_last_evaluation,
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
  assert len(set(counted)) == len(counted) == 40 + 3
