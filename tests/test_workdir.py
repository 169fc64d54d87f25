import json
import logging
import os

import forked
import pytest

from msjax.config import Config, DataConfig, ModelConfig, RopeScaling, TrainConfig
from msjax.errors import InputError
from msjax.text.hf_tokenizer import HfTokenizer, train_bpe
from msjax.text.tokenizer import ByteTokenizer
from msjax.workdir import WorkDir, write_json

BYTES = ByteTokenizer()
CONFIG = Config(
  model=ModelConfig(rope_scaling=RopeScaling(factor=4.0)),
  data=DataConfig(train="train.jsonl"),
  train=TrainConfig(steps=10),
  baseline={"streams": ("chat:output",), "train.steps": 5},
)


DATA = {"train": "abc", "valid": "def"}


@pytest.fixture
def workdir(tmp_path):
  """A work directory of a run with CONFIG."""
  workdir = WorkDir(tmp_path / "run")
  with workdir.lock():
    workdir.claim(CONFIG, CONFIG.stream_set(BYTES.silence_id), BYTES, DATA)
  (workdir.checkpoints / "1").mkdir(parents=True)
  return workdir


def claim(workdir, config=CONFIG, tokenizer=BYTES, streams=None, data=DATA):
  workdir.claim(config, streams or config.stream_set(tokenizer.silence_id), tokenizer, data)


def test_what_the_run_is_lies_in_its_directory(workdir):
  assert WorkDir(workdir.path).config().changed({"baseline": CONFIG.baseline}) == CONFIG
  assert workdir.streams() == CONFIG.stream_set(BYTES.silence_id)
  assert workdir.tokenizer().to_json() == BYTES.to_json()
  for name in ("config.json", "streams.json", "tokenizer.json", "data.json"):
    assert json.loads((workdir.path / name).read_text())["format_version"] == 1
  assert not [path for path in workdir.path.iterdir() if "tmp" in path.name]


def test_the_same_run_claims_its_directory_again_without_a_word(workdir, caplog):
  caplog.set_level(logging.INFO, "absl")
  claim(workdir)
  assert caplog.messages == []


@pytest.mark.parametrize(
  "changes, field",
  [
    ({"model.dim": 32}, "model.dim = 64, this one has 32"),
    ({"model.rope_scaling": None}, "model.rope_scaling.factor = 4.0, this one has None"),
    ({"model.rope_scaling.factor": 8.0}, "model.rope_scaling.factor = 4.0, this one has 8.0"),
    ({"data.pack": True}, "data.pack = False, this one has True"),
    ({"data.tokenizer": "bpe:300"}, "data.tokenizer = 'bytes', this one has 'bpe:300'"),
    ({"streams": ("a:input", "b:output")}, "streams = "),
    ({"same_row": "inputs"}, "same_row = 'hidden', this one has 'inputs'"),
    ({"skip_silence": True}, "skip_silence = False, this one has True"),
    ({"train.batch": 8}, "train.batch = 32, this one has 8"),
    ({"train.seed": 1}, "train.seed = 0, this one has 1"),
    ({"init_from": "elsewhere"}, "init_from = '', this one has 'elsewhere'"),
  ],
)
def test_another_run_is_refused_and_touches_nothing(workdir, changes, field):
  before = {path: path.read_bytes() for path in workdir.path.iterdir() if path.is_file()}
  with pytest.raises(InputError, match=f"--workdir .*run: holds a run with config.{field}"):
    claim(workdir, CONFIG.changed(changes))
  assert {path: path.read_bytes() for path in before} == before


def test_a_directory_without_a_checkpoint_is_anybodys(workdir):
  (workdir.checkpoints / "1").rename(workdir.checkpoints / "1.orbax-checkpoint-tmp")
  changed = CONFIG.changed({"init_from": "elsewhere"})
  claim(workdir, changed)
  assert workdir.config() == Config.from_json(changed.to_json())


def test_storage_that_is_no_directory_is_refused():
  with pytest.raises(InputError, match="--workdir gs://bucket/run: expected a directory"):
    WorkDir("gs://bucket/run")


@pytest.mark.parametrize(
  "changes, lines",
  [
    ({"train.steps": 20}, ["config.train.steps: 10 until now, 20 from here on"]),
    (
      {"optim.learning_rate": 0.5, "optim.schedule": "cosine"},
      [
        "config.optim.learning_rate: 0.001 until now, 0.5 from here on",
        "config.optim.schedule: 'constant' until now, 'cosine' from here on",
      ],
    ),
    ({"baseline": {}}, ["config.baseline.streams: ('chat:output',) until now, None from here on"]),
    ({"workdir": "elsewhere", "data.on_bad_record": "skip", "model.remat": "full"}, []),
    ({"data.train": "moved.jsonl", "data.valid": "moved too.jsonl"}, []),
  ],
)
def test_what_may_change_is_told_and_kept(workdir, caplog, changes, lines):
  caplog.set_level(logging.INFO, "absl")
  changed = CONFIG.changed(changes)
  claim(workdir, changed)
  assert caplog.messages[: len(lines)] == lines
  assert bool(caplog.messages) == bool(lines)
  assert workdir.config() == Config.from_json(changed.to_json())


