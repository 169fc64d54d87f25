"""The key/value cache of sessions that are decoded together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What B sessions have been fed; `Prepared.room` makes an empty one.

  Attributes:
    k: rotated keys, cells in attention order, rows one after another. How arrays lie is the
      prepared model's choice; their third axis has the cells of a session.
    v: values, alike.
    key_ok: bool [B, M], which cells others may see.
    row: int32 [B], rows fed so far; the next one is written at cell `row * S`.
  """

  k: Any
  v: Any
  key_ok: jax.Array
  row: jax.Array

  @property
  def capacity(self) -> int:
    """M, in cells."""
    return self.key_ok.shape[1]

  def grown(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` more cells."""
    more = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, cells), (0, 0)])
    k, v = jax.tree.map(more, (self.k, self.v))
    return Cache(k, v, jnp.pad(self.key_ok, [(0, 0), (0, cells)]), self.row)

  def cut(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` cells in all; what was in others is lost."""
    k, v = jax.tree.map(lambda x: x[:, :, :cells], (self.k, self.v))
    return Cache(k, v, self.key_ok[:, :cells], self.row)
