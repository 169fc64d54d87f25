"""A model made ready for decoding, and how it takes one row through its layers."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from msjax import sharding
from msjax.decoding.cache import Cache
from msjax.decoding.look import attended
from msjax.kernels import api, tpu_decode, xla
from msjax.kernels.lanes import LANES
from msjax.kernels.rotary import Turn
from msjax.models import axes
from msjax.models.transformer import Block, Transformer
from msjax.streams import HOLE, Visibility

# Cells of a cache that attention takes at once. With 128, as in grids, a tick of a small model
# spends most of its time between operations.
KEY_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Prepared(abc.ABC):
  """A model cut up for decoding, once and for all rows.

  Matrices have the dtype of activations, so that no row casts them.

  Attributes:
    trunk: the parts around the layers.
    layers: as the variant wants them.
    unembed: [V, D], the output matrix; with rows of zeros, if need be, so that chips have equally
      many.
  """

  trunk: Transformer
  layers: Any
  unembed: jax.Array

  @property
  def vocab_size(self) -> int:
    """V; `unembed` may have more."""
    return len(self.trunk.embed)

  def logits(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """As `Transformer.logits`, for the chip's tokens; -inf where there is none."""
    # Holes are blanked here and not in the logits, of which each pass costs as much as it reads.
    hidden = jnp.where((tokens != HOLE)[..., None], hidden, 0)
    logits = jnp.matmul(hidden, self.unembed.T, preferred_element_type=jnp.float32)
    V = len(self.unembed)
    if V * sharding.size("vocab") == self.vocab_size:
      return logits
    ids = sharding.index("vocab") * V + jnp.arange(V)
    return jnp.where(ids < self.vocab_size, logits, -jnp.inf)

  def room(self, batch: int, rows: int, sessions: str | None = "batch") -> Cache:
    """Returns an empty cache for `rows` rows of `batch` sessions, or a few more; cut as of
    `cache_specs`."""
    M = -(-rows * len(self.trunk.streams) // self.key_block) * self.key_block

    def empty():
      k, v = self._zeros(batch, M)
      return Cache(k, v, jnp.zeros((batch, M), bool), jnp.zeros(batch, jnp.int32), self._key_axis)

    return sharding.empty(empty, self.cache_specs(jax.eval_shape(empty), sessions))

  def cache_specs(self, cache: Cache, sessions: str | None = "batch") -> Cache:
    """How the arrays of a cache of this model are cut: by sessions (None: not) and heads."""
    k, v = jax.tree.map(lambda _: self._key_spec(sessions), (cache.k, cache.v))
    of_sessions = sharding.spec(sessions)
    return dataclasses.replace(cache, k=k, v=v, key_ok=of_sessions, row=of_sessions)

  def cache_session_axes(self, cache: Cache) -> Cache:
    """Which axis of each array of a cache is that of sessions."""
    k, v = jax.tree.map(lambda _: self._session_axis, (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v, key_ok=0, row=0)

  @property
  @abc.abstractmethod
  def key_block(self) -> int:
    """Cells by which the room of a cache is counted, for attention would copy what is not whole."""

  @abc.abstractmethod
  def through_layers(
    self, x: jax.Array, turn: Turn, cache: Cache, visibility: Visibility, look: bool
  ) -> tuple[jax.Array, Any, Any, jax.Array | None]:
    """Takes the C rows that are fed, [B, C * S, D] in attention order, through all layers.

    Returns:
      [B, C * S, D]; keys and values as in the cache, the rows' among them; if `look`, where the
      attention of one row went: see `Look`.
    """

  @property
  @abc.abstractmethod
  def _session_axis(self) -> int:
    """Which axis of keys or values of a cache is that of sessions."""

  @property
  @abc.abstractmethod
  def _key_axis(self) -> int:
    """Which axis of keys is that of cells."""

  @abc.abstractmethod
  def _key_spec(self, sessions: str | None) -> jax.P:
    """How each array of keys or values of a cache is cut."""

  @abc.abstractmethod
  def _zeros(self, batch: int, M: int) -> tuple[Any, Any]:
    """Keys and values of an empty cache."""

  def _at(self, cache: Cache) -> jax.Array:
    """Where the row goes in each session, int32 [B]."""
    return cache.row * len(self.trunk.streams)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled(Prepared):
  """One layer after another, each with arrays of its own: for CPU and GPU.

  On CPU a scan over stacked layers copies every slice, which takes three to five times as long as
  the pass itself. A head's keys and values lie together in the cache of a layer, [B, K, H, M] and
  [B, K, M, H]: as products take them.
  """

  layers: tuple[axes.ByOutput, ...]

  @classmethod
  def of(cls, model: Transformer) -> "Unrolled":
    """Cuts up a model, which stays as it is."""
    return _made(_unrolled, model)

  @property
  def blocks(self) -> list[Block]:
    """The layers as all others know them."""
    return [layer.block(self.trunk.cfg.head_dim) for layer in self.layers]

  @property
  def key_block(self) -> int:
    """See `Prepared`."""
    return KEY_BLOCK

  def through_layers(self, x, turn, cache, visibility, look):
    """See `Prepared`."""
    k_cache, v_cache, attention = list(cache.k), list(cache.v), []
    for i, block in enumerate(self.blocks):
      at = self._at(cache)

      def attend(q, k, v, q_scale, k_scale, i=i, at=at):
        q, k = turn(q, q_scale), turn(k, k_scale)
        k_cache[i] = _write(k_cache[i], k.transpose(0, 2, 3, 1), at, axis=self._key_axis)
        v_cache[i] = _write(v_cache[i], _swap(v), at, axis=2)
        if look:
          attention.append(attended(_swap(q), k_cache[i], visibility, self.trunk.streams))
        heads = _swap(q), k_cache[i], v_cache[i]
        return _swap(xla.attention(*heads, visibility, key_block=KEY_BLOCK))

      x = block(x, attend, sharding.CELLS_WHOLE)
    return x, tuple(k_cache), tuple(v_cache), sum(attention) / len(self.layers) if look else None

  _session_axis = 0
  _key_axis = 3

  def _key_spec(self, sessions):
    return sharding.spec(sessions, "heads")

  def _zeros(self, batch, M):
    cfg = self.trunk.cfg
    K, H = cfg.kv_heads, cfg.head_dim
    of_layers = lambda *shape: tuple(jnp.zeros(shape, self.trunk.dtype) for _ in range(cfg.layers))
    return of_layers(batch, K, H, M), of_layers(batch, K, M, H)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(Prepared):
  """A scan over layers, with the decode kernel for TPU, which reads a cache of all layers in place.

  The cache is [layers, B, M, K * H]. The row is written into it after the scan, for all layers at
  once; until then the kernel gets the row's keys and values by themselves.
  """

  layers: Block

  @classmethod
  def of(cls, model: Transformer) -> "Stacked":
    """Casts a model, which stays as it is."""
    return _made(_stacked, model)

  @property
  def key_block(self) -> int:
    """See `Prepared`."""
    return LANES

  def through_layers(self, x, turn, cache, visibility, look):
    """See `Prepared`."""
    one_row = x.shape[1] == len(self.trunk.streams)
    plan = tpu_decode.plan(visibility, cache.k) if one_row else None

    def layer(x, block_and_index):
      block, i = block_and_index
      new, attention = [], []

      def attend(q, k, v, q_scale, k_scale):  # the block gives its keys and values to nobody else
        new.extend((turn(k, k_scale), v))
        q = turn(q, q_scale)
        if look:
          keys = jnp.swapaxes(self._with_rows(cache.k[i], new[0], cache), 2, 3)
          attention.append(attended(_swap(q), keys, visibility, self.trunk.streams))
        if one_row:
          return tpu_decode.attention(q, *new, cache.k, cache.v, i, plan)
        k, v = (self._with_rows(old[i], rows, cache) for old, rows in zip((cache.k, cache.v), new))
        return _swap(xla.attention(_swap(q), jnp.swapaxes(k, 2, 3), v, visibility))

      x = block(x, attend, sharding.CELLS_WHOLE)
      new = tuple(rows.reshape(*rows.shape[:2], -1) for rows in new)
      return x, (new, attention[0] if look else None)

    indices = jnp.arange(self.trunk.cfg.layers)
    x, (new, attention) = jax.lax.scan(layer, x, (self.layers, indices))
    write = lambda old, rows: tpu_decode.write_rows(old, rows, self._at(cache))
    attention = attention.mean(0) if look else None
    return x, write(cache.k, new[0]), write(cache.v, new[1]), attention

  def _with_rows(self, old, rows, cache):
    """Keys or values of a layer [B, M, K * H], with rows [B, C * S, K, H] -> [B, K, M, H]."""
    B, cells, K, H = rows.shape
    rows = rows.reshape(1, B, cells, K * H).astype(old.dtype)
    (joined,) = tpu_decode.write_rows(old[None], rows, self._at(cache))
    return _swap(joined.reshape(B, -1, K, H))

  _session_axis = 1
  _key_axis = 2

  def _key_spec(self, sessions):
    return sharding.spec(None, sessions, None, "heads")

  def _zeros(self, batch, M):
    cfg = self.trunk.cfg
    shape = cfg.layers, batch, M, cfg.kv_heads * cfg.head_dim
    return jnp.zeros(shape, self.trunk.dtype), jnp.zeros(shape, self.trunk.dtype)


def feed(
  model: Prepared,
  cache: Cache,
  tokens: jax.Array,
  count: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds R rows of every session; the caller sees to it that the cache has room for them.

  Args:
    model: prepared.
    cache: of this model; best donated.
    tokens: int32 [B, R, S], by stream id; -1 is a hole.
    count: int32 [B], how many of the rows count; None: all. The others leave nothing behind that
      is seen, but need room.
    positions: int32 [B, R, S], or None for the indices of the rows.

  Returns:
    Hidden states [B, R, S, D], normed, as the whole-grid pass gives for these rows; the cache with
    them.
  """
  return _feed(model, cache, tokens, count, positions, look=False)[:2]


def feed_and_look(
  model: Prepared, cache: Cache, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, Cache, jax.Array]:
  """Feeds one row as `feed` does, and returns where attention went, too: see `Look`."""
  return _feed(model, cache, tokens, count, None, look=True)


def _feed(model, cache, tokens, count, positions, look):
  trunk, streams = model.trunk, model.trunk.streams
  R = tokens.shape[1]
  if positions is None:
    rows = cache.row[:, None] + jnp.arange(R)
    positions = jnp.broadcast_to(rows[..., None], tokens.shape)
  key_ok = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new, (i,)))(
    cache.key_ok, streams.key_ok(tokens), cache.row * len(streams)
  )
  visibility = streams.visibility_in_cache(tokens, cache.row, key_ok)
  turn = trunk.turn(streams.to_attention(positions))
  x = _embedded(trunk, tokens)
  x, k, v, attention = model.through_layers(x, turn, cache, visibility, look)
  hidden = streams.from_attention(trunk.normed(x))
  row = cache.row + (R if count is None else count)
  return hidden, dataclasses.replace(cache, k=k, v=v, key_ok=key_ok, row=row), attention


def _embedded(trunk, tokens):
  """Token plus stream embedding of rows [B, R, S] -> [B, R * S, D] in attention order."""
  ids = trunk.streams.to_attention(jnp.maximum(tokens, 0))
  columns = trunk.embed[...].at[ids].get(mode="promise_in_bounds")
  return trunk.with_streams(sharding.gather(columns, "table_dim", 2), jnp.arange(ids.shape[1]))


def prepare(model: Transformer) -> Prepared:
  """Makes a model ready for decoding on the platform that programs are built for."""
  cfg, chips = model.cfg, sharding.chips("heads")
  heads = cfg.heads // chips, cfg.kv_heads // chips
  backend = api.of_rows(len(model.streams), *heads, cfg.head_dim, model.dtype)
  return (Stacked if backend == "tpu" else Unrolled).of(model)


def _made(cut_up: Callable[[Transformer], Prepared], model: Transformer) -> Prepared:
  """Cuts up a model, every chip its part."""
  return sharding.made(cut_up, axes.specs(jax.eval_shape(cut_up, model)))(model)


def _unrolled(model: Transformer) -> Unrolled:
  block = lambda i: jax.tree.map(lambda stacked: _cast(model, stacked[i], 2), model.layers)
  layer = lambda i: axes.ByOutput.of(block(i))
  return Unrolled(_trunk(model), tuple(map(layer, range(model.cfg.layers))), _unembed(model))


def _stacked(model: Transformer) -> Stacked:
  layers = jax.tree.map(lambda stacked: _cast(model, stacked, 3), model.layers)
  return Stacked(_trunk(model), layers, _unembed(model))


def _cast(model, array, matrix_ndim):
  """Casts a matrix; scales of norms stay float32."""
  return array if array.ndim < matrix_ndim else array.astype(model.dtype)


def _unembed(model):
  rows = model.output_matrix.astype(model.dtype)
  return jnp.pad(rows, ((0, -len(rows) % sharding.chips("vocab")), (0, 0)))


def _trunk(model):
  trunk = jax.tree.map(lambda p: p, model)
  trunk.embed = nnx.Param(_cast(model, model.embed[...], 2))
  del trunk.layers, trunk.head
  return trunk


def _write(cache, new, at, axis):
  """Writes keys or values of rows into a cache, from cells `at` [B] on; `axis` is that of cells."""

  def put(old, new, at):
    return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis - 1)

  return jax.vmap(put)(cache, new.astype(cache.dtype), at)


def _swap(x):
  """[B, cells, heads, H] to [B, heads, cells, H], or back."""
  return jnp.swapaxes(x, 1, 2)
