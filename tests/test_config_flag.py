import json
import types

import forked
import pytest
from train_cases import environment  # noqa: F401 - a fixture

from msjax import config_flag
from msjax.config import Config, DataConfig
from msjax.errors import InputError

FILE = """
from msjax.config import Config, DataConfig, ModelConfig, RopeScaling

def get_config():
  return Config(
    data=DataConfig(train="train.jsonl"),
    model=ModelConfig(rope_scaling=RopeScaling(factor=4.0)),
    baseline={"train.batch": 16},
  )
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(FILE)
  return path


@pytest.mark.parametrize(
  "words",
  [
    [],
    ["--config.train.steps=100"],
    ["--config.train.steps", "100"],
    ["--config.optim.learning_rate=3e-4"],
    ["--config.optim.learning_rate=1"],
    ["--config.data.pack=true"],
    ["--config.data.pack=False"],
    ["--config.data.pack"],
    ["--config.data.pack", "--config.train.steps=3"],
    ["--config.data.train=a=b.jsonl"],
    ["--config.data.train="],
    ["--config.streams=('a:input','b:output')"],
    ["--workdir=config.train.stepz=3"],
  ],
)
def test_what_can_be_set_passes(file, words):
  config_flag.check(["train", f"--config={file}", *words])
  config_flag.check(["train", "--config", str(file), *words])


@pytest.mark.parametrize(
  "words, message",
  [
    (["--config.train.stepz=3"], "no such field as 'stepz'; did you mean 'steps'"),
    (["-config.train.stepz=3"], "no such field as 'stepz'; did you mean 'steps'"),
    (["--config.trian.steps=3"], "no such field as 'trian'; did you mean 'train'"),
    (["--config.loss.xyzzy=3"], "; there are silence_weight, z_loss, label_smoothing"),
    (["--config.train.steps.more=3"], "config.train.steps has no fields"),
    (["--config.train.steps=3.5"], "--config.train.steps: '3.5' is not a whole number"),
    (["--config.train.steps", "many"], "--config.train.steps: 'many' is not a whole number"),
    (["--config.train.steps"], "--config.train.steps: '' is not a whole number"),
    (["--config.optim.b1=high"], "--config.optim.b1: 'high' is not a number"),
    (["--config.data.pack=yes"], "--config.data.pack: 'yes' is not true or false"),
    (["--config.streams=a:input"], r"'a:input' is not a tuple of texts, as in \('a', 'b'\)"),
    (["--config.train=3"], "--config.train: can only be set in the config file"),
    (["--config.baseline={}"], "--config.baseline: can only be set in the config file"),
    (["--config.model.rope_scaling=3"], "can only be set in the config file"),
    (["--config.model.rope_scaling.factor=3"], "can only be set in the config file"),
  ],
)
def test_what_cannot_be_set_is_an_error(file, words, message):
  with pytest.raises(InputError, match=message):
    config_flag.check(["train", f"--config={file}", *words])


@pytest.mark.parametrize("words", [["--config=nowhere.py"], ["--config", "x"], ["--config"]])
def test_a_file_that_is_none_is_an_error(words):
  with pytest.raises(InputError, match=r"is no file; expected one such as configs/quickstart.py"):
    config_flag.check(["train", *words])


def test_the_config_is_validated_and_has_to_be_one():
  resolve = lambda value: config_flag.resolve(types.SimpleNamespace(value=value))
  config = Config(data=DataConfig(train="train.jsonl"))
  assert resolve(config) is config
  with pytest.raises(InputError, match="--config: not given; expected a file, as in --config=con"):
    resolve(None)
  with pytest.raises(
    InputError, match=r"get_config\(\) returned dict; expected a msjax.config.Con"
  ):
    resolve({})
  with pytest.raises(InputError, match=r"config.data.train: ''"):
    resolve(Config())


def test_print_config_prints_what_a_config_is_read_from(file):
  words = [
    *(f"--config={file}", "--workdir=some/where"),
    *("--config.train.steps=7", "--config.optim.learning_rate=0.5", "--config.data.pack"),
    *("--config.streams=('a:input','b:output:2')", "--on_bad_record=skip", "--print_config"),
  ]
  done = forked.run("msjax.train", *words)
  assert (done.returncode, done.stderr) == (0, "")
  config = Config.from_json(json.loads(done.stdout))
  config.validate()
  assert config.workdir == "some/where"
  assert (config.train.steps, config.optim.learning_rate, config.data.pack) == (7, 0.5, True)
  assert config.streams == ("a:input", "b:output:2")
  assert config.data.on_bad_record == "skip"
  assert config.model.rope_scaling.factor == 4.0
  assert config.baseline == {"train.batch": 16}
