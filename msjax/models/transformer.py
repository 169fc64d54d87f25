"""The multi-stream transformer: Qwen3, Qwen2.5 or Llama by its config, plus a stream embedding.

Letters: B batch, R rows, S streams, L = R * S cells, D model, N query heads, K key/value heads,
H head dim, F mlp, V vocabulary, M cache length.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from msjax import sharding
from msjax.config import ModelConfig
from msjax.kernels import api
from msjax.kernels.rotary import Turn, rms_norm
from msjax.models.layers import products, rope_angles
from msjax.sharding import Residual
from msjax.streams import HOLE, Streams


def _all_but_weights(primitive, *_, name="", **params):
  """Keeps all but weights from other chips: what is named so, and the call that fetches it."""
  return name != "weights" and primitive.name != "custom_vjp_call"


# What the backward pass finds, by the names that the parts of a layer give to what they make.
_saved = jax.checkpoint_policies.save_only_these_names
REMAT = {
  "none": _all_but_weights,
  "dots": _saved("qkv", "attention", "out", "gate", "up", "down"),
  "qkv": _saved("qkv", "attention"),
  "attention": _saved("attention"),
  "full": jax.checkpoint_policies.nothing_saveable,
}


def _matrix(rngs, shape, fan_in, gain=1.0):
  return nnx.Param(jax.random.normal(rngs.params(), shape) * (gain / math.sqrt(fan_in)))


def _bias(wanted, shape):
  return nnx.Param(jnp.zeros(shape)) if wanted else None


def _plus(x, bias):
  return x if bias is None else x + bias[...].astype(x.dtype)


class Attention(nnx.Module):
  """Projections of grouped-query attention; `attend` norms, rotates and does the rest."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    """Draws the weights."""
    D, N, K, H = cfg.dim, cfg.heads, cfg.kv_heads, cfg.head_dim
    self.q = _matrix(rngs, (D, N, H), D)
    self.k = _matrix(rngs, (D, K, H), D)
    self.v = _matrix(rngs, (D, K, H), D)
    self.out = _matrix(rngs, (N, H, D), N * H, 1 / math.sqrt(2 * cfg.layers))
    self.q_bias = _bias(cfg.qkv_bias, (N, H))
    self.k_bias = _bias(cfg.qkv_bias, (K, H))
    self.v_bias = _bias(cfg.qkv_bias, (K, H))
    self.out_bias = _bias(cfg.out_bias, (D,))
    self.q_norm = nnx.Param(jnp.ones(H)) if cfg.qk_norm else None
    self.k_norm = nnx.Param(jnp.ones(H)) if cfg.qk_norm else None

  def __call__(self, x: jax.Array, attend: api.Attend, residual: Residual) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    x = checkpoint_name(residual.whole(x), "cells")
    matrices = self.q, self.k, self.v
    made = products(0, x, tuple(w[...].reshape(len(w), -1) for w in matrices))
    q, k, v = (
      _plus(checkpoint_name(y, "qkv").reshape(*x.shape[:2], *w.shape[1:]), bias)
      for y, w, bias in zip(made, matrices, (self.q_bias, self.k_bias, self.v_bias))
    )
    scales = (None if norm is None else norm[...] for norm in (self.q_norm, self.k_norm))
    attended = attend(q, k, v, *scales)
    matrix = self.out[...].reshape(-1, self.out.shape[-1])
    (out,) = products(1, attended.reshape(*attended.shape[:2], -1), (matrix,))
    return _plus(checkpoint_name(residual.part(out), "out"), self.out_bias)


class Mlp(nnx.Module):
  """The gated feed-forward part (SwiGLU)."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    """Draws the weights."""
    D, F = cfg.dim, cfg.mlp_dim
    self.gate = _matrix(rngs, (D, F), D)
    self.up = _matrix(rngs, (D, F), D)
    self.down = _matrix(rngs, (F, D), F, 1 / math.sqrt(2 * cfg.layers))
    self.gate_bias = _bias(cfg.mlp_bias, (F,))
    self.up_bias = _bias(cfg.mlp_bias, (F,))
    self.down_bias = _bias(cfg.mlp_bias, (D,))

  def __call__(self, x: jax.Array, residual: Residual) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    x = checkpoint_name(residual.whole(x), "cells")
    (gate,), (up,) = (products(0, x, (w[...],)) for w in (self.gate, self.up))
    gate = _plus(checkpoint_name(gate, "gate"), self.gate_bias)
    up = _plus(checkpoint_name(up, "up"), self.up_bias)
    (down,) = products(1, jax.nn.silu(gate) * up, (self.down[...],))
    return _plus(checkpoint_name(residual.part(down), "down"), self.down_bias)


class Block(nnx.Module):
  """One pre-norm layer."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    """Draws the weights."""
    self.eps = cfg.norm_eps
    self.attention_norm = nnx.Param(jnp.ones(cfg.dim))
    self.attention = Attention(cfg, rngs=rngs)
    self.mlp_norm = nnx.Param(jnp.ones(cfg.dim))
    self.mlp = Mlp(cfg, rngs=rngs)

  def __call__(self, x: jax.Array, attend: api.Attend, residual: Residual) -> jax.Array:
    """[B, L, D] -> [B, L, D], cells as `residual` has them."""
    x = x + self.attention(rms_norm(x, self.attention_norm[...], self.eps), attend, residual)
    return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps), residual)


class Transformer(nnx.Module):
  """Rows of tokens in, hidden states and logits out.

  `layers` is one Block whose parameters carry a leading axis of layers.
  """

  def __init__(self, cfg: ModelConfig, streams: Streams, vocab_size: int, *, rngs: nnx.Rngs):
    """Draws the weights."""
    self.cfg, self.streams = nnx.static(cfg), streams
    embedding = lambda n: nnx.Param(0.02 * jax.random.normal(rngs.params(), (n, cfg.dim)))
    self.embed = embedding(vocab_size)  # [V, D]
    self.stream_embed = embedding(len(streams))  # [S, D]
    self.layers = jax.vmap(lambda r: Block(cfg, rngs=r))(rngs.split(cfg.layers))
    self.norm = nnx.Param(jnp.ones(cfg.dim))
    self.head = None if cfg.tied_head else _matrix(rngs, (vocab_size, cfg.dim), cfg.dim)

  def __call__(
    self,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """One pass over whole grids.

    Args:
      tokens: int32 [B, R, S]; -1 is a hole.
      segments: int32 [B, R] of packed sequences, or None.
      positions: int32 [B, R, S], or None for the rows of each segment; checked where not traced.
      dropout_key: a key when training with attention dropout, else None.

    Returns:
      [B, R, S, D], normed: `logits` takes it from here. At holes it means nothing.
    """
    cells = self.cells(tokens, segments, positions, dropout_key)
    return self.streams.from_attention(cells)

  def cells(
    self,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """As a call, but [B, L, D] in attention order.

    Chips that share a layer (`model`) deal its cells out between them; L is a multiple of their
    number.
    """
    streams = self.streams
    visibility = streams.visibility(tokens, segments)
    if positions is None:
      positions = streams.positions(tokens, segments)
    elif not any(isinstance(x, jax.core.Tracer) for x in (positions, tokens, segments)):
      streams.check_positions(positions, tokens, segments)
    turn = self.turn(streams.to_attention(positions))
    rate = self.cfg.attention_dropout if dropout_key is not None else 0.0
    attend = api.of_grid(*self._qkv(visibility.start.shape), visibility, streams, turn, rate)

    def layer(carry, block):
      x, key = carry
      layer_key = None
      if rate:
        key, layer_key = jax.random.split(key)
      attend_layer = functools.partial(attend, dropout_key=layer_key)
      return (block(x, attend_layer, sharding.CELLS_CUT), key), None

    # `auto` is settled before a training step is compiled; elsewhere nothing is differentiated.
    policy = REMAT[self.cfg.remat if self.cfg.remat != "auto" else "dots"]
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    (x, _), _ = jax.lax.scan(layer, (self.embedded(tokens), dropout_key), self.layers)
    return sharding.CELLS_CUT.whole(self.normed(x))

  def embedded(self, tokens: jax.Array) -> jax.Array:
    """Token plus stream embedding: int32 [B, R, S] -> [B, L, D], the chip's own cells.

    Each chip has some columns of the embedding: it looks them up for all who have others, and gets
    the others' for its own cells in return. Holes are clamped to token 0.
    """
    streams = self.streams
    ids = sharding.part(streams.to_attention(jnp.maximum(tokens, 0)), "cells", 1)
    asked = sharding.gather(ids, "table_dim", 0)
    columns = self.embed[...].at[asked].get(mode="promise_in_bounds")
    if sharding.size("table_dim") > 1:
      columns = columns.astype(self.dtype)  # half the bytes on the wires
    x = sharding.exchange(columns, "table_dim", cut=0, join=2)
    return self.with_streams(x, sharding.part(jnp.arange(tokens[0].size), "cells", 0))

  def with_streams(self, x: jax.Array, cells: jax.Array) -> jax.Array:
    """Adds the embeddings of streams to [B, L, D]; `cells` int32 [L] are indices of whole rows'."""
    stream = jnp.array(self.streams.order)[cells % len(self.streams)]
    return (x + self.stream_embed[...][stream]).astype(self.dtype)

  def turn(self, positions: jax.Array) -> Turn:
    """What norms and rotates queries and keys at positions int32 [B, L]."""
    cfg = self.cfg
    angles = rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return Turn(*angles, cfg.norm_eps)

  def normed(self, x: jax.Array) -> jax.Array:
    """The last norm."""
    return rms_norm(x, self.norm[...], self.cfg.norm_eps)

  @property
  def output_matrix(self) -> jax.Array:
    """[V, D], the embedding where tied."""
    return (self.embed if self.head is None else self.head)[...]

  def logits(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits of hidden states [..., D] for tokens [...]: float32 [..., V], 0 at holes."""
    return read_out(hidden, self.output_matrix.T, tokens)

  @property
  def dtype(self) -> jnp.dtype:
    """Of activations."""
    if self.cfg.dtype != "auto":
      return jnp.dtype(self.cfg.dtype)
    return jnp.dtype("float32" if api.platform() == "cpu" else "bfloat16")

  def _qkv(self, cells: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries, keys and values of a layer for [B, L] cells, as the kernels take them."""
    (B, L), cfg, chips = cells, self.cfg, sharding.size("heads")
    of = lambda heads: jax.ShapeDtypeStruct((B, heads // chips, L, cfg.head_dim), self.dtype)
    return of(cfg.heads), of(cfg.kv_heads), of(cfg.kv_heads)


def read_out(hidden: jax.Array, columns: jax.Array, tokens: jax.Array) -> jax.Array:
  """Logits by the columns [D, V] of the output matrix; see `Transformer.logits`."""
  logits = jnp.matmul(hidden, columns.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return jnp.where((tokens != HOLE)[..., None], logits, 0.0)
