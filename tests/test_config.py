import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimConfig,
  RopeScaling,
  TrainConfig,
  field_type,
)
from msjax.errors import InputError

VALID = Config(data=DataConfig(train="train.jsonl"))


def test_the_defaults_need_only_a_file_to_train_on():
  VALID.validate()
  with pytest.raises(InputError, match=r"^config.data.train: '' is not allowed; expected a JSONL"):
    Config().validate()


def test_every_field_has_a_default_and_the_trees_are_not_shared():
  first, second = Config(), Config()
  first.train.steps = 1
  first.baseline["x"] = 2
  assert second.train.steps != 1 and not second.baseline


@pytest.mark.parametrize(
  "field, value, expected",
  [
    *((f"model.{name}", 0, "a positive number") for name in ("dim", "layers", "heads", "mlp_dim")),
    *((f"model.{name}", -1, "a positive number") for name in ("kv_heads", "head_dim")),
    ("model.rope_theta", 0.0, "a positive number"),
    ("model.norm_eps", 0.0, "a positive number"),
    ("model.kv_heads", 3, r"a divisor of heads \(2\)"),
    ("model.head_dim", 7, "even, for RoPE"),
    ("model.attention_dropout", 1.0, "at least 0 and below 1"),
    ("model.remat", "some", "one of auto, none, dots, qkv, attention, full"),
    ("model.dtype", "float16", "one of auto, float32, bfloat16; did you mean 'bfloat16'"),
    ("data.rows", 0, "a positive number"),
    ("data.rows_per_second", 0.0, "a positive number"),
    ("data.max_pause", float("inf"), "a positive number"),
    ("data.wait_k", -1, "zero or a positive number"),
    ("data.source", "jsnol", "one of jsonl, arithmetic, chitchat; did you mean 'jsonl'"),
    ("data.layout", "wait-k", "one of turn, wait_k, timestamps; did you mean 'wait_k'"),
    ("data.on_bad_record", "skp", "one of stop, skip; did you mean 'skip'"),
    ("data.min_ops", 0, "a positive number"),
    ("data.min_ops", 11, r"at most data.max_ops \(10\)"),
    ("loss.silence_weight", -0.1, "zero or a positive number"),
    ("loss.z_loss", float("nan"), "zero or a positive number"),
    ("loss.label_smoothing", 1.0, "at least 0 and below 1"),
    ("optim.learning_rate", 0.0, "a positive number"),
    ("optim.stream_learning_rate", -1.0, "zero or a positive number"),
    ("optim.schedule", "cosinus", "one of constant, cosine; did you mean 'cosine'"),
    ("optim.warmup_steps", -1, "zero or a positive number"),
    ("optim.b1", 1.0, "at least 0 and below 1"),
    ("optim.b2", -0.5, "at least 0 and below 1"),
    ("optim.eps", 0.0, "a positive number"),
    ("optim.clip_norm", -1.0, "zero or a positive number"),
    ("train.steps", 0, "a positive number"),
    ("train.batch", 0, "a positive number"),
    ("train.micro_batches", 3, r"a divisor of train.batch \(32\)"),
    ("train.log_every", 0, "a positive number"),
    ("train.save_every", 0, "a positive number"),
    ("train.keep", 0, "a positive number"),
    ("train.read_threads", 0, "a positive number"),
    ("train.seed", -1, "zero or a positive number"),
    ("train.eval_every", -1, "zero or a positive number"),
    ("train.stall_seconds", -1.0, "zero or a positive number"),
    ("train.stall_seconds", float("inf"), "zero or a positive number"),
    ("train.profile_first_step", -1, "zero or a positive number"),
    ("train.profile_first_step", 1001, r"at most train.steps \(1000\)"),
    ("train.profile_last_step", 5, r"at least profile_first_step \(0\), or 0 where that is 0"),
    ("train.profile_last_step", -1, r"at least profile_first_step \(0\)"),
    ("same_row", "input", r"one of hidden, inputs, ordered, visible; did you mean 'inputs'"),
    ("report", "accuracy", r"one of \(empty\), arithmetic, likelihood"),
    ("report", "arithmetic", "data.source=arithmetic beside it"),
    ("report", "likelihood", "held-out text beside it"),
  ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(field, value, expected):
  with pytest.raises(InputError, match=f"^config.{field}: .* is not allowed; expected {expected}"):
    VALID.changed({field: value}).validate()


@pytest.mark.parametrize(
  "field, value, expected",
  [
    ("train.steps", "100", "a whole number"),
    ("train.steps", 100.0, "a whole number"),
    ("train.batch", True, "a whole number"),
    ("optim.learning_rate", "1e-3", "a number"),
    ("data.pack", 1, "true or false"),
    ("data.train", None, "text"),
    ("streams", "user:input", "a tuple of texts"),
    ("streams", ("user:input", 3), "a tuple of texts"),
    ("baseline", ("train.steps",), "dict"),
    ("model", {"dim": 8}, "<class 'msjax.config.ModelConfig'>"),
  ],
)
def test_a_value_of_another_type_is_named_with_the_type(field, value, expected):
  with pytest.raises(InputError, match=f"^config.{field}: .* is not allowed; expected {expected}"):
    VALID.changed({field: value}).validate()


def test_a_whole_number_is_a_number_too():
  VALID.changed({"optim.learning_rate": 1, "model.rope_theta": 10000}).validate()


def test_a_trace_ends_after_it_begins():
  config = VALID.changed({"train.profile_first_step": 5, "train.profile_last_step": 5})
  config.validate()
  config.train.profile_last_step = 4
  with pytest.raises(
    InputError, match=r"profile_last_step: 4 .* at least profile_first_step \(5\)"
  ):
    config.validate()


def test_schedules_fit_into_the_steps():
  config = VALID.changed({"train.steps": 10, "optim.warmup_steps": 6, "optim.cooldown_steps": 5})
  with pytest.raises(InputError, match=r"warmup_steps \+ .*cooldown_steps: 11 .*at most train.st"):
    config.validate()


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"data.wait_k": 3}, "config.data.wait_k: 3 .* 0 with data.layout=turn"),
    ({"data.wait_k": 1, "data.layout": "wait_k"}, "wait_k: 1 .* at least 2 with same_row=hidden"),
    ({"data.wait_k": 1, "data.layout": "wait_k", "same_row": "inputs"}, None),
    ({"data.wait_k": 0, "data.layout": "wait_k"}, None),
  ],
)
def test_an_answer_cannot_come_before_its_question_is_seen(changes, told):
  config = VALID.changed(changes)
  if told is None:
    config.validate()
  else:
    with pytest.raises(InputError, match=told):
      config.validate()


