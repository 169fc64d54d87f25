"""Rows in, rows out: feeds a row of every session, takes the model's proposal for the next.

Knows token ids, not text.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from msjax.decoding.cache import Cache, Unrolled, feed_row
from msjax.decoding.sampling import sample
from msjax.streams import HOLE

FREE = -2  # in a row that is handed in: let the model write this cell


@functools.partial(jax.jit, donate_argnames="cache")
def _tick(
  model: Unrolled,
  cache: Cache,
  tokens: jax.Array,
  temperature: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Feeds a row [B, S]; returns the proposal for the next [B, S], silence after a hole."""
  hidden, cache = feed_row(model, cache, tokens)
  logits = model.logits(hidden, tokens)
  session_keys = jax.vmap(
    lambda session, row: jax.random.fold_in(jax.random.fold_in(key, session), row)
  )(jnp.arange(tokens.shape[0]), cache.row)
  proposal = sample(logits, temperature, session_keys)
  return jnp.where(tokens == HOLE, model.trunk.streams.silence_id, proposal), cache


class Decoder:
  """B sessions that advance together, row by row; the cache grows as they do."""

  def __init__(
    self,
    model: Unrolled,
    batch: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = 64,
  ):
    """Makes room for `rows` rows to begin with; what is drawn depends on seed, session, row and
    stream alone."""
    self.model, self.streams = model, model.trunk.streams
    self.temperature = jnp.float32(temperature)
    self.key = jax.random.key(seed)
    self.cache = Cache.empty(model.trunk, batch, rows)
    self.rows_fed = 0

  def feed(self, row: np.ndarray) -> jax.Array:
    """Feeds a row int32 [B, S], returns the proposal for the next, int32 [B, S]."""
    if (self.rows_fed + 1) * len(self.streams) > self.cache.capacity:
      self.cache = self.cache.grown(self.cache.capacity)
    proposal, self.cache = _tick(
      self.model, self.cache, jnp.asarray(row), self.temperature, self.key
    )
    self.rows_fed += 1
    return proposal


def decode(decoder: Decoder, given: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields complete rows int32 [B, S], one for each row of `given`, as they are made.

  Cells of `given` are token ids, holes, or FREE for the model to write; free cells of the very
  first row and those after a hole are silence, for there is nothing to write them from.
  """
  proposal = decoder.streams.silence_id
  for row in given:
    row = np.where(row == FREE, proposal, row).astype(np.int32)
    yield row
    proposal = np.asarray(decoder.feed(row))


def fill(decoder: Decoder, grid: np.ndarray) -> np.ndarray:
  """Returns int32 [B, R, S] with the FREE cells written by the model."""
  return np.stack(list(decode(decoder, np.moveaxis(grid, 1, 0))), axis=1)
