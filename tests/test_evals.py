import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import Config, DataConfig, TrainConfig
from msjax.data import synthetic
from msjax.data.source import Example
from msjax.decoding.tick import FREE
from msjax.evals import arithmetic, likelihood, reports
from msjax.evals.likelihood import Tally
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.loop import Trained
from msjax.training.state import Learner

# Arithmetic.

TOKENS = synthetic.tokenizer()
SILENCE = TOKENS.silence_id
STREAMS = ("user:input", "think:internal", "output:output")


def asked(chat=False, same_row="inputs"):
  """What `arithmetic` needs of a model, without one."""
  streams = ("chat:output",) if chat else STREAMS
  config = Config(
    streams=streams,
    same_row=same_row,
    data=DataConfig(source="arithmetic", chat=chat, rows=24),
    train=TrainConfig(seed=5, eval_batches=1),
  )
  return types.SimpleNamespace(
    config=config, streams=config.stream_set(SILENCE), tokenizer=TOKENS, engine=dict
  )


def perfect(model, questions):
  """Grids as the task lays them out."""
  source = synthetic.Arithmetic(
    "valid", model.streams, TOKENS, (10, 10), model.config.data.chat, rows=24, seed=0
  )
  return np.stack([source.lay_out(q).tokens for q in questions])


def measured(monkeypatch, model, change=None):
  """Figures for perfect answers, or for what `change` made of them."""

  def answered(model, questions):
    grid = perfect(model, questions)
    if change:
      change(grid)
    return grid

  monkeypatch.setattr(arithmetic, "answered", answered)
  return arithmetic.measure(model)


@pytest.mark.parametrize(
  "model, first, total",
  [
    (asked(), 1, 13),
    (asked(same_row="hidden"), 2, 14),
    (asked(chat=True), 12, 24),
  ],
  ids=["inputs", "hidden", "chat"],
)
def test_a_perfect_model_is_measured_as_such(monkeypatch, model, first, total):
  assert measured(monkeypatch, model) == {
    "questions": 500,
    "accuracy": 1.0,
    "rows_to_first_answer": first,
    "rows_total": total,
  }


def another_digit(ids):
  """The digit after each, 0 after 9."""
  zero = TOKENS.encode("0")[0]
  return (ids - zero + 1) % 10 + zero


@pytest.mark.parametrize("model, row", [(asked(), 12), (asked(chat=True), 23)], ids=["", "chat"])
def test_wrong_answers_count(monkeypatch, model, row):
  def spoil(grid):
    grid[:125, row, -1] = another_digit(grid[:125, row, -1])

  assert measured(monkeypatch, model, spoil)["accuracy"] == 0.75


def test_what_is_said_first_is_the_answer_however_early(monkeypatch):
  def babble(grid):
    grid[:, 4, 2] = another_digit(grid[:, 12, 2])

  figures = measured(monkeypatch, asked(), babble)
  assert figures == {
    "questions": 500,
    "accuracy": 0.0,
    "rows_to_first_answer": 4 - 11,
    "rows_total": 5,
  }


def test_a_late_answer_is_right_and_late(monkeypatch):
  def delay(grid):
    grid[:, 15, 2], grid[:, 12, 2] = grid[:, 12, 2].copy(), SILENCE

  figures = measured(monkeypatch, asked(), delay)
  assert (figures["accuracy"], figures["rows_to_first_answer"]) == (1.0, 4)


def test_no_answer_is_a_wrong_one_as_late_as_can_be(monkeypatch):
  def hush(grid):
    grid[:, :, 2] = SILENCE

  figures = measured(monkeypatch, asked(), hush)
  assert (figures["accuracy"], figures["rows_total"]) == (0.0, 24)


def test_questions_are_long_held_out_and_the_runs_own():
  questions = arithmetic.questions(asked())
  assert len(questions) == 500
  assert {len(q.words) for q in questions} == {12}
  assert questions[7] == synthetic.question("valid", 5, 7, 10, 10)


@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_put_token_by_token_and_all_else_is_free(monkeypatch, chat):
  monkeypatch.setattr(arithmetic, "fill", lambda engine, grid: (engine, grid))
  model = asked(chat)
  questions = arithmetic.questions(model, 3)
  room, grid = arithmetic.answered(model, questions)
  assert room == {"places": 3, "rows": grid.shape[1]}
  heard = [[TOKENS.encode(word)[0] for word in q.words] for q in questions]
  np.testing.assert_array_equal(grid[:, :12, 0], heard)
  assert (grid[:, 12:, 0] == (FREE if chat else SILENCE)).all()
  assert (grid[:, :, 1:] == FREE).all()
  assert grid.shape[1] > (24 if chat else 13)  # an answer may come late


