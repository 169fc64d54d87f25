"""The forward pass of stream-block attention on TPU, as two Pallas kernels with one inner step.

Blocks of queries of the heads that share a key/value head are stacked into tall matrices, which
meet the key blocks they see one after another in a running softmax (Milakov and Gimelshein 2018,
arXiv 1805.02867; Dao 2022, arXiv 2205.14135; here in base 2). First comes the block of the queries'
own keys: it finds empty sums, so that nothing is set to zero and nothing rescaled, and of the keys
after a query no more than 128 are looked at. Then come blocks that need a mask, then those that
need none.

Where the keys and values of a head fit into VMEM they stay there and the walk is a loop. Where they
do not, each visit is a step of the grid, and its keys are fetched while the last one is computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msjax.kernels.blocks import Visits
from msjax.kernels.lanes import (
  COLUMNS_COLUMNS,
  COLUMNS_ROWS,
  LANES,
  NEVER,
  VMEM_LIMIT,
  as_column,
  product,
)

RESIDENT = 32 * 2**20  # bytes of keys and values that may stay in VMEM
TALL = 1024  # rows of one matrix of stacked queries


class Keys(NamedTuple):
  """What belongs to keys.

  Attributes:
    k: [B, K, L, H].
    v: [B, K, L, H].
    index: int32 [B, 1, L], or one beyond every interval for a key that only its own query sees.
  """

  k: jax.Array
  v: jax.Array
  index: jax.Array


class Todo(NamedTuple):
  """What blocks of queries do.

  Attributes:
    causal: int32 [B, n], 1 where among its own block's keys no query sees those of a later part of
      128 queries.
    visits: all but those of their own keys.
  """

  causal: jax.Array
  visits: Visits


class _Scratch(NamedTuple):
  """What is kept in VMEM between visits, for s stacks of m queries.

  Attributes:
    top: float32 [s, m, 128], the greatest score so far, the same in every lane.
    total: float32 [s, m, 128], per lane the sum of what its keys weigh.
    out: float32 [s, m, H], the weighted sum of values.
    start: int32 [block, 128], the first key a query sees, the same in every lane.
    end: int32 [block, 128], one past the last.
  """

  top: jax.Array
  total: jax.Array
  out: jax.Array
  start: jax.Array
  end: jax.Array

  @classmethod
  def shapes(cls, group: int, block: int, head_dim: int) -> "_Scratch":
    """What to allocate for a group of query heads."""
    heads = stacked_heads(group, block)
    stacks = lambda lanes: pltpu.VMEM((group // heads, heads * block, lanes), jnp.float32)
    column = pltpu.VMEM((block, LANES), jnp.int32)
    return cls(stacks(LANES), stacks(LANES), stacks(head_dim), column, column)


def stacked_heads(group: int, block: int) -> int:
  """Returns how many heads of a group go into one tall matrix: with more it is no faster."""
  return next(n for n in range(group, 0, -1) if group % n == 0 and n * block <= max(TALL, block))


def forward(
  block: int,
  q: jax.Array,
  intervals: jax.Array,
  keys: Keys,
  todo: Todo,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attends, and returns what the backward pass needs.

  Args:
    block: of queries as of keys, a multiple of 128; divides L.
    q: [B, K, G, L, H], multiplied by log2(e) / sqrt(H).
    intervals: int32 [B, 2, L], first key and one past the last that each query sees; none sees a
      key of its own block more than 128 places after its own.
    keys: query i's own is key i.
    todo: what blocks of queries do.
    interpret: run on the CPU, for tests.

  Returns:
    out [B, K, G, L, H] in q's dtype; float32 [B, K, G, 1, L], log2 of the softmax's sum.
  """
  L, H = keys.k.shape[2:]
  needed = 2 * 2 * L * max(LANES, H) * keys.k.dtype.itemsize  # k and v, and those of the next head
  run = _resident if needed <= RESIDENT else _streamed
  return run(block, q, intervals, keys, todo, interpret)


