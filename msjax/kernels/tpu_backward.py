"""The backward pass of stream-block attention on TPU: one Pallas kernel for all three gradients.

A step of the grid takes one block of keys and walks over the query blocks that see it, one head of
the group after another. The gradients of keys and values gather in VMEM during the walk, those of
all queries from step to step: five products a block, and no partial sums in HBM. Scores stand
transposed, keys down and queries across, so that what belongs to a query is a row.

Queries that do not fit into VMEM are cut into parts, which are taken one after another.
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
  ROWS_ROWS,
  VMEM_LIMIT,
  as_column,
  product,
)
from msjax.kernels.tpu_forward import Keys

RESIDENT = 40 * 2**20  # bytes of queries, their cotangents and gradients that may stay in VMEM

_LN2 = 0.6931471805599453


class Queries(NamedTuple):
  """What belongs to queries.

  Attributes:
    q: [B, K, G, L, H], multiplied by log2(e) / sqrt(H).
    d_out: [B, K, G, L, H], the cotangent of what the forward pass gave.
    log_sum: float32 [B, K, G, 1, L], log2 of the softmax's sum.
    delta: float32 [B, K, G, 1, L], sum over H of the output times d_out.
    intervals: int32 [B, 2, L], first key and one past the last that each sees.
  """

  q: jax.Array
  d_out: jax.Array
  log_sum: jax.Array
  delta: jax.Array
  intervals: jax.Array


class Todo(NamedTuple):
  """What blocks of keys do, for each of p parts of the queries.

  Attributes:
    causal: int32 [p, B, n], 1 where the block's own queries are in the part and none of them sees
      keys of a later part of 128.
    visits: of query blocks; where not causal, its own is among those that need a mask.
  """

  causal: jax.Array
  visits: Visits


def backward(
  block: int, queries: Queries, keys: Keys, todo: Todo, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of q, of k and of v, shaped like them.

  Args:
    block: of queries as of keys; divides L.
    queries: what belongs to them.
    keys: query i's own is key i.
    todo: what blocks of keys do for each of the parts that queries are cut into.
    interpret: run on the CPU, for tests.
  """
  L = queries.q.shape[3]
  parts, _, _, in_part = todo.visits.index.shape
  missing = parts * in_part * block - L
  fill = lambda x, axis: jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
  queries = Queries(*map(fill, queries, (3, 3, 4, 4, 2)))
  run = functools.partial(_part, block, queries, keys, interpret=interpret)
  if parts == 1:
    return run(jnp.int32(0), jax.tree.map(lambda x: x[0], todo), keys.k.dtype)

  def add_part(total, part):
    dq, *of_keys = run(*part, jnp.float32)
    return jax.tree.map(jnp.add, total, of_keys), dq

  zeros = [jnp.zeros(keys.k.shape, jnp.float32)] * 2
  (dk, dv), dq = lax.scan(add_part, zeros, (jnp.arange(parts), todo))
  dq = jnp.concatenate(list(dq), axis=3)[:, :, :, :L]
  return dq, dk.astype(keys.k.dtype), dv.astype(keys.v.dtype)


