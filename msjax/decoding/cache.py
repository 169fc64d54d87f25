"""The key/value cache of sessions that are decoded together."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What B sessions have been fed; `Prepared.room` makes an empty one.

  Attributes:
    k: rotated keys, cells in attention order, rows one after another. How arrays lie is the
      prepared model's choice.
    v: values of the same cells, which are their third axis.
    key_ok: bool [B, M], which cells others may see.
    row: int32 [B], rows fed so far; the next one is written at cell `row * S`.
    key_axis: which axis of keys has the cells of a session.
  """

  k: Any
  v: Any
  key_ok: jax.Array
  row: jax.Array
  key_axis: int = dataclasses.field(metadata={"static": True})

  @property
  def capacity(self) -> int:
    """M, in cells."""
    return self.key_ok.shape[1]

  def grown(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` more cells."""

    def more(x, axis):
      return jnp.pad(x, [(0, cells if i == axis else 0) for i in range(x.ndim)])

    return self._with_cells(more)

  def cut(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` cells in all; what was in others is lost."""
    return self._with_cells(lambda x, axis: jax.lax.slice_in_dim(x, 0, cells, axis=axis))

  def _with_cells(self, make: Callable[[jax.Array, int], jax.Array]) -> "Cache":
    """Takes `make(array, axis of cells)` in the place of each array."""
    return dataclasses.replace(
      self,
      k=jax.tree.map(lambda x: make(x, self.key_axis), self.k),
      v=jax.tree.map(lambda x: make(x, 2), self.v),
      key_ok=make(self.key_ok, 1),
    )
