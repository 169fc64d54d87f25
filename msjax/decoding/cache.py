"""The key/value cache, and the pass that feeds one row of every session against it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from msjax.kernels import xla
from msjax.models.transformer import Block, Transformer, read_out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled:
  """A model cut up for decoding, once and for all rows.

  On CPU a scan over stacked layers copies every slice, which takes three to five times as long as
  the pass itself, and a product with the rows of the output matrix a quarter longer than with its
  columns. Matrices have the dtype of activations, so that no row casts them.

  Attributes:
    trunk: the parts around the layers.
    layers: each with arrays of its own.
    columns: [D, V], the output matrix.
  """

  trunk: Transformer
  layers: tuple[Block, ...]
  columns: jax.Array

  @classmethod
  def of(cls, model: Transformer) -> "Unrolled":
    """Cuts up a model, which stays as it is."""
    return _unrolled(model)

  def logits(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """As `Transformer.logits`."""
    return read_out(hidden, self.columns, tokens)


@jax.jit
def _unrolled(model: Transformer) -> Unrolled:
  cast = lambda p: p if p.ndim < 2 else p.astype(model.dtype)  # norm scales stay float32
  layer = lambda i: jax.tree.map(lambda stacked: cast(stacked[i]), model.layers)
  trunk = jax.tree.map(lambda p: p, model)
  del trunk.layers, trunk.head
  return Unrolled(trunk, tuple(map(layer, range(model.cfg.layers))), cast(model.output_matrix.T))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What B sessions have been fed.

  Attributes:
    k: per layer [B, K, M, H], rotated keys, cells in attention order, rows one after another; in
      this order of axes a head's keys lie together.
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
    """M, in cells: whole key blocks, for attention would copy what is not."""
    return self.key_ok.shape[1]

  @classmethod
  def empty(cls, model: Transformer, batch: int, rows: int) -> "Cache":
    """Returns room for `rows` rows of `batch` sessions, or a few more."""
    cfg, M = model.cfg, -(-rows * len(model.streams) // xla.KEY_BLOCK) * xla.KEY_BLOCK
    zeros = lambda: tuple(
      jnp.zeros((batch, cfg.kv_heads, M, cfg.head_dim), model.dtype) for _ in range(cfg.layers)
    )
    return cls(zeros(), zeros(), jnp.zeros((batch, M), bool), jnp.zeros(batch, jnp.int32))

  def grown(self, cells: int) -> "Cache":
    """Returns the same cache with room for `cells` more cells."""
    more = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, cells), (0, 0)])
    key_ok = jnp.pad(self.key_ok, [(0, 0), (0, cells)])
    return Cache(tuple(map(more, self.k)), tuple(map(more, self.v)), key_ok, self.row)


def feed_row(
  model: Unrolled,
  cache: Cache,
  tokens: jax.Array,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds one row of every session; the caller sees to it that the cache has room.

  Args:
    model: cut up.
    cache: best donated.
    tokens: int32 [B, S], by stream id; -1 is a hole.
    positions: int32 [B, S], or None for the index of the row.

  Returns:
    Hidden states [B, S, D], normed, as the whole-grid pass gives for this row; the cache with it.
  """
  trunk, streams = model.trunk, model.trunk.streams
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
  for i, block in enumerate(model.layers):
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