def parts(group: int, blocks: int, block: int, head_dim: int, itemsize: int) -> int:
  """Returns into how many parts to cut the queries so that those of a key/value head fit into VMEM.

  Args:
    group: G, query heads a key/value head.
    blocks: of queries.
    block: queries in each.
    head_dim: H.
    itemsize: bytes of a number of q.
  """
  # q and d_out fetched ahead and dq written behind take two places each, its sum in float32 one.
  bytes_a_query = group * max(head_dim, LANES) * (6 * itemsize + 4)
  return -(-blocks // max(1, RESIDENT // (block * bytes_a_query)))


def _part(block, queries, keys, part, todo, sum_dtype, *, interpret):
  """Gradients by the queries of one part; those of keys are yet to be summed over parts."""
  B, K, G, _, H = queries.q.shape
  L = keys.k.shape[2]
  n, m = todo.visits.index.shape[1:]
  rows = m * block
  of_part = pl.BlockSpec((None, None, G, rows, H), lambda b, h, j, c, *_: (b, h, 0, c[0], 0))
  row_of_part = pl.BlockSpec((None, None, G, 1, rows), lambda b, h, j, c, *_: (b, h, 0, 0, c[0]))
  of_keys = pl.BlockSpec((None, None, block, H), lambda b, h, j, *_: (b, h, j, 0))
  of_all = pl.BlockSpec((None, None, G, rows, H), lambda b, h, j, *_: (b, h, 0, 0, 0))
  intervals = pl.BlockSpec((None, 2, rows), lambda b, h, j, c, *_: (b, 0, c[0]))
  index = pl.BlockSpec((None, 1, block), lambda b, h, j, *_: (b, 0, j))
  return pl.pallas_call(
    functools.partial(_kernel, block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(B, K, n),
      in_specs=[
        Queries(of_part, of_part, row_of_part, row_of_part, intervals),
        Keys(of_keys, of_keys, index),
      ],
      out_specs=[of_all, of_keys, of_keys],
      scratch_shapes=[
        pltpu.VMEM((G, rows, H), jnp.float32),
        pltpu.VMEM((block, H), jnp.float32),
        pltpu.VMEM((block, H), jnp.float32),
        pltpu.VMEM((block, LANES), jnp.int32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((B, K, G, rows, H), queries.q.dtype),
      jax.ShapeDtypeStruct(keys.k.shape, sum_dtype),
      jax.ShapeDtypeStruct(keys.v.shape, sum_dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=_cost((B, K, G, rows, H), L, queries.q.dtype.itemsize),
    name="stream_backward",
    interpret=interpret,
  )(part.reshape(1), *(x.reshape(-1) for x in (todo.causal, *todo.visits)), queries, keys)


def _kernel(
  block,
  part,
  causal,
  index,
  partial,
  whole,
  queries,
  keys,
  dq,
  dk,
  dv,
  dq_sum,
  dk_sum,
  dv_sum,
  key_index,
):
  """One block of keys against all query blocks that see it.

  Args:
    block: static.
    part: int32 [1]; with the next four, which are flat, in scalar memory.
    causal: of `Todo`.
    index: of its `Visits`, like the next two.
    queries: q [G, rows of the part, H] and the like.
    keys: k [block, H] and the like.
    dq: [G, rows, H], written after the last block of keys.
    dk: [block, H], like dv.
    dq_sum: like dq in float32, kept from block to block.
    dk_sum: like dk in float32, as dv_sum.
    key_index: int32 [block, 128], the keys' indices, the same in every lane.
  """
  j, n = pl.program_id(2), pl.num_programs(2)
  row = pl.program_id(0) * n + j
  G, m = dq.shape[0], dq.shape[1] // block

  def visit(i, g, tiles, masked):
    """Takes (keys, queries), slices of this block and of query block i, head g, for each tile.

    All tiles go through one stage before the next, so that none waits for the one before. Keys and
    values are read again for every product: held, they would make for a longer schedule.
    """
    at = lambda rows: pl.ds(pl.multiple_of(i * block, block) + rows.start, rows.stop - rows.start)
    forward, backward = [], []
    for of_keys, rows in tiles:
      q, d_out = queries.q[g, at(rows)], queries.d_out[g, at(rows)]
      s = product(keys.k[of_keys], q, COLUMNS_COLUMNS) - queries.log_sum[g, :, at(rows)]
      if masked:
        own = (part[0] * m + i - j) * block + rows.start - of_keys.start
        s += _penalty(key_index[of_keys], queries.intervals[:, at(rows)], own)
      p = jnp.exp2(jnp.minimum(s, 0.0))  # none is above 1, however the sum was rounded
      forward.append((q, d_out, p))
    for (of_keys, rows), (q, d_out, p) in zip(tiles, forward):
      dv_sum[of_keys] += product(p.astype(d_out.dtype), d_out, COLUMNS_ROWS)
      d_p = product(keys.v[of_keys], d_out, COLUMNS_COLUMNS)
      backward.append((q, (p * (d_p - queries.delta[g, :, at(rows)])).astype(q.dtype)))
    for (of_keys, rows), (q, d_s) in zip(tiles, backward):
      dk_sum[of_keys] += product(d_s, q, COLUMNS_ROWS)
      dq_sum[g, at(rows)] += product(d_s, keys.k[of_keys], ROWS_ROWS)

  def visit_own(g, _):
    """128 keys at a time, with the queries that do not stand before them."""
    starts = range(0, block, LANES)
    tiles = [(slice(start, start + LANES), slice(start, block)) for start in starts]
    visit(j - part[0] * m, g, tiles, masked=True)

  def visit_listed(t, _, masked):
    i, g = index[row * m + lax.div(t, G)], lax.rem(t, G)
    visit(i, g, [(slice(0, block), slice(0, block))], masked)

  @pl.when(j == 0)
  def _():
    dq_sum[...] = jnp.zeros_like(dq_sum)

  dk_sum[...] = jnp.zeros_like(dk_sum)
  dv_sum[...] = jnp.zeros_like(dv_sum)
  key_index[...] = as_column(keys.index[...])
  n_own, n_partial, n_whole = causal[row] * G, partial[row] * G, whole[row] * G
  masked, unmasked = (functools.partial(visit_listed, masked=x) for x in (True, False))
  lax.fori_loop(0, n_own, visit_own, None)
  lax.fori_loop(0, n_partial, masked, None)
  lax.fori_loop(n_partial, n_partial + n_whole, unmasked, None)
  dk[...] = (dk_sum[...] * _LN2).astype(dk.dtype)
  dv[...] = dv_sum[...].astype(dv.dtype)

  @pl.when(j == n - 1)
  def _():
    dq[...] = (dq_sum[...] * _LN2).astype(dq.dtype)


def _penalty(key_index, intervals, shift):
  """Returns float32 [n, m]: 0 where a query sees a key, NEVER elsewhere.

  Args:
    key_index: int32 [n, 128], the same in every lane.
    intervals: int32 [2, m], of the queries.
    shift: which of the keys is query 0's own, if it is among them.
  """
  wide = lambda column: jnp.tile(column, (1, intervals.shape[1] // LANES))
  key = wide(key_index)
  place = wide(lax.broadcasted_iota(jnp.int32, key_index.shape, 0))
  own = shift + lax.broadcasted_iota(jnp.int32, (1, intervals.shape[1]), 1)
  seen = (key >= intervals[:1]) & (key < intervals[1:]) | (place == own)
  return jnp.where(seen, 0.0, NEVER)


def _cost(q_shape, keys, itemsize):
  """What XLA is told: half of all pairs, as in a dense grid; every array once."""
  B, K, G, rows, H = q_shape
  pairs = B * K * G * rows * keys // 2
  moved = B * K * H * (3 * G * rows + 4 * keys) * itemsize + 8 * B * K * G * rows
  return pl.CostEstimate(flops=10 * pairs * H, bytes_accessed=moved, transcendentals=pairs)