def _resident(block, q, intervals, keys, todo, interpret):
  """Keys and values stay in VMEM; a step of the grid is a block of queries."""
  B, K, G, L, H = q.shape
  of_queries = pl.BlockSpec((None, None, G, block, H), lambda b, h, i, *_: (b, h, 0, i, 0))
  of_head = pl.BlockSpec((None, None, L, H), lambda b, h, i, *_: (b, h, 0, 0))
  index = pl.BlockSpec((None, 1, L), lambda b, h, i, *_: (b, 0, 0))
  return pl.pallas_call(
    functools.partial(_resident_kernel, block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(B, K, L // block),
      in_specs=[
        of_queries,
        pl.BlockSpec((None, 2, block), lambda b, h, i, *_: (b, 0, i)),
        Keys(of_head, of_head, index),
      ],
      out_specs=[
        of_queries,
        pl.BlockSpec((None, None, G, 1, block), lambda b, h, i, *_: (b, h, 0, 0, i)),
      ],
      scratch_shapes=_Scratch.shapes(G, block, H),
    ),
    out_shape=_out_shapes(q),
    compiler_params=_params("parallel", "parallel", "arbitrary"),
    cost_estimate=_cost(q, keys_read=B * K * L),
    name="stream_forward",
    interpret=interpret,
  )(*(x.reshape(-1) for x in (todo.causal, *todo.visits)), q, intervals, keys)


def _resident_kernel(
  block, causal, index, partial, whole, q, intervals, keys, out, log_sum, *scratch
):
  """One block of queries against all it sees.

  Args:
    block: static.
    causal: of `Todo`, flat, in scalar memory, like the next three, which are of its `Visits`.
    q: [G, block, H], like out.
    intervals: int32 [2, block].
    keys: k [L, H] and the like.
    log_sum: float32 [G, 1, block].
    scratch: see `_Scratch`.
  """
  scratch = _Scratch(*scratch)
  i, n = pl.program_id(2), pl.num_programs(2)
  row = pl.program_id(0) * n + i
  stacks = scratch.out.shape[0]

  def visit(t, _, masked):
    at = _block(index[row * n + lax.div(t, stacks)], block)
    index_of_keys = keys.index[:, at] if masked else None
    _visit(scratch, lax.rem(t, stacks), q, keys.k[at], keys.v[at], index_of_keys)

  at = _block(i, block)
  _first_visits(scratch, causal[row], q, intervals, Keys(keys.k[at], keys.v[at], keys.index[:, at]))
  n_partial, n_whole = partial[row] * stacks, whole[row] * stacks
  lax.fori_loop(0, n_partial, functools.partial(visit, masked=True), None)
  lax.fori_loop(n_partial, n_partial + n_whole, functools.partial(visit, masked=False), None)
  _finish(scratch, out, log_sum)


_OWN, _PARTIAL, _WHOLE, _LAST = 1, 2, 4, 8  # what happens in a step of the streamed grid


def _streamed(block, q, intervals, keys, todo, interpret):
  """A step of the grid is one visit; its keys are fetched during the one before."""
  B, K, G, L, H = q.shape
  n = L // block
  b, i = lambda row, t: lax.div(row[t], n), lambda row, t: lax.rem(row[t], n)
  of_queries = pl.BlockSpec(
    (None, None, G, block, H), lambda h, t, row, *_: (b(row, t), h, 0, i(row, t), 0)
  )
  of_keys = pl.BlockSpec((None, None, block, H), lambda h, t, row, j, *_: (b(row, t), h, j[t], 0))
  index = pl.BlockSpec((None, 1, block), lambda h, t, row, j, *_: (b(row, t), 0, j[t]))
  steps, count = _steps(todo.visits)
  return pl.pallas_call(
    _streamed_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(K, count),
      in_specs=[
        of_queries,
        pl.BlockSpec((None, 2, block), lambda h, t, row, *_: (b(row, t), 0, i(row, t))),
        Keys(of_keys, of_keys, index),
      ],
      out_specs=[
        of_queries,
        pl.BlockSpec(
          (None, None, G, 1, block), lambda h, t, row, *_: (b(row, t), h, 0, 0, i(row, t))
        ),
      ],
      scratch_shapes=_Scratch.shapes(G, block, H),
    ),
    out_shape=_out_shapes(q),
    compiler_params=_params("parallel", "arbitrary"),
    cost_estimate=_cost(q, keys_read=B * K * n * L // 2),
    name="stream_forward_streamed",
    interpret=interpret,
  )(*steps, todo.causal.reshape(-1), q, intervals, keys)


def _streamed_kernel(row, j, kind, causal, q, intervals, keys, out, log_sum, *scratch):
  """One visit.

  Args:
    row: of `_steps`, in scalar memory, like the next two.
    causal: as for `_resident_kernel`, like all that follow but `keys`.
    keys: k [block, H] and the like.
  """
  del j
  scratch = _Scratch(*scratch)
  t = pl.program_id(1)

  def visit(masked):
    index_of_keys = keys.index[...] if masked else None
    one = lambda s, _: _visit(scratch, s, q, keys.k[...], keys.v[...], index_of_keys)
    lax.fori_loop(0, scratch.out.shape[0], one, None)

  @pl.when(kind[t] & _OWN != 0)
  def _():
    here = Keys(keys.k[...], keys.v[...], keys.index[...])
    _first_visits(scratch, causal[row[t]], q, intervals, here)

  pl.when(kind[t] & _PARTIAL != 0)(lambda: visit(masked=True))
  pl.when(kind[t] & _WHOLE != 0)(lambda: visit(masked=False))

  @pl.when(kind[t] & _LAST != 0)
  def _():
    _finish(scratch, out, log_sum)


def _steps(visits: Visits):
  """Lists the visits of all query blocks one after another, to each block's own keys first.

  Returns:
    Three int32 arrays with one item a step: the query block (b * n + i), the key block, and what
    happens there; and the number of steps.
  """
  B, n, _ = visits.index.shape
  partial, whole = visits.partial.reshape(-1), visits.whole.reshape(-1)
  length = 1 + partial + whole
  stop = jnp.cumsum(length)
  step = jnp.arange(B * n * n)
  row = jnp.minimum(jnp.searchsorted(stop, step, side="right"), B * n - 1)
  t = step - (stop - length)[row] - 1  # -1: the own block
  listed = visits.index.reshape(B * n, n)[row, jnp.clip(t, 0, n - 1)]
  block = jnp.where(t < 0, row % n, listed)
  kind = jnp.where(t < 0, _OWN, jnp.where(t < partial[row], _PARTIAL, _WHOLE))
  kind |= jnp.where(t == length[row] - 2, _LAST, 0)
  return tuple(x.astype(jnp.int32) for x in (row, block, kind)), stop[-1]


def _block(j, size):
  return pl.ds(pl.multiple_of(j * size, size), size)


def _penalty(start, end, index, own=None):
  """Returns float32 [m, n]: 0 where a query sees a key, NEVER elsewhere.

  Added to the scores of each stacked head: cheaper than a mask, which is costly to keep.

  Args:
    start: int32 [m, 128], the first key that a query sees, the same in every lane.
    end: int32 [m, 128], one past the last.
    index: int32 [1, n], of the keys, as in `Keys`.
    own: which of the keys is query 0's own; None where no own key is among them.
  """
  wide = lambda column: jnp.tile(column, (1, index.shape[1] // LANES))
  seen = (index >= wide(start)) & (index < wide(end))
  if own is not None:
    query = wide(own + lax.broadcasted_iota(jnp.int32, end.shape, 0))
    seen |= query == lax.broadcasted_iota(jnp.int32, index.shape, 1)
  return jnp.where(seen, 0.0, NEVER)


def _scores(q, k, penalty):
  """Returns float32 [m, n]."""
  s = product(q, k, COLUMNS_COLUMNS)
  if penalty is None:
    return s
  return (s.reshape(-1, *penalty.shape) + penalty).reshape(s.shape)


def _weighed(p, v):
  """Returns the weighted sum of values [m, H], and per lane the sum of weights [m, 128]."""
  out = product(p.astype(v.dtype), v, COLUMNS_ROWS)
  return out, sum(p[:, at : at + LANES] for at in range(0, p.shape[1], LANES))


def _first_visits(scratch, causal, q, intervals, keys):
  """Starts the sums of a block of queries with its own keys [block, H]."""

  def of_stacks(beyond):
    scratch.start[...] = as_column(intervals[:1])
    scratch.end[...] = as_column(intervals[1:])
    one = lambda s, _: _first_visit(scratch, s, q, keys, beyond)
    lax.fori_loop(0, scratch.out.shape[0], one, None)

  pl.when(causal == 1)(lambda: of_stacks(beyond=0))
  pl.when(causal == 0)(lambda: of_stacks(beyond=LANES))


def _first_visit(scratch, s, q, keys, beyond):
  """Visits own keys: 128 queries of each head at a time, and keys up to `beyond` after theirs."""
  block = scratch.end.shape[0]
  by_head = _stack(q, scratch, s).reshape(-1, block, q.shape[2])
  parts = [slice(at, at + LANES) for at in range(0, block, LANES)]
  scores = []
  for part in parts:
    n = min(part.stop + beyond, block)
    penalty = _penalty(scratch.start[part], scratch.end[part], keys.index[:, :n], own=part.start)
    scores.append(_scores(by_head[:, part].reshape(-1, q.shape[2]), keys.k[:n], penalty))
  # One step of all parts after another, not one part after another: none waits for the last.
  tops = [jnp.max(x, axis=-1, keepdims=True) for x in scores]
  weights = [jnp.exp2(x - top) for x, top in zip(scores, tops)]
  outs = [_weighed(p, keys.v[: p.shape[1]]) for p in weights]
  for part, top, (out, total) in zip(parts, tops, outs):
    for head in range(by_head.shape[0]):
      at = slice(head * block + part.start, head * block + part.stop)
      rows = slice(head * LANES, (head + 1) * LANES)
      scratch.top[s, at] = jnp.broadcast_to(top[rows], (LANES, LANES))
      scratch.total[s, at] = total[rows]
      scratch.out[s, at] = out[rows]


def _stack(q, scratch, s):
  """Stack s of the queries of all heads [G, block, H]: [m, H]."""
  return q.reshape(*scratch.out.shape[:2], q.shape[2])[s]


def _visit(scratch, s, q, k, v, index):
  """Adds keys [n, H] to the sums of stack s; `index` of those that not all queries see."""
  penalty = None
  if index is not None:
    penalty = _penalty(scratch.start[...], scratch.end[...], index)
  x = _scores(_stack(q, scratch, s), k, penalty)
  old_top = scratch.top[s]
  top = jnp.maximum(old_top, jnp.max(x, axis=-1, keepdims=True))
  shrink = jnp.exp2(old_top - top)
  out, total = _weighed(jnp.exp2(x - jnp.tile(top, (1, x.shape[1] // LANES))), v)
  scratch.top[s] = top
  scratch.total[s] = shrink * scratch.total[s] + total
  scratch.out[s] = _as_wide(shrink, out) * scratch.out[s] + out


def _as_wide(x, like):
  """[m, 128], the same in all lanes -> [m, H]."""
  H = like.shape[1]
  return jnp.tile(x, (1, -(-H // LANES)))[:, :H]


def _finish(scratch, out, log_sum):
  """Writes out [G, block, H] and log_sum [G, 1, block]."""
  stacks, m, _ = scratch.out.shape
  block = out.shape[1]
  heads = m // block

  def finish(s, _):
    total = jnp.sum(scratch.total[s], axis=-1, keepdims=True)
    normed = (scratch.out[s] * (1.0 / total)).astype(out.dtype)
    of_rows = lambda x: _as_rows(jnp.broadcast_to(x, (m, LANES)))
    log_total = jnp.log2(of_rows(total)) + of_rows(scratch.top[s])
    for head in range(heads):
      out[s * heads + head] = normed[head * block : (head + 1) * block]
      for at in range(0, block, LANES):
        row = (head * block + at) // LANES
        log_sum[s * heads + head, :, at : at + LANES] = log_total[row : row + 1]

  lax.fori_loop(0, stacks, finish, None)


def _as_rows(x):
  """[m, 128], the same in all lanes -> [m / 128, 128], along lanes: the diagonals of squares."""
  row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
  return jnp.sum(jnp.where(row == lane, x.reshape(-1, LANES, LANES), 0.0), axis=1)


def _out_shapes(q):
  B, K, G, L, _ = q.shape
  return [
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    jax.ShapeDtypeStruct((B, K, G, 1, L), jnp.float32),
  ]


def _params(*semantics):
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _cost(q, keys_read):
  """What XLA is told: half of all pairs, as in a dense grid, and so many keys with their values."""
  B, K, G, L, H = q.shape
  pairs = B * K * G * L * L // 2
  moved = 2 * (B * K * G * L + keys_read) * H * q.dtype.itemsize + 4 * B * K * G * L
  return pl.CostEstimate(flops=4 * pairs * H, bytes_accessed=moved, transcendentals=pairs)
