"""The files in configs/: each loads, is valid, and says what it is."""

import ast
import pathlib
import runpy

import pytest

from msjax import config_flag
from msjax.config import Config
from msjax.data import load
from msjax.training.state import Learner

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def config_of(path):
  return runpy.run_path(str(path))["get_config"]()


def test_there_are_some():
  assert {"quickstart", "chitchat"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_valid_and_has_a_work_directory_of_its_own(path):
  config = config_of(path)
  config.validate()
  assert config.workdir == f"runs/{path.stem}"
  assert Config.from_json(config.to_json()).changed({"baseline": config.baseline}) == config
  config_flag.check(["train", f"--config={path}"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_says_what_it_needs_gives_and_how_it_is_run(path):
  said = ast.get_docstring(ast.parse(path.read_text()))
  for word in ("machine", "time", "result", "command"):
    assert f"  {word} " in said
  assert f"python -m msjax.train --config=configs/{path.name}" in said


def test_quickstart_and_its_baseline_have_data_and_a_model():
  (path,) = (path for path in FILES if path.stem == "quickstart")
  config = config_of(path)
  for run in (config, config.baseline_run(), config.changed({"same_row": "hidden"})):
    data = load.load(run)
    assert data.train[0].tokens.shape[1] == len(run.streams)
    assert data.valid is not None
    Learner(run, data.streams, data.tokenizer.vocab_size).graphdef  # noqa: B018 - it is built
