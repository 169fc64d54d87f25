"""Attention of one fed row against the cache of all earlier rows, as a Pallas TPU kernel.

Every session has a length of its own. XLA lists the (session, block of keys) pairs in which a key
is seen, and the grid walks that list: nothing past a length is fetched or stepped over. All streams
of the row and all heads of a group make one product with a block. The row itself need not be in the
cache: it is folded in before a session's first block.

Letters: B sessions, S streams, N query heads, K key/value heads, G = N / K, H numbers a head,
M cells of the cache. A panel is 128 lanes of the cache: one head of 128 or two of 64.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msjax.kernels.lanes import COLUMNS_COLUMNS, COLUMNS_ROWS, LANES, NEVER, as_column, product
from msjax.streams import Visibility

KEY_BLOCK = 1024
MAX_ROWS = 512  # of queries in a product
MAX_STEPS = 24_576  # 768 KiB of lists in 1 MiB of scalar memory
_SUBLANES = 8
_VMEM_BYTES = 48 << 20
_FIRST, _LAST, _SEEN, _MASKED = 1, 2, 4, 8  # bits of what a step does


class Plan(NamedTuple):
  """What each step of the grid does, as [halves, steps at most] int32, and which keys are seen.

  Attributes:
    session: whose queries a step takes.
    source: whose block of keys it has in memory: if it needs none, that of the step before.
    block: the index of that block.
    todo: bits; none for a step that only fills up the shorter half.
    steps: int32 [], of the longer half.
    key_ok: int32 [B, 1, M rounded up to whole blocks], -1 for cached keys that are seen, else 0.
    row_ok: int32 [B, S rounded up to 8, at least 8], 1 where a query sees a cell of its row.
  """

  session: jax.Array
  source: jax.Array
  block: jax.Array
  todo: jax.Array
  steps: jax.Array
  key_ok: jax.Array
  row_ok: jax.Array


def attention(
  q: jax.Array,
  k_new: jax.Array,
  v_new: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
  layer: jax.Array,
  visibility: Visibility | Plan,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Softmax attention of a fed row over all earlier rows and itself.

  Earlier cells come from the cache, cells of the row from `k_new` and `v_new`, be they in the
  cache already or not. Cells that nobody sees may hold anything, NaN too.

  Args:
    q: [B, S, N, H], cells in attention order; bfloat16 or float32, like all arrays here.
    k_new: [B, S, K, H], rotated keys of the row.
    v_new: [B, S, K, H].
    k_cache: [layers, B, M, K * H], one head after another in the last axis; read in place.
    v_cache: [layers, B, M, K * H].
    layer: int32 [], whose cache to read.
    visibility: who sees whom, or what `plan` made of it, once for all layers: XLA would plan anew
      in every step of a scan over layers.
    interpret: run on any backend, slowly, for tests.

  Returns:
    [B, S, N, H] in the dtype of q; scores and sums are float32.

  Raises:
    ValueError: with the sentence of `refusal`.
  """
  reason = refusal(q, k_new, v_new, k_cache, v_cache, visibility)
  if reason:
    raise ValueError(reason)
  todo = visibility if isinstance(visibility, Plan) else plan(visibility, k_cache)
  (B, S, N, H), lanes = q.shape, k_cache.shape[3]
  heads = _Heads(S, N // k_new.shape[2], H, lanes // LANES)
  cells = max(S, _SUBLANES)  # one key would be no product to the compiler
  keys = key_block(k_cache)

  def session(half, step, session, *_):
    return session[half, step], 0, 0

  def key_row(half, step, _, source, block, *__):
    return source[half, step], 0, block[half, step]

  def cache_block(half, step, _, source, block, __, layer):
    return layer[0], source[half, step], block[half, step], 0

  queries = pl.BlockSpec((None, S, N * H), session)
  new = pl.BlockSpec((None, cells, lanes), session)
  row_ok = pl.BlockSpec((None, *todo.row_ok.shape[1:]), session)
  key_ok = pl.BlockSpec((None, 1, keys), key_row)
  cache = pl.BlockSpec((None, None, keys, lanes), cache_block)
  row = lambda x: jnp.pad(x.reshape(B, S, lanes), ((0, 0), (0, cells - S), (0, 0)))
  per_query = heads.panels, heads.rows, LANES
  out = pl.pallas_call(
    functools.partial(_kernel, heads),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(todo.session.shape[0], todo.steps),
      in_specs=[queries, row_ok, new, new, key_ok, cache, cache],
      out_specs=queries,
      scratch_shapes=[pltpu.VMEM(per_query, q.dtype), *[pltpu.VMEM(per_query, jnp.float32)] * 3],
    ),
    out_shape=jax.ShapeDtypeStruct((B, S, N * H), q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    ),
    cost_estimate=_cost(q, k_new, k_cache),
    name="stream_block_decode",
    interpret=interpret,
  )(
    *todo[:4],
    jnp.reshape(layer, 1).astype(jnp.int32),
    q.reshape(B, S, N * H),
    todo.row_ok,
    row(k_new),
    row(v_new),
    todo.key_ok,
    k_cache,
    v_cache,
  )
  return out.reshape(q.shape)


