"""The command `python -m msjax.decode`, and `msjax.load`, of which it prints the rows."""

import json
import os
import re
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import msjax
from msjax.config import Config, DataConfig, ModelConfig
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.checkpoint import Checkpoints
from msjax.training.state import Learner, TrainState
from msjax.workdir import WorkDir

BYTES = ByteTokenizer()
SILENCE = BYTES.silence_id
CONFIG = Config(
  streams=("user:input", "output:output", "door:input", "plan:internal"),
  model=ModelConfig(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8),
  data=DataConfig(train="train.jsonl", end_token=False),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory with checkpoints 10 and 20 of random parameters."""
  workdir = WorkDir(tmp_path_factory.mktemp("run"))
  streams = CONFIG.stream_set(SILENCE)
  workdir.claim(CONFIG, streams, BYTES, {})
  nothing = iter(grain.MapDataset.range(1).to_iter_dataset())
  with Checkpoints(workdir.checkpoints, keep=2) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, TrainState(step, params(step), ()), nothing, step / 10)
  return workdir.path


def params(step):
  """What lies in the checkpoint of a step."""
  learner = Learner(CONFIG, CONFIG.stream_set(SILENCE), BYTES.vocab_size)
  rng = np.random.default_rng(step)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)


def command(run, *words):
  """Decodes; what a terminal could change is kept the same."""
  return subprocess.run(
    [sys.executable, "-m", "msjax.decode", f"--workdir={run}", *words],
    capture_output=True,
    text=True,
    timeout=180,
    env={**os.environ, "PYTHONIOENCODING": "utf-8"},
  )


# Loading.


def test_a_run_is_loaded_with_its_streams_tokenizer_and_parameters(run):
  model = msjax.load(str(run))
  assert model.streams == CONFIG.stream_set(SILENCE)
  assert model.tokenizer.to_json() == BYTES.to_json()
  assert model.config == Config.from_json(CONFIG.to_json())


@pytest.mark.parametrize("step", ["latest", "best", 10, "20"])
def test_checkpoints_are_chosen_by_their_step(run, step):
  loaded = nnx.to_pure_dict(nnx.state(msjax.load(run, step=step).module, nnx.Param))
  jax.tree.map(
    np.testing.assert_array_equal, loaded, params({"latest": 20, "best": 10}.get(step) or int(step))
  )


# The command.


def test_a_table_shows_every_row_and_what_was_said(run):
  words = ["--user=hello", "--at=3:door:wait", "--at=9:user:: a b", "--rows=14"]
  done = command(run, *words)
  assert (done.returncode, done.stderr) == (0, "")
  header, *lines = done.stdout.splitlines()
  assert header.split() == ["row", "user", "output", "door", "plan"]
  rows = [line.split() for line in lines[:14]]
  assert [row[0] for row in rows] == [str(index) for index in range(14)]
  assert [row[1] for row in rows] == [*"hello", *"····", ":", "␣", "a", "␣", "b"]
  assert [row[3] for row in rows] == [*"···", *"wait", *"·······"]
  assert rows[0] == ["0", "h", "·", "·", "·"]  # nothing was read before
  assert lines[14:16] == ["", "user: hello: a b"]
  assert "\ndoor: wait\n" in done.stdout


def test_json_lines_hold_the_same_and_flags_reach_the_model(run):
  done = command(
    run, "--user=hi", "--rows=12", "--jsonl", "--temperature=1.5", "--seed=7", "--step=10"
  )
  assert (done.returncode, done.stderr) == (0, "")
  expected = msjax.load(run, step=10).generate({"user": "hi"}, rows=12, temperature=1.5, seed=7)
  assert [json.loads(line) for line in done.stdout.splitlines()] == [
    {"row": row.index, "tokens": row.tokens, "text": row.text} for row in expected
  ]


def test_a_log_is_replayed_and_a_file_of_prompts_answered(run, tmp_path):
  said = ["--user=hello", "--rows=12", "--temperature=1.5", "--policy=plan:ablated=true"]
  first = command(run, *said, f"--log={tmp_path}/log", "--jsonl")
  assert (first.returncode, first.stderr) == (0, "")
  words = [sys.executable, "-m", "msjax.decode", f"--replay={tmp_path}/log", "--jsonl"]
  again = subprocess.run(words, capture_output=True, text=True, timeout=180)
  assert (again.stdout, again.stderr) == (first.stdout, "")
  rows = [json.loads(line)["tokens"] for line in first.stdout.splitlines()]
  assert {row["plan"] for row in rows} == {SILENCE} != {row["output"] for row in rows}

  (tmp_path / "prompts").write_text('{"inputs": {"user": "hello"}, "rows": 12}\n')
  done = command(
    run, f"--prompts={tmp_path}/prompts", "--sessions=1", *said[2:], f"--out={tmp_path}/out"
  )
  told = f"{tmp_path}/out: 1 answered, beside 0 that were there\n"
  assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
  answer = json.loads((tmp_path / "out").read_text())
  assert answer["tokens"] == [list(row.values()) for row in rows]


def test_lines_are_talked_about(run):
  words = [sys.executable, "-m", "msjax.decode", f"--workdir={run}", "--interactive", "--jsonl"]
  mute = ["--policy=output:ablated=true", "--policy=plan:ablated=true"]
  done = subprocess.run(
    [*words, *mute], input="hi\ndoor: yo\n", capture_output=True, text=True, timeout=180
  )
  assert (done.returncode, done.stderr) == (0, "")
  texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
  assert ["".join(text[name] for text in texts) for name in ("user", "door")] == ["hi", "yo"]


MANY = """
import json, os, sys
from absl import logging
from msjax import cli, decode

logging.set_verbosity(logging.WARNING)
for words in json.load(sys.stdin):
  read_end, write_end = os.pipe()
  child = os.fork()  # importing takes longer than all that is tested here
  if not child:
    os.dup2(write_end, 2)
    sys.argv = ["msjax.decode", *words]
    try:
      cli.run(decode.main)
    except SystemExit as end:
      os._exit(end.code)
  os.close(write_end)
  with os.fdopen(read_end) as file:
    said = file.read()
  print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]))
