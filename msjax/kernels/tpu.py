"""Stream-block attention on TPU: the Pallas kernels as one differentiable function.

What blocks see of one another is the same in all layers, so it is worked out once, as a `Plan`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from msjax.kernels import blocks, tpu_backward, tpu_forward
from msjax.kernels.lanes import LANES
from msjax.kernels.tpu_backward import Queries
from msjax.kernels.tpu_forward import Keys
from msjax.streams import Visibility

HEAD_DIMS = (64, 128, 256)  # 64 costs as much as 128, for so wide are the lanes
GROUP = 8  # query heads that share a key/value head, at most
STREAMS = LANES  # of a grid, at most: so far beyond its own key may a query see
LARGEST_BLOCK = 512
VISITS = 80_000  # pairs of blocks, at most: three numbers each in 1 MiB of scalar memory
_SEEN_BY_NONE = 2**30  # in place of a key's index: beyond every interval

Array = jax.Array | jax.ShapeDtypeStruct


class Plan(NamedTuple):
  """What the kernels ask of a `Visibility`; P is L padded to whole blocks.

  Attributes:
    intervals: int32 [B, 2, P], first key and one past the last key that each query sees.
    keys: int32 [B, 1, P], the index of each key, or one beyond every interval.
    forward: what blocks of queries do.
    backward: what blocks of keys do.
  """

  intervals: jax.Array
  keys: jax.Array
  forward: tpu_forward.Todo
  backward: tpu_backward.Todo


def refusal(q: Array, k: Array, v: Array) -> str | None:
  """Says in one sentence why the kernels cannot take these; None if they can."""
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4:
      return f"{name}: shape {x.shape}; the TPU kernels take [batch, heads, length, head dim]"
    if x.dtype != q.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name}: dtype {x.dtype}; the TPU kernels take bfloat16 or float32, one for all"
  B, N, L, H = q.shape
  K = k.shape[1]
  if k.shape != (B, K, L, H):
    return f"k: shape {k.shape}; expected ({B}, K, {L}, {H}) for q {q.shape}, a key for every query"
  if v.shape != k.shape:
    return f"v: shape {v.shape}; expected {k.shape}, as k is"
  if not K or N % K or N // K > GROUP:
    return f"k: {K} heads; the TPU kernels take 1 to {GROUP} heads of q to one of k, q has {N}"
  if max(HEAD_DIMS) < H:
    return f"q: shape {q.shape}; the TPU kernels take a head dim of up to {max(HEAD_DIMS)}"
  pairs = B * (-(-L // blocks.block_size(L, LARGEST_BLOCK))) ** 2
  if pairs > VISITS:
    return f"q: shape {q.shape}; {pairs:,} pairs of blocks, the TPU kernels take up to {VISITS:,}"
  return None


def plan(q: Array, k: Array, visibility: Visibility) -> Plan:
  """Works out what blocks see of one another, for `attention` of arrays like q and k.

  Args:
    q: [B, N, L, H]; its shape and dtype matter.
    k: [B, K, L, H]; its shape matters.
    visibility: of L queries and L keys, where query i is key i's own, as whole grids have it, and
      none sees a key more than 128 places after its own, as in grids of up to `STREAMS` streams.
  """
  B, _, L, _ = q.shape
  reason = refusal(q, k, k)
  if reason:
    raise ValueError(reason)
  for name, x in zip(visibility._fields, visibility):
    if x.shape != (B, L):
      raise ValueError(f"visibility.{name}: shape {x.shape}; expected {(B, L)} for q {q.shape}")
  block = blocks.block_size(L, LARGEST_BLOCK)
  padded = lambda x, **how: jnp.pad(x, [(0, 0), (0, -L % block)], **how)
  start, end = (padded(x, mode="edge") for x in (visibility.start, visibility.end))
  key_ok = padded(visibility.key_ok)
  kinds = blocks.kinds(Visibility(start, end, visibility.itself, key_ok), block)
  index = jnp.arange(key_ok.shape[1])
  causal = (end <= index // LANES * LANES + LANES).reshape(B, -1, block).all(-1)
  own = jnp.eye(kinds.shape[1], dtype=bool)
  group = q.shape[1] // k.shape[1]
  width = _padded_head_dim(q.shape[3])
  parts = tpu_backward.parts(group, kinds.shape[1], block, width, q.dtype.itemsize)
  by_keys = jnp.where(own & causal[..., None], blocks.HIDDEN, kinds).swapaxes(1, 2)
  return Plan(
    intervals=jnp.stack([start, end], axis=1),
    keys=jnp.where(key_ok, index, _SEEN_BY_NONE)[:, None],
    forward=tpu_forward.Todo(
      causal.astype(jnp.int32), blocks.visits(jnp.where(own, blocks.HIDDEN, kinds))
    ),
    backward=tpu_backward.Todo(
      blocks.cut(own & causal[..., None], parts).any(-1).astype(jnp.int32),
      blocks.visits(blocks.cut(by_keys, parts)),
    ),
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visibility: Visibility | Plan,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Softmax attention of every query over the keys it sees; differentiable in q, k and v.

  Args:
    q: [B, N, L, H], cells in attention order; N a multiple of K.
    k: [B, K, L, H].
    v: [B, K, L, H].
    visibility: who sees whom, or what `plan` made of it, once for all layers. No query may see a
      key more than 128 places after its own.
    interpret: run on the CPU, for tests.

  Returns:
    [B, N, L, H] in the dtype of q; scores and sums are float32. What the backward pass takes from
    the forward pass is named "attention" for remat policies.

  Raises:
    ValueError: with the sentence of `refusal`.
  """
  reason = refusal(q, k, v)
  if reason:
    raise ValueError(reason)
  todo = visibility if isinstance(visibility, Plan) else plan(q, k, visibility)
  # In float32, for bfloat16 would round the factor too, and so heat or cool all scores alike.
  q = (q.astype(jnp.float32) * q_factor(q.shape[3])).astype(q.dtype)
  return attend_scaled(q, k, v, todo, interpret=interpret)


