"""Held-out running arithmetic: how often the answer is right, and how many rows it takes."""

import numpy as np

from msjax.data import synthetic
from msjax.data.synthetic import Question
from msjax.decoding.engine import fill
from msjax.decoding.tick import FREE
from msjax.model import Model

QUESTIONS = 500
_PATIENCE = 4  # rows an answer may come late before it counts as none


def questions(model: Model, count: int = QUESTIONS) -> list[Question]:
  """Returns held-out questions of the greatest length."""
  seed, ops = model.config.train.seed, model.config.data.max_ops
  return [synthetic.question("valid", seed, i, ops, ops) for i in range(count)]


def answered(model: Model, asked: list[Question]) -> np.ndarray:
  """Returns int32 [B, R, S]: every question read token by token, all else written by the model."""
  user = _listener(model)
  heard = np.array([[_id(model, word) for word in q.words] for q in asked], np.int32)
  rows = heard.shape[1] + (_answer_lag(model) + _PATIENCE)
  grid = np.full((len(asked), rows, len(model.streams)), FREE, np.int32)
  if not model.config.data.chat:
    grid[:, :, user] = model.streams.silence_id
  grid[:, : heard.shape[1], user] = heard
  return fill(model.engine(places=len(asked), rows=rows), grid)


def measure(model: Model) -> dict[str, float]:
  """Returns `accuracy`, and the medians `rows_to_first_answer` and `rows_total`.

  The first thing said in the output stream counts as the answer. A chat has one stream: its answer
  is what follows as many thoughts as there are states. No answer is a wrong one, as late as can be.
  """
  asked = questions(model)
  grid = answered(model, asked)
  question_end = model.config.data.max_ops + 1
  if model.config.data.chat:
    rows = np.full(len(asked), question_end + _answer_lag(model))
    said = grid[:, rows[0], 0]
  else:
    output = grid[:, :, model.streams.of_kind("output")[0]]
    spoken = output != model.streams.silence_id
    rows = np.where(spoken.any(1), spoken.argmax(1), grid.shape[1] - 1)
    said = output[np.arange(len(asked)), rows]
  right = np.array([_id(model, str(q.states[-1])) for q in asked])
  return {
    "questions": len(asked),
    "accuracy": float(np.mean(said == right)),
    "rows_to_first_answer": float(np.median(rows) - question_end),
    "rows_total": float(np.median(rows) + 1),
  }


def shown(model: Model, count: int) -> list[np.ndarray]:
  """Returns some answered questions, int32 [R, S] each, up to the row of the answer."""
  end = model.config.data.max_ops + 2 + _answer_lag(model)
  return [grid[:end] for grid in answered(model, questions(model, count))]


def _answer_lag(model: Model) -> int:
  """Rows from `=` to the answer as the task lays it out."""
  return model.config.data.max_ops + 2 if model.config.data.chat else model.streams.lag


def _listener(model: Model) -> int:
  return 0 if model.config.data.chat else model.streams.of_kind("input")[0]


def _id(model: Model, word: str) -> int:
  return model.tokenizer.encode(word)[0]