def test_examples_are_shown_up_to_their_answer(monkeypatch):
  monkeypatch.setattr(arithmetic, "answered", perfect)
  first, second = arithmetic.shown(asked(), 2)
  assert first.shape == second.shape == (13, 3)
  assert first[-1, 2] != SILENCE


# Likelihood.

BYTES = ByteTokenizer()
HUSH = BYTES.silence_id
RUN = Config(streams=("user:input:1", "output:output")).stream_set(HUSH)


class Fixed:
  """Held-out examples."""

  def __init__(self, *tokens):
    self.tokens = [np.array(t, np.int32) for t in tokens]

  def __len__(self):
    return len(self.tokens)

  def __getitem__(self, index):
    return Example(self.tokens[index], np.ones(self.tokens[index].shape, np.float32))

  def length(self, index):
    return len(self.tokens[index])

  def record_id(self, index):
    return str(index)


def test_streams_that_are_not_trained_do_not_count_among_all():
  tally = Tally(Config(streams=("user:input", "output:output")).stream_set(HUSH), BYTES)
  tally.add(np.array([[65, 66]]), np.array([[100.0, 2.0]]))
  scores = tally.scores()
  assert scores["streams"]["user"]["loss_per_token"] == 100
  assert scores["all"] == scores["streams"]["output"]


def test_a_tally_keeps_text_silence_and_streams_apart():
  tally = Tally(RUN, BYTES)
  labels = np.array([[[65, 66], [HUSH, 67], [-1, BYTES.end_id]]])
  nats = np.array([[[1.0, 2.0], [4.0, 8.0], [1e9, 16.0]]])
  tally.add(labels, nats)
  tally.add(labels[:, :1], nats[:, :1])
  (user, output), all = tally.scores()["streams"].values(), tally.scores()["all"]
  assert user == {
    "tokens": 2,
    "loss_per_token": 1.0,
    "bits_per_byte": 1 / math.log(2),
    "loss_on_silence": 4.0,
  }
  assert output["tokens"] == 4
  assert output["loss_per_token"] == (2 + 8 + 16 + 2) / 4
  assert output["bits_per_byte"] == pytest.approx(28 / 3 / math.log(2))  # <end> is no byte of text
  assert output["loss_on_silence"] == 0.0
  assert all["tokens"] == 6
  assert all["bits_per_byte"] == pytest.approx(30 / 5 / math.log(2))
  assert all["loss_on_silence"] == 4.0


def test_characters_of_several_bytes_count_as_such():
  tokens = synthetic.tokenizer()  # "+3" is one token of two bytes
  tally = Tally(Config(streams=("a:output",)).stream_set(tokens.silence_id), tokens)
  tally.add(np.array([[tokens.encode("+3")[0]]]), np.array([[6.0]]))
  assert tally.scores()["streams"]["a"]["bits_per_byte"] == pytest.approx(3 / math.log(2))


def by_token(self, params, batch):
  """Labels as the rule has them; a label costs a hundredth of its id."""
  labels, _ = self.streams.labels(batch["tokens"], batch["segments"])
  return labels, jnp.where(labels >= 0, labels / 100, 0.0)


@pytest.mark.parametrize("pack", [False, True])
def test_a_model_is_scored_on_every_predicted_cell_once(monkeypatch, pack):
  monkeypatch.setattr(Learner, "cell_entropy", by_token)
  config = Config(data=DataConfig(train="t", rows=6, pack=pack), train=TrainConfig(batch=2))
  source = Fixed(
    [[65, -1], [66, -1], [67, 70]],
    [[80, HUSH], [HUSH, HUSH], [81, 82], [83, 84]],
    [[90, 91]],
  )
  scores = likelihood.model_scores(Learner(config, RUN, BYTES.vocab_size), {}, source, BYTES)
  assert scores["streams"]["user"]["tokens"] == 4  # 66, 67, 81, 83
  assert scores["streams"]["user"]["loss_per_token"] == pytest.approx((66 + 67 + 81 + 83) / 400)
  assert scores["streams"]["user"]["loss_on_silence"] == pytest.approx(HUSH / 100)
  assert (
    scores["streams"]["output"]["tokens"] == 2
  )  # 82, 84; nobody predicts 70, which follows a hole
  assert scores["all"]["bits_per_byte"] == pytest.approx(
    (66 + 67 + 81 + 83 + 82 + 84) / 100 / 6 / math.log(2), rel=1e-6
  )


