"""Rows in, rows out: what the model writes, and what it does not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import Config, ModelConfig
from msjax.decoding.generate import FREE, Decoder, decode, fill
from msjax.decoding.prepared import Unrolled
from msjax.errors import InputError, RunError
from msjax.kernels import xla
from msjax.streams import HOLE, Stream, Streams
from msjax.training.state import Learner

VOCAB, SILENCE, ROWS = 20, 3, 12
TINY = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=64, dtype="float32")
STREAMS = Streams(
  tuple(map(Stream.parse, ("output:output", "user:input", "think:internal"))), SILENCE
)


@pytest.fixture(autouse=True)
def small_key_blocks(monkeypatch):
  """So that a few rows fill several."""
  monkeypatch.setattr(xla, "KEY_BLOCK", 4)


@functools.cache
def model():
  """Every weight random."""
  learner = Learner(Config(model=TINY), STREAMS, VOCAB)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  draw = lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype)
  return learner.model(jax.tree.map(draw, shapes))


@functools.cache
def unrolled():
  return Unrolled.of(model())


def written(grid, rows=ROWS, **kwargs):
  """The grid [B, R, S] filled up."""
  return fill(Decoder(unrolled(), batch=len(grid), rows=rows, **kwargs), grid)


def listening(same=False):
  """Two sessions with random user text, if wanted the same, the rest free."""
  grid = np.full((2, ROWS, 3), FREE, np.int32)
  grid[:, :, 1] = np.random.default_rng(0).integers(0, VOCAB, (1 if same else 2, ROWS))
  return grid


def test_what_is_given_stands_and_the_rest_is_written():
  grid = listening()
  grid[1, 4:7, 2] = [5, HOLE, 6]
  out = written(grid)
  assert out.dtype == np.int32
  assert np.all((out >= HOLE) & (out < VOCAB))
  np.testing.assert_array_equal(out[grid != FREE], grid[grid != FREE])


def test_free_cells_are_the_likeliest_by_a_whole_pass():
  grid = listening()
  grid[1, :3] = HOLE  # a ragged start
  grid[0, 6, 0] = HOLE
  out = written(grid)
  logits = jax.jit(lambda m, tokens: m.logits(m(tokens), tokens))(model(), out)
  expected = np.where(out == HOLE, SILENCE, np.argmax(logits, -1))[:, :-1]
  free = grid[:, 1:] == FREE
  np.testing.assert_array_equal(out[:, 1:][free], expected[free])
  assert len(np.unique(out[:, 1:][free])) > 3


def test_where_nothing_was_read_silence_is_written():
  grid = listening()
  grid[1, :3] = HOLE
  grid[0, 6, 0] = HOLE
  out = written(grid, temperature=1.0)
  np.testing.assert_array_equal(out[0, 0, [0, 2]], SILENCE)  # the very first row
  np.testing.assert_array_equal(out[1, 3, [0, 2]], SILENCE)  # after holes
  assert out[0, 7, 0] == SILENCE


def test_a_session_goes_on_where_it_was():
  whole = written(grid := listening(), temperature=1.0)
  decoder = Decoder(unrolled(), batch=2, temperature=1.0)
  parts = [fill(decoder, part) for part in np.split(grid, 3, axis=1)]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(
  "row", [[[VOCAB, 0, 0]], [[FREE, 0, 0]], [[0, 0]], [[0, 0, 0], [0, 0, 0]], [0, 0, 0]]
)
def test_what_is_no_row_is_refused(row):
  with pytest.raises(
    InputError, match=r"row of shape .*; expected shape \(1, 3\), ids -1 \(hole\)"
  ):
    Decoder(unrolled()).feed(np.array(row, np.int32))


def test_broken_parameters_write_nothing():
  broken = jax.tree.map(lambda p: p, unrolled())
  broken = dataclasses.replace(broken, columns=broken.columns.at[:, 7].set(jnp.nan))
  with pytest.raises(RunError, match="row 1: logits are not finite"):
    fill(Decoder(broken, batch=2), listening())


def test_greedy_writing_depends_on_neither_seed_nor_room():
  first = written(listening())
  np.testing.assert_array_equal(written(listening(), seed=5), first)
  np.testing.assert_array_equal(written(listening(), rows=ROWS // 4), first)  # grows twice


def test_draws_depend_on_seed_session_row_and_stream_alone():
  grid = listening(same=True)
  first = written(grid, temperature=1.0, seed=5)
  np.testing.assert_array_equal(written(grid, temperature=1.0, seed=5, rows=ROWS // 4), first)
  np.testing.assert_array_equal(written(grid[:1], temperature=1.0, seed=5), first[:1])
  assert np.any(written(grid, temperature=1.0, seed=6) != first)
  assert np.any(first[0] != first[1])  # sessions that were told the same
  assert np.any(first[:, :, 0] != first[:, :, 2])  # streams
  assert len(np.unique(first[0, 1:, 0])) > 3  # rows


def test_rows_come_as_they_are_made():
  """What is given next may answer what was just written."""
  seen = []

  def user():
    for _ in range(ROWS):
      row = np.full((1, 3), FREE, np.int32)
      row[0, 1] = seen[-1][0, 0] if seen else SILENCE  # repeats what the output said
      yield row

  for row in decode(Decoder(unrolled(), rows=ROWS), user()):
    seen.append(row)
  out = np.stack(seen, axis=1)
  np.testing.assert_array_equal(out[0, 1:, 1], out[0, :-1, 0])