def q_factor(head_dim: int) -> float:
  """Returns the factor that `attend_scaled` expects in queries: base 2 saves a product a score."""
  return math.log2(math.e) / math.sqrt(head_dim)


def attend_scaled(
  q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, *, interpret: bool = False
) -> jax.Array:
  """As `attention`, of queries that are multiplied by `q_factor` already."""
  B, N, L, H = q.shape
  K, P = k.shape[1], plan.keys.shape[2]
  width = _padded_head_dim(H)
  fill = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, P - L), (0, width - H)])
  out = _attention(interpret, fill(q).reshape(B, K, N // K, P, width), fill(k), fill(v), plan)
  return out.reshape(B, N, P, width)[:, :, :L, :H]


def _padded_head_dim(head_dim):
  return next(width for width in HEAD_DIMS if width >= head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret, q, k, v, plan):
  return _forward(interpret, q, k, v, plan)[0]


def _forward(interpret, q, k, v, plan):
  block = q.shape[3] // plan.forward.causal.shape[1]
  keys = Keys(k, v, plan.keys)
  return tpu_forward.forward(block, q, plan.intervals, keys, plan.forward, interpret=interpret)


def _forward_saving(interpret, q, k, v, plan):
  out, log_sum = checkpoint_name(_forward(interpret, q, k, v, plan), "attention")
  return out, (q, k, v, plan, out, log_sum)


def _backward(interpret, saved, d_out):
  q, k, v, plan, out, log_sum = saved
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)[:, :, :, None]
  block = q.shape[3] // plan.forward.causal.shape[1]
  queries = Queries(q, d_out, log_sum, delta, plan.intervals)
  gradients = tpu_backward.backward(
    block, queries, Keys(k, v, plan.keys), plan.backward, interpret=interpret
  )
  return *gradients, None


_attention.defvjp(_forward_saving, _backward)