def plan(visibility: Visibility, k_cache: jax.Array) -> Plan:
  """Lists the blocks that have a key somebody sees, session by session, and each session's first.

  Sessions are dealt to two halves of the list, for the two cores of v4 and v5p, with about equally
  many blocks. Where there is one core this costs the idle steps of the shorter half, which fetch
  nothing: they stand before the first half and after the second.

  Args:
    visibility: as `Streams.visibility_in_cache` makes it. The caller sees to it that the `itself`
      of a session are neighbours, that `start` is 0, and that `end` is no less than the row's first
      cell: that every earlier cell is seen by all queries or, where not `key_ok`, by none.
    k_cache: [layers, B, M, K * H].
  """
  B, M = visibility.key_ok.shape
  keys = key_block(k_cache)
  at = visibility.itself.min(axis=1, keepdims=True)
  key_ok = visibility.key_ok & (jnp.arange(M) < at)
  key_ok = jnp.pad(key_ok, ((0, 0), (0, -M % keys)))
  blocks = key_ok.reshape(B, -1, keys)
  seen, per_session = blocks.any(-1), blocks.shape[1]
  listed = seen.at[:, 0].set(True)
  ends = jnp.cumsum(listed.sum(1))
  total = ends[-1]

  place = jnp.argsort(~listed.ravel(), stable=True)  # those listed, then the others
  index = jnp.arange(place.size)
  session, block = place // per_session, place % per_session
  seen, masked = seen.ravel()[place], ~blocks.all(-1).ravel()[place]
  last = (session != jnp.roll(session, -1)) | (index == total - 1)
  todo = _FIRST * (block == 0) + _LAST * last + _SEEN * seen + _MASKED * (seen & masked)
  fetched = place[jax.lax.cummax(jnp.where(seen, index, 0))]

  cut = total if B == 1 else ends[jnp.abs(2 * ends[:-1] - total).argmin()]
  steps = jnp.maximum(cut, total - cut)
  at = cut + steps * (jnp.arange(min(B, 2)) - 1)[:, None] + index
  todo = jnp.where((at >= 0) & (at < total), todo[at], 0)
  at = at.clip(0, total - 1)
  lists = session[at], fetched[at] // per_session, fetched[at] % per_session, todo, steps
  return Plan(*_int32(*lists, -1 * key_ok[:, None]), _row_ok(visibility))


