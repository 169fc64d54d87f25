"""The command `python -m msjax.train`, from its command line to what it leaves on disk."""

import json
import os
import pty
import re
import runpy
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from msjax.errors import InputError
from msjax.text import tokenizer_file
from msjax.text.tokenizer import ByteTokenizer
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
    data=DataConfig(train="train.jsonl", valid="valid.jsonl", rows=16, pack=True),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(
      steps=100, batch=8, micro_batches=2, eval_every=45, save_every=20, log_every=1
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


def arguments(*words, config="run.py", workdir="run"):
  return [f"--config={config}", f"--workdir={workdir}", *words]


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
  try:
    while time.monotonic() < deadline:
      process.send_signal(signal.SIGSTOP)
      _, status = os.waitpid(process.pid, os.WUNTRACED)
      assert os.WIFSTOPPED(status), "the run ended before the moment came"
      if moment():
        return
      process.send_signal(signal.SIGCONT)
      time.sleep(0.002)
    raise AssertionError("the moment did not come")
  finally:
    process.kill()
    process.communicate()


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

SUMS = """
import run

def get_config():
  return run.get_config().changed({
    "streams": ("user:input", "think:internal", "output:output"),
    "same_row": "inputs",
    "data.source": "arithmetic",
    "data.train": "",
    "data.valid": "",
    "data.end_token": False,
    "data.pack": False,
    "train.steps": 3,
    "train.eval_batches": 1,
    "report": "arithmetic",
    "baseline": {"streams": ("chat:output",), "data.chat": True, "data.rows": 24},
  })
"""


def wait_for_step(process, step):
  deadline = time.monotonic() + DEADLINE
  while not metrics() or metrics()[-1]["step"] < step:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.slow
def test_a_run_is_stopped_goes_on_and_reports(place):
  (place / "chats.py").write_text(CHATS)
  write(place / "train.jsonl", *(chat(i) for i in range(12)))
  write(place / "valid.jsonl", *(chat(i) for i in range(12, 16)))
  process = started(config="chats.py")
  wait_for_step(process, 3)
  with pytest.raises(InputError, match=f"process {process.pid} is at work there"):
    WorkDir("run").lock().__enter__()
  process.send_signal(signal.SIGINT)
  _, log = process.communicate(timeout=DEADLINE)
  assert process.returncode == 42
  acknowledged, line = complaints(log)
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


# Input that is wrong.

MANY = """
import json, os, sys
from msjax import cli, config_flag, train

for words in json.load(sys.stdin):
  read_end, write_end = os.pipe()
  child = os.fork()  # importing takes longer than all that is tested here
  if not child:
    os.dup2(write_end, 2)
    sys.argv = ["msjax.train", *words]
    try:
      cli.run(train.main, check=config_flag.check)
    except SystemExit as end:
      os._exit(end.code)
  os.close(write_end)
  with os.fdopen(read_end) as file:
    said = file.read()
  print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]))
"""

SAYS = {"role": "user", "content": "hi"}
OVERLAP = {
  "streams": ["user"],
  "spans": [{"stream": "user", "row": row, "text": "abc"} for row in (0, 2)],
}
BACKWARDS = {"messages": [{**SAYS, "time": 5}, {**SAYS, "time": 4}]}
WRONG_FILES = {
  "no json": ([SAYS, "{"], 1, "record: has none of messages, spans, token_ids"),
  "malformed": ([chat(0), '{"messages": '], 2, "json: .*; expected one JSON object a line"),
  "no text": ([{"messages": [{"role": "user"}]}], 1, r"messages\[0\].content: missing; expected"),
  "blank": (
    [{"messages": [{**SAYS, "content": " "}]}],
    1,
    r"messages\[0\].content: \" \"; expected",
  ),
  "overlap": ([OVERLAP], 1, r"spans\[1\]: rows 2 to 4 of stream 'user' overlap spans\[0\]"),
  "stream": (
    [chat(0), chat(1), chat(2, stream="outptu")],
    3,
    r"messages\[1\].stream: 'outptu' is none of .*\(user, output\); did you mean 'output'",
  ),
  "role": ([{"messages": [{**SAYS, "role": "narrator"}]}], 1, r"messages\[0\].role: 'narrator'"),
  "token": (
    [chat(0), {"num_rows": 2, "token_ids": [[1, 2], [3, 259]]}],
    2,
    r"token_ids\[1\]\[1\]: 259 is outside the vocabulary; expected ids below 259",
  ),
  "backwards": ([BACKWARDS], 1, r"messages\[1\].time: 4.0 runs backwards; expected 5.0"),
}
WRONG_FLAGS = {
  "--config=run.py --workdir=w --config.data.train=empty.jsonl": "empty.jsonl: the file has no rec",
  "--config=run.py --workdir=w --config.data.train=none.jsonl": "none.jsonl: cannot be read: No su",
  "--config=run.py --workdir=w --config.data.valid=overlap.jsonl": r"overlap.jsonl:1: spans\[1\]: ",
  "--config=run.py --workdir=w --config.train.steps=many": "'many' is not a whole number",
  "--config=run.py --workdir=w --config.train.stepz=3": "did you mean 'steps'",
  "--config=run.py --workdir=w --config.train.steps=0": "config.train.steps: 0 is not allowed",
  "--config=run.py --workdir=w --config.data.wait_k=1 --config.data.layout=wait_k": "at least 2",
  "--config=run.py --workdir=w --config.data.tokenizer=none.json": "none.json: No such file",
  "--config=run.py --workdir=w --on_bad_record=skp": "on_bad_record.*skp.*stop.*skip",
  "--config=run.py --workdir=w --wordkir=x": "--wordkir: no such flag; did you mean 'workdir'",
  "--config=run.py --workdir=w word": "'word': unexpected word",
  "--config=run.py": "--workdir: not given, and this config has no default; expected a directory",
  "--config=none.py --workdir=w": "--config: 'none.py' is no file; expected one such as configs/q",
  "--workdir=w": "--config: not given; expected a file, as in --config=configs/quickstart.py",
  "--config=dict.py --workdir=w": r"get_config\(\) returned dict; expected a msjax.config.Config",
  "--config=typed.py --workdir=w": "config.train.batch: '4' is not allowed; expected a whole num",
  "--config=typo.py --workdir=w": r"typo.py: .* config file:\s+TypeError: .* argument 'stepz'$",
  "--config=syntax.py --workdir=w": r"syntax.py:2: expected ':'",
  "--config=none_such.py --workdir=w": r"none_such.py:1: ModuleNotFoundError: .*'none_such_module'",
  "--config=empty.py --workdir=w": r"empty.py has no get_config\(\)",
  "--config=run.py --workdir=run.py": "--workdir run.py: is a file; expected a directory",
  "--config=run.py --workdir=run.py/run": "--workdir run.py/run: is a file; expected a directory",
  "--config=sums.py --workdir=w --config.data.max_ops=12": (
    "config.baseline: config.data.rows: 24; .* with 12 operations takes 28; --nobaseline"
  ),
  "--config=run.py --workdir=taken --config.model.dim=64": "holds a run with config.model.dim = 32",
  "--config=run.py --workdir=taken --config.streams=('a:input','b:output')": "config.streams = ",
  "--config=run.py --workdir=taken --config.data.tokenizer=bpe:300": "config.data.tokenizer = 'byt",
}
REFUSED_BY_THE_SYSTEM = {"--config=run.py --workdir=/proc/run": "No such file or dir.*/proc/run"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """Status and standard error by command line; what lay in the taken directory before and after;
  whether another was made."""
  path = tmp_path_factory.mktemp("wrong")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(path)
    for name, text in (
      ("run", CONFIG),
      ("dict", "def get_config():\n  return {}\n"),
      ("typed", CONFIG.replace("batch=8", "batch='4'")),
      ("typo", CONFIG.replace("steps=", "stepz=")),
      ("syntax", "\ndef get_config()\n"),
      ("none_such", "import none_such_module\nget_config = None\n"),
      ("empty", ""),
      ("sums", SUMS),
    ):
      (path / f"{name}.py").write_text(text)
    write(path / "train.jsonl", chat(0))
    write(path / "valid.jsonl", chat(1))
    write(path / "empty.jsonl")
    for name, (records, _, _) in WRONG_FILES.items():
      write(path / f"{name.replace(' ', '_')}.jsonl", *records)
    config = runpy.run_path("run.py")["get_config"]()
    tokenizer = ByteTokenizer()
    with WorkDir("taken").lock():
      WorkDir("taken").claim(config, config.stream_set(tokenizer.silence_id), tokenizer, {})
    (path / "taken" / "metrics.jsonl").write_text("{}\n")
    (path / "taken" / "checkpoints" / "1").mkdir(parents=True)
    mine = lambda p: p.is_file() and p.name != ".lock"
    contents = lambda: {p: p.read_bytes() for p in path.glob("taken/**/*") if mine(p)}
    before = contents()
    lines = [file_line(name) for name in WRONG_FILES]
    lines += [line for part in (WRONG_FLAGS, REFUSED_BY_THE_SYSTEM) for line in part]
    done = subprocess.run(
      [sys.executable, "-c", MANY],
      input=json.dumps([line.split() for line in lines]),
      capture_output=True,
      text=True,
      timeout=DEADLINE,
    )
  assert done.returncode == 0, done.stderr
  return (
    dict(zip(lines, map(json.loads, done.stdout.splitlines()))),
    before,
    contents(),
    (path / "w").exists(),
  )


def file_line(name):
  """The command line that reads a wrong file."""
  layout = " --config.data.layout=timestamps" if name == "backwards" else ""
  file = f"{name.replace(' ', '_')}.jsonl"
  return f"--config=run.py --workdir=w --config.data.train={file}{layout}"


def assert_one_line(answer, status, message):
  assert answer[0] == status
  (line,) = complaints(answer[1])
  assert re.match(f"msjax.train: error: .*{message}", line), line


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_record_is_one_line_with_file_line_and_field(answers, name):
  _, number, message = WRONG_FILES[name]
  file = f"{name.replace(' ', '_')}.jsonl"
  assert_one_line(answers[0][file_line(name)], 2, f"{file}:{number}: {message}")


@pytest.mark.parametrize("line", WRONG_FLAGS)
def test_a_wrong_flag_or_config_is_one_line(answers, line):
  assert_one_line(answers[0][line], 2, WRONG_FLAGS[line])


@pytest.mark.parametrize("line", REFUSED_BY_THE_SYSTEM)
def test_what_the_system_refuses_is_one_line(answers, line):
  assert_one_line(answers[0][line], 1, REFUSED_BY_THE_SYSTEM[line])


def test_nothing_is_lost_in_the_directory_of_another_run(answers):
  _, before, after, _ = answers
  assert after == before


def test_a_start_that_fails_makes_no_directory(answers):
  assert not answers[-1]
