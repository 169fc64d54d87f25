"""Held-out loss by stream: per token, and in bits per byte of the text that was predicted."""

import math

import jax
import numpy as np

from msjax.data.pipeline import Source, held_out_batches
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import Tokenizer
from msjax.training.state import Learner, Params

Score = dict[str, float]
Scores = dict[str, Score | dict[str, Score]]  # of `all`, and under `streams` by name


class Tally:
  """Sums of cross-entropy by stream; silence apart from what is said."""

  def __init__(self, streams: Streams, tokenizer: Tokenizer):
    """Starts empty."""
    self.streams = streams
    self._bytes = np.array([tokenizer.byte_length(i) for i in range(tokenizer.vocab_size)])
    # By stream: tokens, their nats, their bytes, silences, their nats.
    self._sums = np.zeros((len(streams), 5))

  def add(self, labels: np.ndarray, nats: np.ndarray) -> None:
    """Counts cells: labels int32 (-1 for none) and cross-entropies, both [..., S]."""
    for s in range(len(self.streams)):
      label, cost = labels[..., s].ravel(), nats[..., s].ravel()
      silent = label == self.streams.silence_id
      said = (label != HOLE) & ~silent
      self._sums[s] += (
        *(said.sum(), cost[said].sum(), self._bytes[label[said]].sum()),
        *(silent.sum(), cost[silent].sum()),
      )

  def scores(self) -> Scores:
    """Returns for each stream, and for all that are trained: `tokens`, `loss_per_token` (nats),
    `bits_per_byte` and `loss_on_silence` (nats a silent cell); 0 where there is no such cell."""
    return {
      "streams": dict(zip(self.streams.names, map(_score, self._sums))),
      "all": _score(self._sums[self.streams.weights > 0].sum(0)),
    }


def _score(sums: np.ndarray) -> Score:
  tokens, nats, bytes_, silences, silent_nats = sums
  ratio = lambda a, b: float(a / b) if b else 0.0
  return {
    "tokens": int(tokens),
    "loss_per_token": ratio(nats, tokens),
    "bits_per_byte": ratio(nats / math.log(2), bytes_),
    "loss_on_silence": ratio(silent_nats, silences),
  }


def model_scores(learner: Learner, params: Params, source: Source, tokenizer: Tokenizer) -> Scores:
  """Scores a model on every held-out example."""
  streams = learner.streams
  tally = Tally(streams, tokenizer)
  entropy = jax.jit(learner.cell_entropy)
  t, d = learner.config.train, learner.config.data
  size = t.batch // t.micro_batches
  for batch in held_out_batches(source, rows=d.rows, batch=size, pack=d.pack):
    labels, nats = entropy(params, {k: v for k, v in batch.items() if k != "record"})
    tally.add(np.asarray(labels), np.asarray(nats))
  return tally.scores()


def unigram_scores(learner: Learner, train: Source, valid: Source, tokenizer: Tokenizer) -> Scores:
  """Scores the frequencies of each stream's tokens, silence among them, with one added to each."""
  streams = learner.streams
  counts = np.ones((len(streams), tokenizer.vocab_size))
  for index in range(len(train)):
    tokens = train[index].tokens
    for s in range(len(streams)):
      counts[s] += np.bincount(tokens[tokens[:, s] != HOLE, s], minlength=tokenizer.vocab_size)
  nats = -np.log(counts / counts.sum(1, keepdims=True))
  tally = Tally(streams, tokenizer)
  for index in range(len(valid)):
    tokens = valid[index].tokens
    predicted = (tokens[:-1] != HOLE) & (tokens[1:] != HOLE)
    labels = np.where(predicted, tokens[1:], HOLE)
    tally.add(labels, nats[np.arange(len(streams)), labels])
  return tally.scores()
