"""Rows in, rows out: feeds a row of every session, takes the model's proposal for the next.

Knows token ids, not text.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from msjax import sharding
from msjax.decoding.cache import Cache
from msjax.decoding.prepared import Prepared, feed_row
from msjax.decoding.sampling import sample
from msjax.errors import InputError, RunError
from msjax.models import axes
from msjax.streams import HOLE

FREE = -2  # in a row that is handed in: let the model write this cell
_NOT_FINITE = -3  # in a proposal: there is no likeliest token


@functools.partial(jax.jit, donate_argnames="cache")
def tick(
  model: Prepared,
  cache: Cache,
  tokens: jax.Array,
  temperature: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Feeds a row to every session and proposes the next; sessions are cut over `data`.

  Args:
    model: prepared, on the mesh in use.
    cache: of this model; donated.
    tokens: int32 [B, S], by stream id; -1 is a hole.
    temperature: float32 [].
    key: of what is drawn.

  Returns:
    The proposal int32 [B, S], silence after a hole and `_NOT_FINITE` where the logits are not; the
    cache with the row.
  """
  of_sessions, everywhere = sharding.spec("batch"), sharding.spec()
  cache_specs = model.cache_specs(cache)
  return sharding.on_chips(
    _tick_of_chip,
    in_specs=(axes.specs(model), cache_specs, of_sessions, everywhere, everywhere),
    out_specs=(of_sessions, cache_specs),
  )(model, cache, tokens, temperature, key)


def _tick_of_chip(model, cache, tokens, temperature, key):
  hidden, cache = feed_row(model, cache, tokens)
  logits = model.logits(hidden, tokens)
  sessions = sharding.index("batch") * len(tokens) + jnp.arange(len(tokens))
  of_session = lambda session, row: jax.random.fold_in(jax.random.fold_in(key, session), row)
  proposal = sample(logits, temperature, jax.vmap(of_session)(sessions, cache.row))
  top = logits.max(-1)
  top = jnp.where(jnp.isnan(top), jnp.inf, top)  # for the highest of chips may leave out a NaN
  finite = jnp.isfinite(sharding.highest(top, "vocab"))
  proposal = jnp.where(finite, proposal, _NOT_FINITE)
  return jnp.where(tokens == HOLE, model.trunk.streams.silence_id, proposal), cache


class Decoder:
  """B sessions that advance together, row by row; the cache grows as they do.

  Attributes:
    streams: of the model.
    rows_fed: so far.
    proposal: what the model would write in the next row, int32 [B, S]; silence before the first.
  """

  def __init__(
    self,
    model: Prepared,
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
    self.cache = model.room(batch, max(rows, 1))
    self.rows_fed = 0
    self.proposal = jnp.full((batch, len(self.streams)), self.streams.silence_id, jnp.int32)

  def feed(self, row: np.ndarray) -> jax.Array:
    """Feeds a row int32 [B, S] of token ids and holes; returns the next proposal.

    Raises:
      InputError: a row of another shape, or of ids that are no tokens.
    """
    expected, vocab = self.proposal.shape, self.model.vocab_size
    if row.shape != expected or row.min() < HOLE or row.max() >= vocab:
      raise InputError(
        f"row of shape {row.shape}, ids {row.min()} to {row.max()}; expected shape {expected}, "
        f"ids -1 (hole) to {vocab - 1}"
      )
    if (self.rows_fed + 1) * len(self.streams) > self.cache.capacity:
      self.cache = self.cache.grown(self.cache.capacity)
    self.proposal, self.cache = tick(
      self.model, self.cache, jnp.asarray(row), self.temperature, self.key
    )
    self.rows_fed += 1
    return self.proposal


def decode(decoder: Decoder, given: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Yields complete rows int32 [B, S], one for each row of `given`, as they are made.

  Cells of `given` are token ids, holes, or FREE for the model to write; free cells of a session's
  first row and those after a hole are silence, for there is nothing to write them from.

  Raises:
    InputError: a cell of `given` is none of these.
    RunError: the model's logits are not finite.
  """
  for row in given:
    proposal = np.asarray(decoder.proposal)
    if (proposal == _NOT_FINITE).any():
      raise RunError(f"row {decoder.rows_fed}: logits are not finite; are the parameters?")
    row = np.where(row == FREE, proposal, row).astype(np.int32)
    yield row
    decoder.feed(row)


def fill(decoder: Decoder, grid: np.ndarray) -> np.ndarray:
  """Returns int32 [B, R, S] with the FREE cells written by the model."""
  return np.stack(list(decode(decoder, np.moveaxis(grid, 1, 0))), axis=1)
