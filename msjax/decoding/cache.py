"""The key/value cache, and the pass that feeds one row of every session against it.

Layers are unrolled and each has arrays of its own: on CPU a scan over stacked layers copies every
slice, which costs three to five times the pass itself. `[B, K, M, H]` keeps a head's keys together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from msjax.kernels import xla
from msjax.models.transformer import Block, Transformer

Layers = tuple[Block, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What B sessions have been fed.

  Attributes:
    k: per layer [B, K, M, H], rotated keys, cells in attention order, rows one after another.
    v: per layer [B, K, M, H].
    key_ok: bool [B, M], which cells others may see.
    row: int32 [B], rows fed so far; the next one is written at cell `row * S`.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  key_ok: jax.Array
  row: jax.Array

  @property
  def capacity(self) -> int:
    """M, in cells."""
    return self.key_ok.shape[1]

  @classmethod
  def empty(cls, model: Transformer, batch: int, rows: int) -> "Cache":
    """Returns room for `rows` rows of `batch` sessions."""
    cfg, M = model.cfg, rows * len(model.streams)
    zeros = lambda: tuple(
      jnp.zeros((batch, cfg.kv_heads, M, cfg.head_dim), model.dtype) for _ in range(cfg.layers)
    )
    return cls(zeros(), zeros(), jnp.zeros((batch, M), bool), jnp.zeros(batch, jnp.int32))

  def grown(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` more cells."""
    more = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, cells), (0, 0)])
    key_ok = jnp.pad(self.key_ok, [(0, 0), (0, cells)])
    return Cache(tuple(map(more, self.k)), tuple(map(more, self.v)), key_ok, self.row)


def unstack(model: Transformer) -> tuple[Transformer, Layers]:
  """Cuts a model, once and for all rows, into the parts around the layers and the layers."""
  layer = lambda i: jax.tree.map(lambda stacked: stacked[i], model.layers)
  trunk = jax.tree.map(lambda p: p, model)
  del trunk.layers
  return trunk, tuple(layer(i) for i in range(model.cfg.layers))


def feed_row(
  trunk: Transformer,
  layers: Layers,
  cache: Cache,
  tokens: jax.Array,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds one row of every session; the caller sees to it that the cache has room.

  Args:
    trunk: the parts around the layers, from `unstack`.
    layers: from `unstack`.
    cache: best donated.
    tokens: int32 [B, S], by stream id; -1 is a hole.
    positions: int32 [B, S], or None for the index of the row.

  Returns:
    Hidden states [B, S, D], normed, as the whole-grid pass gives for this row; the cache with it.
  """
  streams = trunk.streams
  if positions is None:
    positions = jnp.broadcast_to(cache.row[:, None], tokens.shape)
  at = cache.row * len(streams)
  row_ok = streams.key_ok(tokens[:, None])
  key_ok = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new, (i,)))(
    cache.key_ok, row_ok, at
  )
  visibility = streams.row_visibility(tokens, cache.row, key_ok)
  rope = trunk.rope(streams.to_attention(positions[:, None]))
  x = streams.to_attention(trunk.embedded(tokens)[:, None])
  k_cache, v_cache = list(cache.k), list(cache.v)
  for i, block in enumerate(layers):
    attend = functools.partial(_attend_cache, k_cache, v_cache, i, at, visibility)
    x = block(x, rope, attend)
  hidden = streams.from_attention(trunk.normed(x))[:, 0]
  return hidden, Cache(tuple(k_cache), tuple(v_cache), key_ok, cache.row + 1)


def _attend_cache(k_cache, v_cache, i, at, visibility, q, k, v):
  """Writes the row's keys and values into layer i of the caches, then attends to it."""
  put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
  k_cache[i] = put(k_cache[i], jnp.swapaxes(k, 1, 2).astype(k_cache[i].dtype), at)
  v_cache[i] = put(v_cache[i], jnp.swapaxes(v, 1, 2).astype(v_cache[i].dtype), at)
  out = xla.attention(jnp.swapaxes(q, 1, 2), k_cache[i], v_cache[i], visibility)
  return jnp.swapaxes(out, 1, 2)
