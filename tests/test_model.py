"""The Python face: logits, rows of text, and what it says of wrong input."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
import msjax.model
from msjax.config import Config, ModelConfig
from msjax.decoding.tick import FREE
from msjax.errors import InputError
from msjax.model import Model
from msjax.streams import HOLE, Stream, Streams
from msjax.talk import conversation
from msjax.talk.conversation import Prompt, Schedule
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.state import Learner

TOKENIZER = ByteTokenizer()
SILENCE, END, VOCAB = TOKENIZER.silence_id, TOKENIZER.end_id, TOKENIZER.vocab_size
TINY = ModelConfig(
  dim=32,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_dim=64,
  tied_head=False,
  dtype="float32",
)
CONFIG = Config(
  streams=("user:input", "output:output", "tool:input", "think:internal"),
  same_row="inputs",
  model=TINY,
)
STREAMS = CONFIG.stream_set(SILENCE)
pytestmark = pytest.mark.usefixtures("compiled_once")


def random_params():
  learner = Learner(CONFIG, STREAMS, VOCAB)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


@functools.cache
def talker():
  """A model of random weights."""
  return Model(CONFIG, STREAMS, TOKENIZER, random_params())


def parrot(*tokens, config=CONFIG):
  """A model that says the same token in every row, one by stream id, whatever it reads."""
  params = jax.tree.map(jnp.zeros_like, random_params())
  for s, token in enumerate(tokens):
    params["stream_embed"] = params["stream_embed"].at[s, s].set(1.0)
    params["head"] = params["head"].at[token, s].set(1.0)
  params["norm"] = jnp.ones_like(params["norm"])
  return Model(config, STREAMS, TOKENIZER, params)


def said(rows, stream):
  return "".join(row.text[stream] for row in rows)


# Logits.


def random_tokens():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (2, 5, 4))
  tokens[rng.random(tokens.shape) < 0.3] = HOLE
  return tokens


def test_logits_are_those_of_the_module():
  tokens = random_tokens()
  logits = talker().logits(tokens)
  assert (logits.shape, logits.dtype) == ((2, 5, 4, VOCAB), jnp.float32)
  module = talker().module
  expected = module.logits(module(jnp.asarray(tokens)), tokens)
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  assert not np.any(np.asarray(logits)[tokens == HOLE])
  assert np.all(np.any(np.asarray(logits)[tokens != HOLE], axis=-1))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_any_integers_are_tokens(dtype):
  tokens = np.abs(random_tokens() % 100)
  np.testing.assert_array_equal(talker().logits(tokens.astype(dtype)), talker().logits(tokens))


@pytest.mark.parametrize(
  ("tokens", "told"),
  [
    (
      np.zeros((2, 5, 3), int),
      r"shape \(2, 5, 3\); expected integers \[B, R, 4\].*streams user, output",
    ),
    (np.zeros((5, 4), int), r"shape \(5, 4\)"),
    (np.zeros((2, 5, 4)), r"float64 of shape"),
    (np.zeros((2, 5, 4), bool), r"bool of shape"),
    (np.full((2, 5, 4), -2), r"from -2 to -2; expected -1 \(hole\) to 258"),
    (np.full((2, 5, 4), VOCAB), r"from 259 to 259"),
    (np.zeros((2, 0, 4), int), r"shape \(2, 0, 4\)"),
  ],
)
def test_wrong_tokens_are_told(tokens, told):
  with pytest.raises(InputError, match=told):
    talker().logits(tokens)


# Rows.


def test_text_is_read_a_token_a_row():
  rows = list(talker().generate({"user": "hé€"}, rows=9))
  assert [row.index for row in rows] == list(range(9))
  assert all(tuple(row.tokens) == tuple(row.text) == STREAMS.names for row in rows)
  expected = [*"hé€".encode(), END, SILENCE, SILENCE]
  assert [row.tokens["user"] for row in rows] == expected
  assert [row.text["user"] for row in rows] == ["h", "", "é", "", "", "€", "", "", ""]
  assert {row.tokens["tool"] for row in rows} == {SILENCE}
  assert all(0 <= token < VOCAB for row in rows for token in row.tokens.values())


def test_messages_end_as_they_did_in_training():
  config = CONFIG.changed({"data.end_token": False})
  rows = parrot(SILENCE, SILENCE, SILENCE, SILENCE, config=config).generate({"user": "a"}, rows=2)
  assert [row.tokens["user"] for row in rows] == [ord("a"), SILENCE]


def test_pieces_of_text_join_to_what_the_stream_says():
  rows = list(talker().generate({"user": "hello"}, rows=40, temperature=2.0, seed=1))
  for name in STREAMS.names:
    assert said(rows, name) == TOKENIZER.decode(row.tokens[name] for row in rows)
  assert "\N{REPLACEMENT CHARACTER}" in said(rows, "output")  # random bytes: hardly UTF-8


def test_a_character_left_open_is_told_at_the_end():
  rows = list(parrot(0, 0xE2, 0, SILENCE).generate({"user": "a"}, rows=2, temperature=0))
  assert said(rows, "output") == "\N{REPLACEMENT CHARACTER}"


def test_rows_depend_on_the_seed_only_when_drawn():
  run = lambda **kwargs: list(talker().generate({"user": "hello"}, rows=12, **kwargs))
  assert run(temperature=0) == run(temperature=0, seed=3)
  assert run(seed=3) == run(seed=3) != run(seed=4)
  assert run(temperature=1.0, seed=3) == run(temperature=1.0, seed=3)
  assert run(temperature=1.0, seed=3) != run(temperature=1.0, seed=4)


def test_generation_ends_when_all_is_read_and_quiet():
  quiet = parrot(0, SILENCE, 0, END)  # what it would say in input streams is never heard
  assert (
    len(list(quiet.generate({"user": "abc"}, temperature=0))) == 4 + 4
  )  # abc<end>, and four in silence
  assert len(list(quiet.generate({"user": "abc"}, at=[(9, "tool", "x")], temperature=0))) == 11 + 4
  assert len(list(quiet.generate(temperature=0))) == 1 + 4
  assert len(list(quiet.generate({"user": "abc"}, rows=20, temperature=0))) == 20


def test_generation_of_a_babbler_ends_all_the_same(monkeypatch):
  monkeypatch.setattr(msjax.talk.conversation, "_LONGEST_ANSWER", 10)
  babbler = parrot(0, ord("x"), 0, SILENCE)
  rows = list(babbler.generate({"user": "abc"}, temperature=0))
  assert len(rows) == 4 + 10
  assert said(rows, "output") == "x" * 13  # all rows but the first
  assert said(rows, "think") == ""


def test_text_may_come_later_and_queues_up_in_order():
  quiet = parrot(0, SILENCE, 0, SILENCE)
  rows = list(
    quiet.generate(
      {"user": "abc"},
      at=[(6, "user", "d"), (2, "user", "ef"), (2, "tool", "x"), (2, "user", "g")],
      temperature=0,
    )
  )
  user = "".join({END: "|", SILENCE: "."}.get(t := row.tokens["user"]) or chr(t) for row in rows)
  assert user == "abc|ef|g|d|...."
  tool = [row.tokens["tool"] for row in rows]
  assert tool[:5] == [SILENCE, SILENCE, ord("x"), END, SILENCE]


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ({"inputs": {"usr": "a"}}, "'usr' is unknown.*did you mean 'user'"),
    ({"inputs": {"output": "a"}}, "'output'.*input streams: user, tool"),
    ({"at": [(-1, "user", "a")]}, "row -1 for stream 'user': expected a whole number, 0 or more"),
    ({"inputs": {"user": "abc"}, "rows": 3}, "rows: 3 end before.*takes 4 rows"),
    ({"at": [(7, "user", "a")], "rows": 8}, "takes 9 rows"),
    ({"rows": 0}, "rows: 0; expected 1 or more"),
    ({"inputs": {"user": "a"}, "at": [("3", "user", "a")]}, "row '3' for stream 'user': expected"),
    ({"at": [(1.5, "user", "a")]}, "row 1.5 for stream 'user': expected a whole number"),
    ({"inputs": {"user": None}}, "text None: expected a str, not NoneType"),
    ({"inputs": "a"}, "inputs: 'a'; expected text by stream, as in .'user': 'hello'."),
    ({"at": ["2:user:a"]}, r"at: '2:user:a'; expected tuples \(row, stream, text\)"),
    ({"temperature": -0.5}, "temperature: -0.5; expected 0"),
    ({"temperature": float("nan")}, "temperature: nan"),
    ({"policies": {"output": {"top_k": 3}}}, "for stream 'output'; expected a Policy"),
  ],
)
def test_wrong_requests_are_told_at_once(arguments, told):
  with pytest.raises(InputError, match=told):
    talker().generate(**arguments)  # before the first row is asked for


def test_prompts_are_answered_side_by_side():
  prompts = [
    {"inputs": {"user": "ab"}, "rows": 6},
    Prompt({"user": "c"}, [(4, "user", "d")], 9),
    {},
  ]
  found = {n: (rows, reason) for n, rows, reason in talker().answers(prompts, places=2)}
  assert [len(found[n][0]) for n in range(2)] == [6, 9]
  assert ["".join(row.text["user"] for row in found[n][0]) for n in range(3)] == ["ab", "cd", ""]
  assert found[0][1] == found[1][1] == "rows"
  for wrong in ("hello", {"input": {}}, (0, Prompt())):
    with pytest.raises(
      InputError, match=r"^prompt: .*; expected a Prompt, or a dict of inputs, at"
    ):
      list(talker().answers([wrong]))
  with pytest.raises(InputError, match=r"^prompt 1: at: 5; expected a list of \(row, stream, text"):
    list(talker().answers([{"rows": 2}, {"at": 5}]))


def test_what_no_context_takes_is_refused(monkeypatch):
  monkeypatch.setattr(conversation, "MAX_ROWS", 8)
  for arguments, name in (({"inputs": {"user": "a" * 8}}, "text"), ({"rows": 9}, "rows")):
    with pytest.raises(InputError, match=f"^{name}: 9 rows; expected at most the 8 of a context"):
      talker().generate(**arguments)


def test_a_model_without_input_streams_is_prompted_in_any():
  chat = Streams((Stream.parse("text:output"),), SILENCE)
  schedule = Schedule(chat)
  schedule.put(0, "text", [5, 6])
  assert [int(schedule.row(r)[0]) for r in range(4)] == [5, 6, FREE, FREE]


def test_a_schedule_leaves_the_model_its_streams():
  schedule = Schedule(STREAMS)
  assert schedule.rows == 1
  np.testing.assert_array_equal(schedule.row(0), [SILENCE, FREE, SILENCE, FREE])
  schedule.put(1, "tool", [7, 8])
  schedule.put(1, "tool", [9])
  assert schedule.rows == 4
  assert [int(schedule.row(r)[2]) for r in range(5)] == [SILENCE, 7, 8, 9, SILENCE]
  assert schedule.row(0).dtype == np.int32


def test_another_rule_is_that_of_a_model_with_it():
  tokens = random_tokens()
  other = CONFIG.changed({"same_row": "hidden", "skip_silence": True})
  model = Model(other, other.stream_set(SILENCE), TOKENIZER, random_params())
  np.testing.assert_array_equal(
    talker().logits(tokens, same_row="hidden", skip_silence=True), model.logits(tokens)
  )
  assert talker().loss(tokens, same_row="hidden", skip_silence=True) == model.loss(tokens)
  assert np.any(talker().logits(tokens) != model.logits(tokens))
  with pytest.raises(InputError, match=r"same_row: 'inptus' is none of.*did you mean 'inputs'"):
    talker().logits(tokens, same_row="inptus")


def test_losses_are_of_the_logits():
  tokens = random_tokens()
  log_p = jax.nn.log_softmax(talker().logits(tokens))
  labels, weights = STREAMS.labels(jnp.asarray(tokens), None, None, 0.5)
  nats = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
  expected = float((nats * weights).sum() / weights.sum())
  assert talker().loss(tokens, silence_weight=0.5)["loss"] == pytest.approx(expected, rel=1e-5)
  half = talker().loss(tokens, np.full(tokens.shape, 0.5), silence_weight=0.5)
  assert half["loss"] == pytest.approx(expected, rel=1e-5)
  assert talker().loss(tokens, label_smoothing=0.1)["loss"] != talker().loss(tokens)["loss"]
  with pytest.raises(InputError, match=r"loss option 'zloss': .*did you mean 'z_loss'"):
    talker().loss(tokens, zloss=1.0)


# The package.


def test_importing_msjax_is_light():
  code = "import sys, msjax; print({'jax', 'numpy', 'flax'} & set(sys.modules))"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "set()"


def test_the_package_has_a_load_and_no_more():
  assert msjax.load is msjax.model.load
  with pytest.raises(AttributeError, match="no attribute 'save'"):
    msjax.save  # noqa: B018