def write_rows(cache: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
  """Writes one row of every session into the cache of all layers, in place where it is donated.

  Args:
    cache: [layers, B, M, K * H].
    new: [layers, B, S, K * H], in the dtype of the cache.
    at: int32 [B], the row's first cell in each session, at most M - S (the caller sees to it).

  Returns:
    The cache with the row in it.
  """

  def write(b, cache):
    row = lax.dynamic_slice_in_dim(new, b, 1, 1)
    return lax.dynamic_update_slice(cache, row, (0, b, at[b], 0))

  # A vmap would be a scatter: a loop of six programs a session. Without any loop, 32 sessions make
  # XLA copy `new` in every layer.
  return lax.fori_loop(0, at.size, write, cache, unroll=8)


def refusal(
  q: jax.Array,
  k_new: jax.Array,
  v_new: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
  visibility: Visibility | Plan,
) -> str | None:
  """Says in one sentence why `attention` cannot take these shapes; None if it can."""
  if q.ndim != 4 or q.shape[3] not in (64, 128):
    return f"q: shape {q.shape}; this kernel takes [B, S, N, H] with H 64 or 128"
  B, S, N, H = q.shape
  if k_new.ndim != 4 or k_new.shape != (B, S, k_new.shape[2], H):
    return f"k_new: shape {k_new.shape}; expected ({B}, {S}, K, {H}), as q is {q.shape}"
  K = k_new.shape[2]
  if not K or N % K:
    return f"k_new: {K} heads; expected a divisor of the {N} heads of q"
  if K * H % LANES:
    return f"k_new: {K} heads of {H}; this kernel takes an even number of them"
  if k_cache.ndim != 4 or k_cache.shape[1::2] != (B, K * H):
    return f"k_cache: shape {k_cache.shape}; expected (layers, {B}, M, {K * H})"
  M = k_cache.shape[2]
  if not M or M % LANES:
    return f"k_cache: {M} cells a session; this kernel takes multiples of {LANES}"
  steps = B * -(-M // key_block(k_cache))
  if steps > MAX_STEPS:
    return f"k_cache: {steps} blocks of keys a layer; this kernel takes up to {MAX_STEPS}"
  heads = _Heads(S, N // K, H, K * H // LANES)
  if heads.rows > MAX_ROWS:
    return (
      f"q: shape {q.shape}; {heads.rows} rows in one product, this kernel takes up to {MAX_ROWS}"
    )
  itemsize = jnp.dtype(q.dtype).itemsize
  # What is kept between steps, and what two steps have in memory: q and out, keys and values.
  kept = heads.panels * heads.rows * LANES * (itemsize + 12)
  fetched = 4 * (S * N * H + (S + key_block(k_cache)) * K * H) * itemsize
  if kept + fetched > _VMEM_BYTES:
    return (
      f"q: shape {q.shape}; needs {(kept + fetched) >> 20} MiB of VMEM, this kernel takes up to "
      f"{_VMEM_BYTES >> 20}"
    )
  for name, x, like in (("v_new", v_new, k_new), ("v_cache", v_cache, k_cache)):
    if x.shape != like.shape:
      return f"{name}: shape {x.shape}; expected {like.shape}"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"q: dtype {q.dtype}; this kernel takes bfloat16 and float32"
  arrays = {"k_new": k_new, "v_new": v_new, "k_cache": k_cache, "v_cache": v_cache}
  for name, x in arrays.items():
    if x.dtype != q.dtype:
      return f"{name}: dtype {x.dtype}; expected {q.dtype}, as q is"
  if isinstance(visibility, Visibility):
    expected = {"end": (B, S), "itself": (B, S), "key_ok": (B, M)}
  else:
    expected = {
      "key_ok": (B, 1, M + -M % key_block(k_cache)),
      "row_ok": (B, S + -S % _SUBLANES, max(S, _SUBLANES)),
    }
  for name, shape in expected.items():
    if getattr(visibility, name).shape != shape:
      return f"visibility.{name}: shape {getattr(visibility, name).shape}; expected {shape}"
  return None


def key_block(k_cache: jax.Array) -> int:
  """How many keys a step reads: 1,024, or what fits into 2 MiB, or all there are.

  1,024 keys of four heads of 128 in bfloat16, with their values, come from the memory of a v5e in
  three times the time that it computes with them: more would gain nothing and round lengths up
  further.
  """
  M, lanes = k_cache.shape[2:]
  fit = (2 << 20) // (lanes * k_cache.dtype.itemsize)
  return min(KEY_BLOCK, max(LANES, 1 << fit.bit_length() - 1), M)


def _row_ok(see):
  index = see.itself.min(axis=1, keepdims=True) + jnp.arange(see.itself.shape[1])
  ok = jnp.take_along_axis(see.key_ok, index, axis=1)[:, None]
  index = index[:, None]
  ok = ok & (index < see.end[..., None]) | (index == see.itself[..., None])
  S = ok.shape[2]
  return jnp.pad(*_int32(ok), ((0, 0), (0, -S % _SUBLANES), (0, max(0, _SUBLANES - S))))


def _int32(*arrays):
  return (x.astype(jnp.int32) for x in arrays)


def _cost(q, k_new, k_cache) -> pl.CostEstimate:
  """What full caches cost: lengths are not known when the program is compiled."""
  pairs = math.prod(q.shape[:3]) * (k_cache.shape[2] + k_new.shape[1])
  cache = math.prod(k_cache.shape[1:])
  return pl.CostEstimate(
    flops=4 * pairs * q.shape[3],
    transcendentals=pairs,
    bytes_accessed=2 * (cache + q.size + k_new.size) * q.dtype.itemsize,
  )


class _Heads(NamedTuple):
  """How the queries of a row lie in the kernel: [panels, rows, 128].

  Rows of a panel are its heads one after another, each with S queries and up to 7 rows of nothing.
  Where a panel holds two heads of keys, a query is zero in the lanes of the other: so is its
  product with the other's keys, and of its weighted values only the lanes of its own are read.
  """

  S: int
  G: int
  H: int
  panels: int

  @property
  def keys_in_panel(self) -> int:
    """Key heads in a panel."""
    return LANES // self.H

  @property
  def in_panel(self) -> int:
    """Query heads in a panel."""
    return self.keys_in_panel * self.G

  @property
  def rows(self) -> int:
    """Rows of a panel."""
    return self.in_panel * (self.S + -self.S % _SUBLANES)

  def places(self, panel: int):
    """Of every query head in a panel: its rows, its 128 lanes in [S, N * H], the half of those
    that is its own there, and the half in the panel."""
    for j in range(self.in_panel):
      head = panel * self.in_panel + j
      row, lane = j * self.rows // self.in_panel, head // self.keys_in_panel * LANES
      halves = head % self.keys_in_panel, j // self.G
      yield slice(row, row + self.S), slice(lane, lane + LANES), *halves

  def moved(self, x: jax.Array, source: int, target: int) -> jax.Array:
    """Half `source` of the lanes of x [S, 128] as half `target`, the other zero."""
    if self.keys_in_panel == 1:
      return x
    if source != target:
      x = pltpu.roll(x, self.H, axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane >= self.H if target else lane < self.H, x, 0.0)


def _kernel(heads, *refs):
  """One step: a session's queries against one block of its keys.

  What it is given: the plan and the layer; q [S, N * H]; of the row itself row_ok [S rounded up,
  cells] and k_new, v_new [cells, K * H]; of a block of the cache key_ok [1, keys] and k, v
  [keys, K * H]; out [S, N * H]. What stays for the session, all [panels, rows, 128]: its queries;
  in float32 the greatest score of each so far, in every lane; sums of its weights, by lane; its
  weighted values.
  """
  (_, _, _, todo, _), (q, row_ok, k_new, v_new, key_ok, k, v), out = refs[:5], refs[5:12], refs[12]
  queries, top, total, acc = refs[13:]
  do = todo[pl.program_id(0), pl.program_id(1)]
  panels = [(i, slice(i * LANES, (i + 1) * LANES)) for i in range(heads.panels)]

  def scores(i, keys):
    scale = math.log2(math.e) / math.sqrt(heads.H)
    return product(queries[i], keys, COLUMNS_COLUMNS) * scale

  def weighted(weights, values):
    return product(weights.astype(values.dtype), values, COLUMNS_ROWS)

  @pl.when(do & _FIRST != 0)
  def _():
    see = jnp.tile(row_ok[...], (heads.in_panel, 1)) != 0
    first_lane = jax.lax.broadcasted_iota(jnp.int32, top.shape[1:], 1) == 0
    for i, lanes in panels:
      for rows, there, *halves in heads.places(i):
        acc[i, rows] = heads.moved(q[:, there].astype(jnp.float32), *halves)
      queries[i] = acc[i].astype(q.dtype)
      s = jnp.where(see, scores(i, k_new[:, lanes]), NEVER)
      greatest = s.max(-1, keepdims=True)
      p = jnp.exp2(s - greatest)
      top[i] = jnp.broadcast_to(greatest, top.shape[1:])
      total[i] = jnp.where(first_lane, p.sum(-1, keepdims=True), 0.0)
      acc[i] = weighted(p, v_new[:, lanes])

  def fold_block(masked):
    if masked:
      see = key_ok[...] != 0
      keep = _by_key(key_ok[...], v.dtype)
    for i, lanes in panels:
      s, values = scores(i, k[:, lanes]), v[:, lanes]
      if masked:
        s = jnp.where(see, s, NEVER)
        values = pltpu.bitcast(pltpu.bitcast(values, jnp.int32) & keep, v.dtype)  # 0 x NaN is NaN
      old = top[i]
      greatest = jnp.maximum(old, s.max(-1, keepdims=True))
      shrink = jnp.exp2(old - greatest)
      p = jnp.exp2(s - jnp.tile(greatest, (1, s.shape[1] // LANES)))
      by_lane = sum(p[:, j : j + LANES] for j in range(0, s.shape[1], LANES))
      top[i] = greatest
      total[i] = shrink * total[i] + by_lane
      acc[i] = shrink * acc[i] + weighted(p, values)

  pl.when(do & (_SEEN | _MASKED) == _SEEN)(lambda: fold_block(masked=False))
  pl.when(do & _MASKED != 0)(lambda: fold_block(masked=True))

  @pl.when(do & _LAST != 0)
  def _():
    for i, _ in panels:
      acc[i] = acc[i] / total[i].sum(-1, keepdims=True)
      places = list(heads.places(i))
      for j in range(0, heads.in_panel, heads.keys_in_panel):
        together = places[j : j + heads.keys_in_panel]
        parts = (heads.moved(acc[i, rows], *halves[::-1]) for rows, _, *halves in together)
        out[:, together[0][1]] = sum(parts).astype(out.dtype)


def _by_key(key_ok, dtype):
  """int32 [1, keys], -1 or 0, -> [keys, 128] of dtype's size, as the int32 words that it fills."""
  by_key = as_column(key_ok)
  if dtype == jnp.bfloat16:
    by_key = pltpu.bitcast(by_key.astype(jnp.int16), jnp.int32)
  return by_key
