"""What `python -m msjax.train` says of input that is wrong."""

import json
import re
import runpy
import subprocess
import sys

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

from msjax.text.tokenizer import ByteTokenizer
from msjax.workdir import WorkDir

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