@pytest.mark.parametrize(
  "scaling, told",
  [
    ({"factor": 0.0}, "model.rope_scaling.factor: 0.0 .* a positive number"),
    ({"low_freq_factor": 4.0}, r"low_freq_factor: 4.0 .* less than high_freq_factor \(4.0\)"),
  ],
)
def test_rope_scaling_is_checked(scaling, told):
  with pytest.raises(InputError, match=told):
    VALID.changed({"model.rope_scaling": RopeScaling(**scaling)}).validate()


@pytest.mark.parametrize("source", ["arithmetic", "chitchat"])
def test_files_that_would_not_be_read_are_refused(source):
  config = VALID.changed({"data.source": source, "train.eval_batches": 1})
  with pytest.raises(InputError, match=r"config.data.train: 'train.jsonl' .* data.source=jsonl"):
    config.validate()


def test_arithmetic_needs_an_end_to_its_evaluation():
  config = Config(data=DataConfig(source="arithmetic"))
  with pytest.raises(InputError, match=r"config.train.eval_batches: 0 .* at least 1"):
    config.validate()


@pytest.mark.parametrize(
  "streams, message",
  [
    ((), "streams: expected at least one"),
    (("user",), "stream 'user': expected name:kind"),
    (("user:inputs",), "kind 'inputs' is none of input, output, internal; did you mean 'input'"),
    (("a:input", "a:output"), "'a' stands twice"),
    (("a:output:x",), "weight 'x' is no number"),
    (("a:input", "b:output:0"), "config.streams: .* expected one with a loss weight above 0"),
  ],
)
def test_streams_are_checked(streams, message):
  with pytest.raises(InputError, match=message):
    VALID.changed({"streams": streams}).validate()


