"""Stream-block attention in plain XLA: blocks of queries against blocks of keys, no [L, L] array.

Queries are taken in chunks, and each chunk walks over the key blocks that its visibility intervals
touch with a running softmax; the backward pass walks the same blocks again from the saved log-sum.
Memory is linear in L, hidden blocks (the future, other packed segments) cost nothing, and every
variant of the rule, segments, holes, ragged caches and skip-silence are the same few comparisons.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from msjax.streams import Visibility

QUERY_BLOCK = 128
KEY_BLOCK = 128
_NEVER = -1e30  # a finite stand-in for -inf: exp(x - _NEVER) is masked, never NaN


class Dropout(NamedTuple):
  """Attention dropout: probabilities are zeroed with `rate`, by random numbers from `key`."""

  rate: float
  key: jax.Array


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visibility: Visibility,
  dropout: Dropout | None = None,
  key_block: int | None = None,
) -> jax.Array:
  """Softmax attention of every query over the keys it sees; differentiable in q, k and v.

  Args:
    q: [B, N, L, H], cells in attention order; N a multiple of K (grouped queries).
    k: [B, K, H, M], as columns: so products with queries take them as they lie. In training M = L,
      in decoding it is the cache's.
    v: [B, K, M, H].
    visibility: which keys each query sees. Each sees at least its own, so no softmax is empty.
    dropout: None when decoding and evaluating.
    key_block: how many keys are taken at once; None: `KEY_BLOCK`.

  Returns:
    [B, N, L, H] in the dtype of q; scores and sums are float32. What the backward pass takes from
    the forward pass is named "attention" for remat policies.
  """
  B, N, L, H = q.shape
  K, M = v.shape[1:3]
  rate = dropout.rate if dropout else 0.0
  blocks = _Blocks(min(QUERY_BLOCK, L), min(key_block or KEY_BLOCK, M), rate)
  q = _pad(q.reshape(B, K, N // K, L, H), 3, blocks.queries)
  k, v = _pad(k, 3, blocks.keys), _pad(v, 2, blocks.keys)
  visibility = Visibility(
    *(_pad(x, 1, blocks.queries, mode="edge") for x in visibility[:3]),
    key_ok=_pad(visibility.key_ok, 1, blocks.keys),
  )
  key = dropout.key if dropout else None
  out = _attention(blocks, q, k, v, visibility, key)
  return out[:, :, :, :L].reshape(B, N, L, H)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Static shape of the computation."""

  queries: int
  keys: int
  dropout_rate: float


class _Chunk(NamedTuple):
  """One chunk of queries: q [B, K, G, c, H], its visibility, and the key blocks it touches."""

  q: jax.Array
  visibility: Visibility
  first: jax.Array
  stop: jax.Array


def _pad(x, axis, multiple, **kwargs):
  short = -x.shape[axis] % multiple
  if not short:
    return x
  widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, **kwargs)


