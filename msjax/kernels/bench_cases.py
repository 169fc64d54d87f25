"""What bench.py compares: attention of one shape by our kernels, by jax's splash and by XLA.

Splash runs with the causal mask, as for one stream of text; with our mask (`streams`); with our
mask and one fused kernel for the backward pass; and as msjax calls it where its own kernels do not
apply, our mask and segments (`fallback`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from msjax.kernels import splash, static, tpu, tpu_decode, tpu_forward, xla
from msjax.kernels.schedule import Trips
from msjax.streams import Stream, Streams, Visibility

PASSES = ("forward", "backward", "decode")
SESSIONS = 16  # that decode together
TILES = (512, 1024)  # of splash; 2048 costs 1.3 to 1.5 times as much as 1024
FUSED_TILE = 1024  # of its fused backward pass; 512 costs 1.1 to 1.4 times as much
_IN_HBM = {  # where arrays are in a model; these programs are so small that all would be in VMEM
  "xla_vf_vmem_memory_space_assignment": "false",  # v5e and v5p
  "xla_gf_vmem_memory_space_assignment": "false",  # v6e
}
_ROOM = _IN_HBM | {"xla_tpu_scoped_vmem_limit_kib": str(64 << 10)}  # splash asks for none itself


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of one sequence, or of `SESSIONS` caches of this length."""

  length: int
  streams: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str

  def __str__(self):
    """Tells it in words."""
    return (
      f"{self.length:,} cells, {self.streams} streams, {self.heads} query and {self.kv_heads} "
      f"key heads of {self.head_dim}, {self.dtype}"
    )

  @property
  def group(self) -> int:
    """Query heads of a key head."""
    return self.heads // self.kv_heads

  @property
  def rule(self) -> Streams:
    """Streams of which none sees another in its own row."""
    return Streams(tuple(Stream(f"s{i}", "internal", 1.0) for i in range(self.streams)), 0)

  def array(self, *shape: int) -> jax.ShapeDtypeStruct:
    """Returns an array that is yet to be filled."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

  def qkv(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns q [1, N, L, H], k and v [1, K, L, H]."""
    one = lambda heads: self.array(1, heads, self.length, self.head_dim)
    return one(self.heads), one(self.kv_heads), one(self.kv_heads)

  def visibility(self) -> Visibility:
    """Who sees whom in a dense grid, in numpy."""
    rows = -(-self.length // self.streams)
    see = self.rule.visibility(np.ones((1, rows, self.streams), np.int32))
    return Visibility(*(np.asarray(x)[:, : self.length] for x in see))


@dataclasses.dataclass(frozen=True)
class Case:
  """One line of a table.

  Attributes:
    kernel: name.
    direction: one of `PASSES`.
    make: returns the function of the forward pass and its arguments, of which the backward pass
      differentiates the first three; arrays that are yet to be filled are `ShapeDtypeStruct`.
    heads: by which cycles are divided.
    trips: returns how often regions run of each Pallas kernel, by what its name contains; none of
      XLA's programs.
    tile: block of queries and keys.
    refetched: bytes that kernels without a `CostEstimate` fetch again after the first time.
    options: of the compiler.
  """

  kernel: str
  direction: str
  make: static.Make
  heads: int
  trips: Callable[[], Mapping[str, Trips]] = dict
  tile: int | None = None
  refetched: int = 0
  options: Mapping[str, str] | None = None

  def program(self) -> tuple[Callable, tuple]:
    """Returns what to compile, fn and args: the backward pass without the forward pass."""
    fn, args = self.make()
    if self.direction != "backward":
      return fn, args
    out, pull = jax.eval_shape(functools.partial(with_pullback, fn), *args)
    return call_pullback, (pull, out)


def with_pullback(fn, *args):
  """Returns `fn(*args)`, and the backward pass to the first three of them."""
  return jax.vjp(lambda *x: fn(*x, *args[3:]), *args[:3])


def call_pullback(pull, d_out):
  """Runs a backward pass."""
  return pull(d_out)


def cases(shape: Shape) -> list[Case]:
  """Returns all there is to compare on TPU, pass by pass."""
  found = [*_ours(shape), *_splash(shape), *dense_cases(shape)]
  return sorted(found, key=lambda case: PASSES.index(case.direction))


def gpu_cases(shape: Shape) -> list[Case]:
  """Returns all there is to compare on GPU, pass by pass."""
  attend = lambda q, k, v, visibility: xla.attention(q, jnp.swapaxes(k, 2, 3), v, visibility)
  make = functools.partial(_make, attend, shape)
  chunked = [Case("XLA chunked", direction, make, shape.heads) for direction in PASSES[:2]]
  found = [*chunked, *dense_cases(shape)]
  return sorted(found, key=lambda case: PASSES.index(case.direction))


# What all are given.


def _make(attend, shape: Shape):
  return attend, (*shape.qkv(), shape.visibility())


def _capacity(shape: Shape) -> int:
  """Cells of a cache that holds `length` and has room for one row more."""
  return -(-(shape.length + shape.streams) // 128) * 128


def _make_decode(attend, shape: Shape):
  """Returns what feeds one row to every session, in the first of two layers."""
  B, S, M, lanes = SESSIONS, shape.streams, _capacity(shape), shape.kv_heads * shape.head_dim
  new = shape.array(B, S, shape.kv_heads, shape.head_dim)
  cache = shape.array(2, B, M, lanes)
  row = np.full(B, -(-shape.length // S), np.int32)
  see = shape.rule.visibility_in_cache(np.ones((B, 1, S), np.int32), row, np.ones((B, M), bool))
  q = shape.array(B, S, shape.heads, shape.head_dim)
  return attend, (q, new, new, cache, cache, np.int32(0), Visibility(*map(np.asarray, see)))


# Our kernels.


def _ours(shape: Shape) -> list[Case]:
  """Returns the kernels of tpu.py and tpu_decode.py."""
  of_grid = functools.partial(_make_ours, shape), shape.heads
  of_rows = functools.partial(_make_decode_ours, shape), SESSIONS * shape.heads
  trips = functools.partial(_our_trips, shape)
  decode_trips = functools.partial(_our_decode_trips, shape)
  return [
    Case("msjax", "forward", *of_grid, trips, options=_IN_HBM),
    Case("msjax", "backward", *of_grid, trips, options=_IN_HBM),
    Case("msjax", "decode", *of_rows, decode_trips, options=_IN_HBM),
  ]


@functools.cache
def _make_ours(shape: Shape):
  q, k, v = shape.qkv()
  plan = jax.jit(lambda visibility: tpu.plan(q, k, visibility))
  return tpu.attention, (q, k, v, plan(shape.visibility()))


@functools.cache
def _make_decode_ours(shape: Shape):
  _, (*args, visibility) = _make_decode(None, shape)
  plan = jax.jit(lambda visibility: tpu_decode.plan(visibility, args[3]))
  return tpu_decode.attention, (*args, plan(visibility))


def _our_trips(shape: Shape) -> dict[str, Trips]:
  """Reads off the plan of what is made above.

  The blocks that hold the queries' own keys and are causal come first. Forward, the others of them
  come next; backward, they are among those seen in part. Then come blocks seen in part, and at last
  those seen as a whole.
  """
  K, group = shape.kv_heads, shape.group
  *_, plan = _make_ours(shape)[1]
  count = lambda todo: (int(x.sum()) for x in (todo.causal, todo.visits.partial, todo.visits.whole))
  causal, partial, whole = count(plan.forward)
  blocks = plan.forward.causal.size
  stacks = K * group // tpu_forward.stacked_heads(group, plan.keys.shape[2] // blocks)
  forward = tuple(stacks * n for n in (causal, blocks - causal, partial, whole))
  backward = tuple(K * group * n for n in count(plan.backward))
  return {
    "stream_forward": Trips(K * blocks, forward),
    "stream_forward_streamed": Trips(K * (blocks + partial + whole), forward, edges=K * blocks),
    "stream_backward": Trips(
      K * plan.backward.causal.size, backward, edges=K * len(plan.backward.causal)
    ),
  }


def _our_decode_trips(shape: Shape) -> dict[str, Trips]:
  """A session's own row comes before blocks seen as a whole and blocks seen in part."""
  *_, k_cache, _, _, see = _make_decode(None, shape)[1]
  *_, plan = _make_decode_ours(shape)[1]
  whole, rest = divmod(int(see.itself.min()), tpu_decode.key_block(k_cache))
  bodies = tuple(SESSIONS * n for n in (1, whole, bool(rest)))
  return {"stream_block_decode": Trips(int(plan.steps) * len(plan.todo), bodies, edges=SESSIONS)}


# Splash attention.


def _splash(shape: Shape) -> list[Case]:
  own = splash.tile(shape.length)
  return [
    *(
      _splash_case(shape, kernel, direction, tile)
      for kernel in ("splash causal", "splash streams")
      for direction in PASSES[:2]
      for tile in TILES
    ),
    _splash_case(shape, "splash streams fused", "backward", FUSED_TILE),
    *(_splash_case(shape, "splash fallback", direction, own) for direction in PASSES[:2]),
  ]


def _splash_case(shape: Shape, kernel: str, direction: str, tile: int) -> Case:
  fused = kernel.endswith("fused")
  return Case(
    kernel,
    direction,
    functools.partial(_make, functools.partial(_call_splash, shape, kernel, tile), shape),
    shape.heads,
    functools.partial(_splash_trips, shape, direction, tile, fused),
    tile,
    refetched=_splash_refetched(shape, direction, tile, fused),
    options=_ROOM,
  )


def _call_splash(shape, kernel, tile, q, k, v, visibility):
  if kernel == "splash fallback":
    return splash.attention(q, k, v, visibility, shape.rule)
  kind = splash.CausalMask if kernel == "splash causal" else splash.Mask
  return splash.attend(kind.of(shape.rule, tile, kernel.endswith("fused")), q, k, v, None)


def _splash_grid(shape: Shape, tile: int) -> tuple[int, int]:
  """Returns blocks of a side, and how many blocks some query sees."""
  side = -(-shape.length // tile)
  return side, side * (side + 1) // 2


def _splash_trips(shape: Shape, direction: str, tile: int, fused: bool) -> dict[str, Trips]:
  """Hidden blocks are steps too; rows of blocks have a first and a last step."""
  side, seen = _splash_grid(shape, tile)
  steps, bodies = shape.heads * side**2, (shape.heads * seen,)
  by_head = Trips(steps, bodies, edges=shape.heads * side)
  by_group = Trips(steps, bodies, edges=shape.kv_heads * side)
  if direction == "forward":
    return {"splash_mqa_fwd": by_head}
  return {"splash_mqa_dkv": by_group} | ({} if fused else {"splash_mqa_dq": by_head})


def _splash_refetched(shape: Shape, direction: str, tile: int, fused: bool) -> int:
  """Every seen block fetches two arrays of `tile` rows, be they k and v or q and its cotangent."""
  side, seen = _splash_grid(shape, tile)
  row = 2 * shape.head_dim * jnp.dtype(shape.dtype).itemsize
  of_keys = (shape.heads * seen - shape.kv_heads * side) * tile * row
  of_queries = shape.heads * (seen - side) * tile * row
  if direction == "forward":
    return of_keys
  return of_queries if fused else of_queries + of_keys


# XLA.


def dense_cases(shape: Shape) -> list[Case]:
  """Returns attention as a textbook has it, with every score in memory."""
  make = functools.partial(_make, _dense, shape)
  decode = functools.partial(_make_decode, _decode_dense, shape)
  return [
    Case("XLA dense", "forward", make, shape.heads),
    Case("XLA dense", "backward", make, shape.heads),
    Case("XLA dense", "decode", decode, SESSIONS * shape.heads),
  ]


def _dense(q, k, v, visibility):
  B, N, L, H = q.shape
  q = q.reshape(B, k.shape[1], -1, L, H)
  s = jnp.einsum("bkgqh,bkch->bkgqc", q, k, preferred_element_type=jnp.float32)
  see = visibility.dense()[:, None, None]
  p = jax.nn.softmax(jnp.where(see, s / math.sqrt(H), -1e30), axis=-1).astype(v.dtype)
  return jnp.einsum("bkgqc,bkch->bkgqh", p, v).reshape(B, N, L, H)


def _decode_dense(q, k_new, v_new, k_cache, v_cache, layer, visibility):
  del v_new  # the cache holds the row, too
  B, _, K, H = k_new.shape
  by_head = lambda cache: jnp.moveaxis(cache[layer].reshape(B, -1, K, H), 2, 1)
  out = _dense(jnp.moveaxis(q, 2, 1), by_head(k_cache), by_head(v_cache), visibility)
  return jnp.moveaxis(out, 1, 2)
