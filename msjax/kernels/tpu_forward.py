"""The forward pass of stream-block attention on TPU, as two Pallas kernels with one inner step.

One block of queries of all query heads that share a key/value head is stacked into one tall matrix,
which meets the key blocks it sees one after another in a running softmax (Milakov and Gimelshein
2018, arXiv 1805.02867; Dao 2022, arXiv 2205.14135; here in base 2). First comes the block with the
queries' own keys: it finds empty sums, so that nothing is set to zero and nothing rescaled. Then
come blocks that need a mask, then those that need none.

Where the keys and values of a head fit into VMEM they stay there and the walk is a loop. Where they
do not, each visit is a step of the grid, and its keys are fetched while the last one is computed.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msjax.kernels.blocks import Visits

LANES = 128
NEVER = -1e30  # a finite stand-in for -inf: what meets it is rescaled by 2 ** NEVER = 0, never NaN
VMEM_LIMIT = 56 * 2**20  # bytes; a core has 128 MiB on v5e and v6e, 64 MiB on v5p
RESIDENT = 32 * 2**20  # bytes of keys and values that may stay in VMEM

_OVER_HEAD_DIM = (((1,), (1,)), ((), ()))  # [m, H] x [n, H] -> [m, n]
_OVER_KEYS = (((1,), (0,)), ((), ()))  # [m, n] x [n, H] -> [m, H]


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes of blocks: `queries` divides `keys`, and both are multiples of 128."""

  queries: int
  keys: int

  def own_block(self, i: jax.Array) -> jax.Array:
    """Returns the block of keys that holds the keys of query block i itself."""
    return lax.div(i, self.keys // self.queries)

  def own_shift(self, i: jax.Array) -> jax.Array:
    """Returns where in that block they start."""
    return lax.rem(i, self.keys // self.queries) * self.queries


class _Scratch(NamedTuple):
  """What is kept in VMEM between visits, for the m stacked queries of a block.

  Attributes:
    top: float32 [m, 128], the greatest score so far, the same in every lane.
    total: float32 [m, 128], per lane the sum of what its keys weigh.
    out: float32 [m, H], the weighted sum of values.
    start: int32 [queries, 128], the first key a query sees, the same in every lane.
    end: int32 [queries, 128], one past the last.
  """

  top: jax.Array
  total: jax.Array
  out: jax.Array
  start: jax.Array
  end: jax.Array

  @classmethod
  def shapes(cls, tile: Tile, group: int, head_dim: int) -> "_Scratch":
    """What to allocate for a group of query heads."""
    m = group * tile.queries
    lanes, column = (
      pltpu.VMEM((rows, LANES), kind)
      for rows, kind in ((m, jnp.float32), (tile.queries, jnp.int32))
    )
    return cls(lanes, lanes, pltpu.VMEM((m, head_dim), jnp.float32), column, column)


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


def forward(
  tile: Tile,
  q: jax.Array,
  intervals: jax.Array,
  keys: Keys,
  visits: Visits,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attends, and returns what the backward pass needs.

  Args:
    tile: whose blocks divide L.
    q: [B, K, G, L, H], multiplied by log2(e) / sqrt(H).
    intervals: int32 [B, 2, L], first key and one past the last key that each query sees.
    keys: query i's own is key i.
    visits: of the query blocks, their own key blocks not among them.
    interpret: run on the CPU, for tests.

  Returns:
    out [B, K, G, L, H] in q's dtype; float32 [B, K, G, 1, L], log2 of the softmax's sum.
  """
  L, H = keys.k.shape[2:]
  needed = 2 * 2 * L * max(LANES, H) * keys.k.dtype.itemsize  # k and v, and those of the next head
  run = _resident if needed <= RESIDENT else _streamed
  return run(tile, q, intervals, keys, visits, interpret)


def _resident(tile, q, intervals, keys, visits, interpret):
  """Keys and values stay in VMEM; a step of the grid is a block of queries."""
  B, K, G, L, H = q.shape
  of_queries = pl.BlockSpec((None, None, G, tile.queries, H), lambda b, h, i, *_: (b, h, 0, i, 0))
  of_head = pl.BlockSpec((None, None, L, H), lambda b, h, i, *_: (b, h, 0, 0))
  index = pl.BlockSpec((None, 1, L), lambda b, h, i, *_: (b, 0, 0))
  return pl.pallas_call(
    functools.partial(_resident_kernel, tile),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B, K, L // tile.queries),
      in_specs=[
        of_queries,
        pl.BlockSpec((None, 2, tile.queries), lambda b, h, i, *_: (b, 0, i)),
        Keys(of_head, of_head, index),
      ],
      out_specs=[
        of_queries,
        pl.BlockSpec((None, None, G, 1, tile.queries), lambda b, h, i, *_: (b, h, 0, 0, i)),
      ],
      scratch_shapes=_Scratch.shapes(tile, G, H),
    ),
    out_shape=_out_shapes(q),
    compiler_params=_params("parallel", "parallel", "arbitrary"),
    cost_estimate=_cost(q, keys_read=B * K * L),
    name="stream_forward",
    interpret=interpret,
  )(*(x.reshape(-1) for x in visits), q, intervals, keys)


def _resident_kernel(tile, index, partial, whole, q, intervals, keys, out, log_sum, *scratch):
  """One block of queries against all it sees.

  Args:
    tile: static.
    index: of `Visits`, flat, in scalar memory, like the next two.
    q: [G, queries, H], like out.
    intervals: int32 [2, queries].
    keys: k [L, H] and the like.
    log_sum: float32 [G, 1, queries].
    scratch: see `_Scratch`.
  """
  scratch = _Scratch(*scratch)
  b, i, n = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
  m = keys.k.shape[0] // tile.keys
  queries = q.reshape(-1, q.shape[2])

  def visit(t, _, masked):
    at = _block(index[(b * n + i) * m + t], tile.keys)
    penalty = _penalty(scratch, keys.index[:, at]) if masked else None
    _visit(scratch, queries[...], keys.k[at], keys.v[at], penalty)

  at = _block(tile.own_block(i), tile.keys)
  _set_columns(scratch, intervals[...])
  penalty = _penalty(scratch, keys.index[:, at], tile.own_shift(i))
  _first_visit(scratch, queries[...], keys.k[at], keys.v[at], penalty)
  n_partial, n_whole = partial[b * n + i], whole[b * n + i]
  lax.fori_loop(0, n_partial, functools.partial(visit, masked=True), None)
  lax.fori_loop(n_partial, n_partial + n_whole, functools.partial(visit, masked=False), None)
  _finish(scratch, out, log_sum)


_OWN, _PARTIAL, _WHOLE, _LAST = 1, 2, 4, 8  # what happens in a step of the streamed grid


def _streamed(tile, q, intervals, keys, visits, interpret):
  """A step of the grid is one visit; its keys are fetched during the one before."""
  B, K, G, L, H = q.shape
  n = L // tile.queries
  b, i = lambda row, t: lax.div(row[t], n), lambda row, t: lax.rem(row[t], n)
  of_queries = pl.BlockSpec(
    (None, None, G, tile.queries, H), lambda h, t, row, *_: (b(row, t), h, 0, i(row, t), 0)
  )
  of_keys = pl.BlockSpec(
    (None, None, tile.keys, H), lambda h, t, row, block, _: (b(row, t), h, block[t], 0)
  )
  index = pl.BlockSpec((None, 1, tile.keys), lambda h, t, row, block, _: (b(row, t), 0, block[t]))
  steps, count = _steps(tile, visits)
  return pl.pallas_call(
    functools.partial(_streamed_kernel, tile, n),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(K, count),
      in_specs=[
        of_queries,
        pl.BlockSpec((None, 2, tile.queries), lambda h, t, row, *_: (b(row, t), 0, i(row, t))),
        Keys(of_keys, of_keys, index),
      ],
      out_specs=[
        of_queries,
        pl.BlockSpec(
          (None, None, G, 1, tile.queries), lambda h, t, row, *_: (b(row, t), h, 0, 0, i(row, t))
        ),
      ],
      scratch_shapes=_Scratch.shapes(tile, G, H),
    ),
    out_shape=_out_shapes(q),
    compiler_params=_params("parallel", "arbitrary"),
    cost_estimate=_cost(q, keys_read=B * K * n * L // 2),
    name="stream_forward_streamed",
    interpret=interpret,
  )(*steps, q, intervals, keys)


def _streamed_kernel(tile, n, row, block, kind, q, intervals, keys, out, log_sum, *scratch):
  """One visit.

  Args:
    tile: static, like n, blocks of queries a sequence.
    row: of `_steps`, in scalar memory, like the next two.
    q: as for `_resident_kernel`, like all that follow but `keys`.
    keys: k [tile.keys, H] and the like.
  """
  del block
  scratch = _Scratch(*scratch)
  t = pl.program_id(1)
  queries = q.reshape(-1, q.shape[2])

  @pl.when(kind[t] & _OWN != 0)
  def _():
    _set_columns(scratch, intervals[...])
    penalty = _penalty(scratch, keys.index[...], tile.own_shift(lax.rem(row[t], n)))
    _first_visit(scratch, queries[...], keys.k[...], keys.v[...], penalty)

  @pl.when(kind[t] & _PARTIAL != 0)
  def _():
    penalty = _penalty(scratch, keys.index[...])
    _visit(scratch, queries[...], keys.k[...], keys.v[...], penalty)

  @pl.when(kind[t] & _WHOLE != 0)
  def _():
    _visit(scratch, queries[...], keys.k[...], keys.v[...], None)

  @pl.when(kind[t] & _LAST != 0)
  def _():
    _finish(scratch, out, log_sum)


def _steps(tile: Tile, visits: Visits):
  """Lists the visits of all query blocks one after another, to each block's own keys first.

  Returns:
    Three int32 arrays with one item a step: the query block (b * n + i), the key block, and what
    happens there; and the number of steps.
  """
  B, n, m = visits.index.shape
  partial, whole = visits.partial.reshape(-1), visits.whole.reshape(-1)
  length = 1 + partial + whole
  stop = jnp.cumsum(length)
  step = jnp.arange(B * n * m)
  row = jnp.minimum(jnp.searchsorted(stop, step, side="right"), B * n - 1)
  t = step - (stop - length)[row] - 1  # -1: the own block
  listed = visits.index.reshape(B * n, m)[row, jnp.clip(t, 0, m - 1)]
  block = jnp.where(t < 0, tile.own_block(row % n), listed)
  kind = jnp.where(t < 0, _OWN, jnp.where(t < partial[row], _PARTIAL, _WHOLE))
  kind |= jnp.where(t == length[row] - 2, _LAST, 0)
  return tuple(x.astype(jnp.int32) for x in (row, block, kind)), stop[-1]


def _block(j, size):
  return pl.ds(pl.multiple_of(j * size, size), size)


def as_column(row: jax.Array) -> jax.Array:
  """[1, n], 32 bits -> [n, 128], the same in all lanes."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _set_columns(scratch, intervals):
  """Turns the rows [2, queries] of first and last keys into columns."""
  scratch.start[...] = as_column(intervals[:1])
  scratch.end[...] = as_column(intervals[1:])


def _penalty(scratch, keys, shift=None):
  """Returns float32 [queries, n]: 0 where a query sees a key, NEVER elsewhere.

  Added to the scores of each stacked head: cheaper than a mask, which is costly to keep.

  Args:
    scratch: with columns set.
    keys: int32 [1, n], their indices as in `Keys`.
    shift: where query 0's own key stands among the keys; None where no own key is among them.
  """
  wide = lambda column: jnp.tile(column, (1, keys.shape[1] // LANES))
  seen = (keys >= wide(scratch.start[...])) & (keys < wide(scratch.end[...]))
  if shift is not None:
    query = wide(shift + lax.broadcasted_iota(jnp.int32, scratch.end.shape, 0))
    seen |= query == lax.broadcasted_iota(jnp.int32, keys.shape, 1)
  return jnp.where(seen, 0.0, NEVER)


def _scores(q, k, penalty):
  """Returns float32 [m, n]."""
  s = lax.dot_general(q, k, _OVER_HEAD_DIM, precision=exact(q), preferred_element_type=jnp.float32)
  if penalty is None:
    return s
  return (s.reshape(-1, *penalty.shape) + penalty).reshape(s.shape)


def _weighed(p, v):
  """Returns the weighted sum of values [m, H], and per lane the sum of weights [m, 128]."""
  out = lax.dot_general(
    p.astype(v.dtype), v, _OVER_KEYS, precision=exact(v), preferred_element_type=jnp.float32
  )
  return out, sum(p[:, at : at + LANES] for at in range(0, p.shape[1], LANES))


def exact(x: jax.Array) -> lax.Precision | None:
  """Returns how to multiply: float32 in float32, where the default is one pass in bfloat16."""
  return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _first_visit(scratch, q, k, v, penalty):
  s = _scores(q, k, penalty)
  top = jnp.max(s, axis=-1, keepdims=True)
  scratch.out[...], scratch.total[...] = _weighed(jnp.exp2(s - top), v)
  scratch.top[...] = jnp.broadcast_to(top, scratch.top.shape)


def _visit(scratch, q, k, v, penalty):
  s = _scores(q, k, penalty)
  old_top = scratch.top[...]
  top = jnp.maximum(old_top, jnp.max(s, axis=-1, keepdims=True))
  shrink = jnp.exp2(old_top - top)
  out, total = _weighed(jnp.exp2(s - jnp.tile(top, (1, s.shape[1] // LANES))), v)
  scratch.top[...] = top
  scratch.total[...] = shrink * scratch.total[...] + total
  scratch.out[...] = _as_wide(shrink, out) * scratch.out[...] + out


def _as_wide(x, like):
  """[m, 128], the same in all lanes -> [m, H]."""
  H = like.shape[1]
  return jnp.tile(x, (1, -(-H // LANES)))[:, :H]


def _finish(scratch, out_ref, log_sum_ref):
  G, queries = out_ref.shape[:2]
  total = jnp.sum(scratch.total[...], axis=-1, keepdims=True)
  out_ref[...] = (scratch.out[...] * (1.0 / total)).astype(out_ref.dtype).reshape(out_ref.shape)
  top = _as_rows(scratch.top[...])
  total = _as_rows(jnp.broadcast_to(total, scratch.total.shape))
  log_sum = top + jnp.log2(total)
  for g in range(G):
    for c in range(queries // LANES):
      row = g * (queries // LANES) + c
      log_sum_ref[g, :, c * LANES : (c + 1) * LANES] = log_sum[row : row + 1]


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