def test_steps_are_not_untaken(workdir):
  (workdir.checkpoints / "10").mkdir()
  claim(workdir)
  with pytest.raises(InputError, match=r"config.train.steps: 9, but .*run has taken 10; expected"):
    claim(workdir, CONFIG.changed({"train.steps": 9}))
  assert workdir.config().train.steps == 10


def test_data_of_another_version_is_told(workdir):
  write_json(workdir.path / "data.json", {"format_version": 2, **DATA})
  with pytest.raises(InputError, match=r"data.json: format_version 2, this msjax reads 1"):
    claim(workdir)


def test_a_tokenizer_or_streams_that_changed_under_the_same_name_are_refused(workdir):
  with pytest.raises(InputError, match=r"streams.json or tokenizer.json is not this run's"):
    claim(workdir, tokenizer=ByteTokenizer(added=("+3",)))
  with pytest.raises(InputError, match=r"streams.json or tokenizer.json is not this run's"):
    claim(workdir, streams=CONFIG.stream_set(silence_id=7))


@pytest.mark.parametrize(
  "data", [{**DATA, "valid": "changed"}, {"train": "abc"}, {**DATA, "valid": ""}]
)
def test_data_that_changed_is_refused(workdir, data):
  before = (workdir.path / "data.json").read_bytes()
  with pytest.raises(InputError, match=r"config.data.valid: not the data with which the run in"):
    claim(workdir, data=data)
  assert (workdir.path / "data.json").read_bytes() == before


def test_the_silence_that_was_chosen_comes_back_with_the_tokenizer(tmp_path):
  bpe = train_bpe(["a bit of text"], 300)
  chosen = HfTokenizer(bpe.to_json(), silence="<pad>")
  workdir = WorkDir(tmp_path)
  claim(workdir, tokenizer=chosen)
  assert workdir.tokenizer().silence_id == chosen.silence_id != bpe.silence_id


# The lock.


IMPORTS = """
import os, signal
from msjax.errors import InputError
from msjax.workdir import WorkDir
"""


def test_a_second_trainer_is_refused_and_told_who_holds_the_directory(tmp_path):
  workdir = WorkDir(tmp_path / "run")
  other = f"""{IMPORTS}
try:
  with WorkDir({str(workdir.path)!r}).lock():
    print("locked")
except InputError as error:
  print(error)
"""
  attempt = lambda: forked.run(other).stdout
  with workdir.lock():
    assert f"process {os.getpid()} is at work there" in attempt()
    with pytest.raises(InputError, match="is at work there; wait for it or use another"):
      workdir.lock().__enter__()
  assert attempt() == "locked\n"


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
  holder = f"""{IMPORTS}
with WorkDir({str(tmp_path)!r}).lock():
  os.kill(os.getpid(), signal.SIGKILL)
"""
  assert forked.run(holder).returncode == -9
  assert (tmp_path / ".lock").read_text().isdigit()
  with WorkDir(tmp_path).lock():
    assert (tmp_path / ".lock").read_text() == str(os.getpid())


# Files.


def test_reports_have_a_version(tmp_path):
  WorkDir(tmp_path).write_report({"accuracy": 1.0, "baseline": {"accuracy": 0.5}})
  assert WorkDir(tmp_path).report() == {
    "format_version": 1,
    "accuracy": 1.0,
    "baseline": {"accuracy": 0.5},
  }


def test_the_baseline_lies_inside():
  assert WorkDir("runs/x").baseline.path == WorkDir("runs/x/baseline").path


def test_a_directory_of_no_run_and_a_broken_file_are_told(tmp_path):
  with pytest.raises(
    InputError, match=r"config.json: not found; is .* the work directory of a run"
  ):
    WorkDir(tmp_path).config()
  (tmp_path / "config.json").write_text('{\n"streams": ]')
  with pytest.raises(InputError, match=r"config.json:2: is no JSON: Expecting value"):
    WorkDir(tmp_path).config()


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "x.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": 2, "b": object()})
  assert json.loads(path.read_text()) == {"a": 1}


# Shared by many processes.


def test_a_mark_that_is_seen_is_of_this_very_start(tmp_path):
  here, elsewhere = WorkDir(tmp_path / "here"), WorkDir(tmp_path / "elsewhere")
  for workdir in (here, elsewhere):
    workdir.path.mkdir()
  elsewhere.mark()  # left by another run
  mark = here.mark()
  here.check_shared(mark, timeout=0)
  for workdir in (elsewhere, WorkDir(tmp_path / "nowhere")):
    with pytest.raises(InputError, match=r"not the directory in which process 0 has left a mark"):
      workdir.check_shared(mark, timeout=0)
  assert here.mark() != mark


def test_a_mark_may_take_its_time_to_be_seen(tmp_path, monkeypatch):
  mark = WorkDir(tmp_path).mark()
  monkeypatch.setattr("msjax.workdir.time.sleep", lambda _: (tmp_path / ".mark").write_text(mark))
  (tmp_path / ".mark").unlink()
  WorkDir(tmp_path).check_shared(mark)