def _slice(x, i, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _loop(first, stop, body, init, count):
  """Runs body(i, carry) for first <= i < stop; without a loop where there is but one block."""
  return body(0, init) if count == 1 else jax.lax.fori_loop(first, stop, body, init)


def _chunk(blocks, q, visibility, i) -> _Chunk:
  start, end, itself = (_slice(x, i, blocks.queries, 1) for x in visibility[:3])
  return _Chunk(
    q=_slice(q, i, blocks.queries, 3),
    visibility=Visibility(start, end, itself, visibility.key_ok),
    first=jnp.minimum(start, itself).min() // blocks.keys,
    stop=(jnp.maximum(end, itself + 1).max() + blocks.keys - 1) // blocks.keys,
  )


def _scores(blocks, chunk, k, j):
  """Scaled scores of a chunk against key block j, float32 [B, K, G, c, keys], and who is seen."""
  kj = _slice(k, j, blocks.keys, 3)
  s = jnp.einsum("bkgqh,bkhc->bkgqc", chunk.q, kj, preferred_element_type=jnp.float32)
  index = j * blocks.keys + jnp.arange(blocks.keys)
  see = chunk.visibility
  ok = (index >= see.start[..., None]) & (index < see.end[..., None])
  ok &= _slice(see.key_ok, j, blocks.keys, 1)[:, None]
  ok |= index == see.itself[..., None]
  return s / math.sqrt(chunk.q.shape[-1]), ok[:, None, None]


def _kept(blocks, key, i, j, shape):
  """Dropout factors (0 or 1 / (1 - rate)) of block (i, j): the same in both passes."""
  if not blocks.dropout_rate:
    return 1.0
  keep = 1.0 - blocks.dropout_rate
  block_key = jax.random.fold_in(jax.random.fold_in(key, i), j)
  # Drawn flat: XLA takes ten seconds to compile a draw of five axes on CPU, 0.2 for one axis.
  return jax.random.bernoulli(block_key, keep, (math.prod(shape),)).reshape(shape) / keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(blocks, q, k, v, visibility, key):
  return _forward(blocks, q, k, v, visibility, key)[0]


def _forward(blocks, q, k, v, visibility, key):
  """Returns out [B, K, G, L, H] and the log of the softmax's sum [B, K, G, L]."""
  n_chunks, n_blocks = q.shape[3] // blocks.queries, v.shape[2] // blocks.keys

  def chunk_out(i):
    chunk = _chunk(blocks, q, visibility, i)

    def block(j, carry):
      top, total, out = carry
      s, ok = _scores(blocks, chunk, k, j)
      new_top = jnp.maximum(top, jnp.where(ok, s, _NEVER).max(-1))
      p = jnp.where(ok, jnp.exp(s - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + p.sum(-1)
      p = (p * _kept(blocks, key, i, j, p.shape)).astype(v.dtype)
      vj = _slice(v, j, blocks.keys, 2)
      pv = jnp.einsum("bkgqc,bkch->bkgqh", p, vj, preferred_element_type=jnp.float32)
      return new_top, total, out * shrink[..., None] + pv

    rows = chunk.q.shape[:-1]
    init = jnp.full(rows, _NEVER), jnp.zeros(rows), jnp.zeros(chunk.q.shape, jnp.float32)
    top, total, out = _loop(chunk.first, chunk.stop, block, init, n_blocks)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

  if n_chunks == 1:
    return chunk_out(0)
  out, log_sum = jax.lax.map(chunk_out, jnp.arange(n_chunks))
  join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*q.shape[:4], *x.shape[5:])
  return join(out), join(log_sum)


def _forward_saving(blocks, q, k, v, visibility, key):
  out, log_sum = checkpoint_name(_forward(blocks, q, k, v, visibility, key), "attention")
  return out, (q, k, v, visibility, key, out, log_sum)


def _backward(blocks, saved, dout):
  q, k, v, visibility, key, out, log_sum = saved
  n_chunks, n_blocks = q.shape[3] // blocks.queries, v.shape[2] // blocks.keys
  scale = 1 / math.sqrt(q.shape[-1])
  delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

  def chunk_grads(carry, i):
    chunk = _chunk(blocks, q, visibility, i)
    do, log_total, d = (_slice(x, i, blocks.queries, 3) for x in (dout, log_sum, delta))

    def block(j, carry):
      dq, dk, dv = carry
      s, ok = _scores(blocks, chunk, k, j)
      p = jnp.where(ok, jnp.exp(s - log_total[..., None]), 0.0)
      vj, kj = _slice(v, j, blocks.keys, 2), _slice(k, j, blocks.keys, 3)
      kept = _kept(blocks, key, i, j, p.shape)
      dp = jnp.einsum("bkgqh,bkch->bkgqc", do, vj, preferred_element_type=jnp.float32) * kept
      ds = (p * (dp - d[..., None]) * scale).astype(q.dtype)
      pd = (p * kept).astype(q.dtype)
      f32 = {"preferred_element_type": jnp.float32}
      dq += jnp.einsum("bkgqc,bkhc->bkgqh", ds, kj, **f32)
      dk = _add(dk, jnp.einsum("bkgqc,bkgqh->bkhc", ds, chunk.q, **f32), j, blocks.keys, 3)
      dv = _add(dv, jnp.einsum("bkgqc,bkgqh->bkch", pd, do, **f32), j, blocks.keys, 2)
      return dq, dk, dv

    dq = jnp.zeros(chunk.q.shape, jnp.float32)
    dq, dk, dv = _loop(chunk.first, chunk.stop, block, (dq, *carry), n_blocks)
    return (dk, dv), dq.astype(q.dtype)

  zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  if n_chunks == 1:
    (dk, dv), dq = chunk_grads(zeros, 0)
  else:
    (dk, dv), dq = jax.lax.scan(chunk_grads, zeros, jnp.arange(n_chunks))
    dq = jnp.moveaxis(dq, 0, 3).reshape(q.shape)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _add(total, part, j, size, axis):
  """Adds a block's part into `total` in place; `axis` is that of keys."""
  old = _slice(total, j, size, axis)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, j * size, axis)


_attention.defvjp(_forward_saving, _backward)
