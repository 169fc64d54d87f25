"""Which blocks of keys the blocks of queries see: nothing of it, some of it, all of it.

The TPU kernels ask this file what to visit. All comes from the visibility intervals and never from
an [L, L] mask, so that packed segments, holes, silent keys and every variant of the rule are one
code path, and the cost is that of a few reductions over L.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from msjax.streams import Visibility

HIDDEN, PARTIAL, WHOLE = 0, 1, 2


class Visits(NamedTuple):
  """What each of n blocks has to visit: first where a mask is needed, then where none is.

  Attributes:
    index: int32 [..., n, m], blocks in the order of visits; what follows the last visit is hidden.
    partial: int32 [..., n], how many visits, the first ones, need a mask.
    whole: int32 [..., n], how many visits after them need none.
  """

  index: jax.Array
  partial: jax.Array
  whole: jax.Array


def kinds(visibility: Visibility, block: int) -> jax.Array:
  """Returns what each block of queries sees of each block of keys.

  Args:
    visibility: of L queries and as many keys, where query i is key i's own.
    block: how many queries, or keys, make a block; divides L.

  Returns:
    int32 [B, n, n], n = L / block, queries first: WHOLE where every query sees every key, HIDDEN
    where their intervals show that none sees any; PARTIAL elsewhere, and in the block of its own.
  """
  B, L = visibility.key_ok.shape
  of_queries = lambda x: x.reshape(B, -1, 1, block)
  start, end = of_queries(visibility.start), of_queries(visibility.end)
  ok = visibility.key_ok.reshape(B, 1, -1, block)
  first = jnp.arange(0, L, block)
  whole = (start.max(-1) <= first) & (end.min(-1) >= first + block) & ok.all(-1)
  seen = (start.min(-1) < first + block) & (end.max(-1) > first) & ok.any(-1)
  own = jnp.eye(len(first), dtype=bool)
  return jnp.where(whole, WHOLE, jnp.where(seen | own, PARTIAL, HIDDEN)).astype(jnp.int32)


def visits(kinds: jax.Array) -> Visits:
  """Orders what each block of the last axis but one visits of the last; see `kinds`."""
  rank = jnp.where(kinds == PARTIAL, 0, jnp.where(kinds == WHOLE, 1, 2))
  count = lambda kind: (kinds == kind).sum(-1, dtype=jnp.int32)
  index = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
  return Visits(index, count(PARTIAL), count(WHOLE))


def cut(kinds: jax.Array, parts: int) -> jax.Array:
  """Cuts the last axis into so many parts of equal size: [B, n, m] -> [parts, B, n, m / parts].

  What is missing in the last part is hidden.
  """
  B, n, m = kinds.shape
  kinds = jnp.pad(kinds, [(0, 0), (0, 0), (0, -m % parts)], constant_values=HIDDEN)
  return jnp.moveaxis(kinds.reshape(B, n, parts, -1), 2, 0)


def block_size(length: int, largest: int = 512) -> int:
  """Returns the block, a multiple of 128 lanes, that wastes least on a length it need not divide.

  Small blocks need less padding, but each costs as much as 64 keys besides.
  """
  padded = lambda block: -(-length // block) * block
  return min(range(128, largest + 1, 128), key=lambda b: (padded(b) * (1 + 64 / b), -b))