def test_unigram_frequencies_are_counted_by_stream_with_one_added():
  train = Fixed([[65, 97], [65, HUSH], [66, -1]], [[65, HUSH]])
  valid = Fixed([[65, 97], [66, HUSH], [67, 98]], [[65, -1], [65, 97]])
  learner = types.SimpleNamespace(streams=RUN)
  scores = likelihood.unigram_scores(learner, train, valid, BYTES)
  nats = lambda count, total: -math.log((count + 1) / (total + BYTES.vocab_size))
  user = [nats(1, 4), nats(0, 4), nats(3, 4)]  # 66, 67, 65
  assert scores["streams"]["user"]["tokens"] == 3
  assert scores["streams"]["user"]["loss_per_token"] == pytest.approx(sum(user) / 3)
  assert scores["streams"]["output"]["tokens"] == 1  # 98; 97 follows a hole
  assert scores["streams"]["output"]["loss_per_token"] == pytest.approx(nats(0, 3))
  assert scores["streams"]["output"]["loss_on_silence"] == pytest.approx(nats(2, 3))
  assert scores["all"]["loss_per_token"] == pytest.approx((sum(user) + nats(0, 3)) / 4)


# Reports.


def trained(model, seconds):
  """A run that nobody trained."""
  data = types.SimpleNamespace(
    streams=model.streams, tokenizer=model.tokenizer, train=None, valid=Fixed()
  )
  return Trained(types.SimpleNamespace(config=model.config), {}, data, seconds)


@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_arithmetic_report_shows_rows_and_then_figures(monkeypatch, capsys, with_baseline):
  monkeypatch.setattr(reports, "_model", lambda run: asked(run.learner.config.data.chat))
  monkeypatch.setattr(arithmetic, "answered", perfect)
  baseline = trained(asked(chat=True), 98.76) if with_baseline else None
  run, report = trained(asked(), 12.34), reports.REPORTS["arithmetic"]
  measured = report.measure(run, baseline)
  report.show(run, measured)
  figures = {
    "questions": 500,
    "accuracy": 1.0,
    "rows_to_first_answer": 1,
    "rows_total": 13,
    "train_seconds": 12.3,
  }
  chat = {**figures, "rows_to_first_answer": 12, "rows_total": 24, "train_seconds": 98.8}
  assert measured == {**figures, **({"baseline": chat} if with_baseline else {})}

  rows, _, table = capsys.readouterr().out.rpartition("multi-stream")
  assert rows.count("  row  user") == 2
  assert rows.count("=") == 2
  lines = {line[:44].strip(): line[44:].split() for line in table.splitlines() if "rows" in line}
  assert lines["rows from the question's end to the answer"] == ["1", "12"][: 1 + with_baseline]
  assert lines["rows of the whole exchange"] == ["13", "24"][: 1 + with_baseline]
  assert "accuracy on 500 held-out questions" in table
  assert ("chat baseline" in table) == with_baseline


def test_the_likelihood_report_sets_model_unigram_and_baseline_side_by_side(monkeypatch, capsys):
  score = lambda x: {"tokens": 1000, "loss_per_token": x, "bits_per_byte": 2 * x}
  cells = lambda x: {**score(x), "loss_on_silence": 3 * x}
  scores = lambda x: {"streams": {"all": cells(x)}, "all": cells(2 * x)}  # a stream called all
  monkeypatch.setattr(likelihood, "model_scores", lambda learner, params, *_: scores(params))
  monkeypatch.setattr(likelihood, "unigram_scores", lambda *_: scores(4.0))
  run = trained(asked(), 12.34)
  run, baseline = run._replace(params=1.0), run._replace(params=1.5, seconds=98.76)
  report = reports.REPORTS["likelihood"]
  measured = report.measure(run, baseline)
  report.show(run, measured)
  assert measured == {
    **scores(1.0),
    "train_seconds": 12.3,
    "unigram": scores(4.0),
    "baseline": {**scores(1.5), "train_seconds": 98.8},
  }
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["model", "all", "1,000", "1.000", "2.000", "3.000"] in lines
  assert ["unigram", "all", "1,000", "8.000", "16.000", "24.000"] in lines
  assert ["baseline", "all", "1,000", "1.500", "3.000", "4.500"] in lines