# Changing fields.


def test_changed_sets_dotted_fields_of_a_copy():
  base = Config()
  copy = base.changed({"train.steps": 7, "streams": ("a:output",), "model.rope_scaling": None})
  assert (copy.train.steps, copy.streams) == (7, ("a:output",))
  assert base == Config()
  assert copy.changed({"train.steps": base.train.steps, "streams": base.streams}) == base


@pytest.mark.parametrize(
  "field, message",
  [
    ("train.stepz", "config.train.stepz: no such field as 'stepz'; did you mean 'steps'"),
    ("trian.steps", "config.trian.steps: no such field as 'trian'; did you mean 'train'"),
    ("loss.xyzzy", "; there are silence_weight, z_loss, label_smoothing"),
    ("train.steps.more", "config.train.steps.more: config.train.steps has no fields"),
  ],
)
def test_a_typo_names_the_nearest_field(field, message):
  with pytest.raises(InputError, match=message):
    Config().changed({field: 1})
  with pytest.raises(InputError, match=message):
    field_type(field)


def test_the_types_of_fields_are_found_by_their_names():
  assert field_type("train.steps") is int
  assert field_type("model.rope_scaling.factor") is float
  assert field_type("data") is DataConfig


def test_the_baseline_is_checked_before_anything_is_trained():
  for changes, message in (
    ({"train.stepz": 1}, "config.baseline: config.train.stepz: no such field"),
    ({"train.steps": 0}, "config.baseline: config.train.steps: 0 is not allowed"),
  ):
    with pytest.raises(InputError, match=message):
      Config(data=VALID.data, baseline=changes).validate()


def test_the_baseline_is_the_same_run_with_its_changes_and_without_a_report():
  config = VALID.changed(
    {"data.valid": "v.jsonl", "report": "likelihood", "baseline": {"train.batch": 3}}
  )
  config.validate()
  baseline = config.baseline_run()
  assert (baseline.train.batch, baseline.report, baseline.baseline) == (3, "", {})
  assert baseline.data == config.data


# On disk.


def test_a_config_survives_json():
  config = Config(
    workdir="runs/x",
    streams=("user:input:0.5", "output:output"),
    model=ModelConfig(rope_scaling=RopeScaling(factor=4.0)),
    optim=OptimConfig(learning_rate=3e-4),
    train=TrainConfig(steps=5),
    baseline={"train.steps": 3, "streams": ["chat:output"]},
  )
  copy = Config.from_json(json.loads(json.dumps(config.to_json())))
  assert copy == config
  assert isinstance(copy.model.rope_scaling, RopeScaling)
  assert isinstance(copy.streams, tuple)


@given(
  st.builds(
    OptimConfig,
    learning_rate=st.floats(0, 1, exclude_min=True),
    warmup_steps=st.integers(0, 10**9),
    b1=st.floats(0, 1),
  ),
  st.text(),
  st.lists(st.text(), max_size=3).map(tuple),
)
def test_any_value_survives_json(optim, text, streams):
  config = Config(workdir=text, streams=streams, optim=optim)
  assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_config_of_another_version_or_with_unknown_fields_is_an_error():
  with pytest.raises(InputError, match="format_version 2, this msjax reads 1"):
    Config.from_json({**Config().to_json(), "format_version": 2})
  data = Config().to_json()
  data["train"]["step"] = data["train"].pop("steps")
  with pytest.raises(InputError, match=r"config.train.step: no such field; did you mean 'steps'"):
    Config.from_json(data)
