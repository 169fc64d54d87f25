"""Presets against the config.json and the number of parameters of the checkpoints they name."""

import json
import pathlib

import jax
import pytest

from msjax.config import Config
from msjax.errors import InputError
from msjax.hub.config import model_config
from msjax.models.presets import PRESETS, preset
from msjax.training.state import Learner

# Where each came from stands in the file.
PUBLISHED = json.loads((pathlib.Path(__file__).parent / "golden" / "hub_configs.json").read_text())
MODELS = PUBLISHED["models"]


def test_every_preset_has_its_published_figures():
  assert set(PRESETS) == set(MODELS)
  assert {model["source"] for model in MODELS.values()} < set(PUBLISHED["sources"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_config_json_says(name):
  published = MODELS[name]["config"]
  expected = model_config(published, name)
  expected.vocab_size = published["vocab_size"]
  config = Config(model=preset(name))
  config.data.train = "train.jsonl"
  config.validate()
  assert config.model == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_checkpoint(name):
  config = Config(model=preset(name))
  learner = Learner(config, config.stream_set(silence_id=0), config.model.vocab_size)
  params = jax.eval_shape(learner.init, jax.random.key(0)).params
  del params["stream_embed"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == MODELS[name]["parameters"]


def test_a_preset_is_ones_own_to_change():
  mine = preset("llama3.1-8b")
  mine.layers, mine.rope_scaling.factor = 1, 2.0
  assert (preset("llama3.1-8b").layers, preset("llama3.1-8b").rope_scaling.factor) == (32, 8.0)


def test_an_unknown_name_is_told():
  with pytest.raises(InputError, match=r"preset 'qwen3-0.6': .*; did you mean 'qwen3-0.6b'\?$"):
    preset("qwen3-0.6")