"""

WRONG = {
  ("--user=hi", "there"): "'there': unexpected word; flags are written --name=value",
  ("--user=hi", "--at=3"): "--at: '3'; expected ROW:STREAM:TEXT, as in 12:user:stop",
  ("--user=hi", "--at=x:door:stop"): "--at: 'x:door:stop'; expected ROW:STREAM:TEXT",
  ("--user=hi", "--at=-1:door:stop"): "--at: '-1:door:stop'; expected ROW:STREAM:TEXT",
  ("--user=hi", "--at=3:door:"): "--at: '3:door:'; expected ROW:STREAM:TEXT",
  ("--user=hi", "--at=3:dor:stop"): "stream 'dor' is unknown: .*; did you mean 'door'",
  ("--user=hi", "--at=3:plan:stop"): "stream 'plan': the model writes it; .*: user, door",
  ("--user=hi", "--rows=0"): "rows: 0; expected 1 or more",
  ("--user=hi", "--rows=1"): "rows: 1 end before the given text, which takes 2 rows",
  ("--user=hi", "--rows=many"): "rows.*many",
  ("--user=hi", "--temperature=-1"): "temperature.*-1",
  ("--user=hi", "--step=7"): "no checkpoint of step 7; there are 10, 20, latest and best",
  ("--user=hi", "--usr=ho"): "--usr: no such flag; did you mean 'user'",
  ("--user=hi", "--policy=top_k=x"): "policy 'top_k=x': expected a whole number",
  ("--user=hi", "--policy=plan:top_p=2"): "session 0, stream 'plan': top_p: 2.0; expected more",
  ("--prompts=x", "--user=hi"): "--user: --prompts does not read it; leave it out",
  ("--user=hi", "--out=x"): "--out: the conversation does not read it; leave it out",
  ("--prompts=x", "--interactive"): "--prompts and --interactive: expected one of them",
  ("--prompts=nowhere",): "nowhere: cannot be read: No such file or directory",
  ("--replay=nowhere",): "nowhere: cannot be read: No such file or directory",
  ("--workdir=",): "--workdir: not given; expected the work directory of a trained run",
  ("--workdir=nowhere",): r"nowhere/config.json: not found; is nowhere the work directory of a run",
}


@pytest.fixture(scope="module")
def answers(run):
  done = subprocess.run(
    [sys.executable, "-c", MANY],
    input=json.dumps([[f"--workdir={run}", *words] for words in WRONG]),
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert done.returncode == 0, done.stderr
  return dict(zip(WRONG, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_is_one_line(answers, words):
  status, said = answers[words]
  assert status == 2
  assert re.fullmatch(f"msjax.decode: error: .*{WRONG[words]}.*\n", said), said
