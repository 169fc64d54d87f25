"""Compiled steps written to a file and read back."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from msjax import sharding
from msjax.config import Config, ModelConfig, TrainConfig
from msjax.errors import InputError
from msjax.mesh import make_mesh
from msjax.training import stored
from msjax.training.begin import program
from msjax.training.state import Learner

CONFIG = Config(
  streams=("user:input", "output:output"),
  model=ModelConfig(dim=16, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_dim=16),
  train=TrainConfig(batch=2),
)
LEARNER = Learner(CONFIG, CONFIG.stream_set(silence_id=1), 11)


def on_a_mesh():
  return jax.set_mesh(make_mesh(CONFIG.mesh, jax.devices()[:1]))


@pytest.fixture(autouse=True)
def mesh():
  with on_a_mesh():
    yield


def batch():
  rng = np.random.default_rng(0)
  cells = (1, 2, 6, 2)
  grids = {
    "tokens": rng.integers(0, 11, cells).astype(np.int32),
    "weights": np.ones(cells, np.float32),
    "segments": np.ones(cells[:3], np.int32),
  }
  return sharding.joined(grids, 1, 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("stored") / "step"
  with on_a_mesh():
    stored.save(path, LEARNER, program(LEARNER, LEARNER.abstract(), batch()))
  return path


def test_a_step_read_back_is_the_step(file):
  remat, step = stored.load(file, LEARNER)
  assert remat == "dots"
  state, scalars = step(LEARNER.begun(), batch())
  expected, expected_scalars = LEARNER.jitted_step()(LEARNER.begun(), batch())
  jax.tree.map(np.testing.assert_array_equal, (state, scalars), (expected, expected_scalars))


def test_what_does_not_matter_may_differ(file):
  config = CONFIG.changed({"workdir": "x", "train.log_every": 3, "data.train": "y"})
  stored.load(file, dataclasses.replace(LEARNER, config=config))


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"config": CONFIG.changed({"optim.learning_rate": 0.5})}, "config.optim"),
    ({"config": CONFIG.changed({"data.rows": 8})}, "config.data"),
    ({"vocab_size": 12}, "vocabulary 11, here it is 12"),
    ({"streams": CONFIG.stream_set(silence_id=2)}, "streams"),
  ],
)
def test_a_step_of_another_run_is_refused(file, changes, named):
  with pytest.raises(InputError, match=named):
    stored.load(file, dataclasses.replace(LEARNER, **changes))


def test_a_step_of_another_compiler_is_refused(file, monkeypatch):
  monkeypatch.setattr(stored, "_version", lambda package: "0.1")
  with pytest.raises(InputError, match=r"compiled with jax '.+', here it is '0.1'; compile again"):
    stored.load(file, LEARNER)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04N."])
def test_a_file_that_is_no_step_is_refused(tmp_path, content):
  (tmp_path / "step").write_bytes(content)
  with pytest.raises(InputError, match=re.escape(f"--program {tmp_path / 'step'}: is no compiled")):
    stored.load(tmp_path / "step", LEARNER)
  with pytest.raises(InputError, match="cannot be read: No such file"):
    stored.load(tmp_path / "none", LEARNER)
