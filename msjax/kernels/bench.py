"""What attention costs, kernel beside kernel: `python -m msjax.kernels.bench --topology=v5e:2x2`.

Without a TPU it compiles for one and counts cycles in the compiler's schedule (see static.py): of
our kernels, of jax's splash attention, causal and with our mask, and of dense XLA. With `--device`
it takes the time on the accelerator at hand instead.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from msjax import cli
from msjax.errors import InputError
from msjax.kernels import splash, static, tpu, tpu_decode, tpu_forward, xla
from msjax.kernels.static import Trips
from msjax.streams import Stream, Streams, Visibility

_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:2x2"], "what to compile for; repeatable")
_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line instead of a table")
_DEVICE = flags.DEFINE_bool("device", False, "time kernels on the accelerator at hand")
_LENGTH = flags.DEFINE_integer("length", 5120, "cells: of a sequence, or cached", lower_bound=1)
_STREAMS = flags.DEFINE_integer("streams", 10, "streams of the grid", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 8, "query heads", lower_bound=1)
_KV_HEADS = flags.DEFINE_integer("kv_heads", 4, "key and value heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "numbers a head", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")

SESSIONS = 16  # that decode together
TILES = (512, 1024, 2048)  # of splash attention
_IN_HBM = {  # where arrays are in a model; these programs are so small that all would be in VMEM
  "xla_vf_vmem_memory_space_assignment": "false",  # v5e and v5p
  "xla_gf_vmem_memory_space_assignment": "false",  # v6e
}
_ROOM = _IN_HBM | {"xla_tpu_scoped_vmem_limit_kib": str(64 << 10)}  # splash asks for none itself
_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of one sequence, or of `SESSIONS` caches of this length."""

  length: int
  streams: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str

  def __post_init__(self):
    """Checks that heads form groups."""
    if self.heads % self.kv_heads:
      raise InputError(f"heads: {self.heads}; expected a multiple of kv_heads, {self.kv_heads}")

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
  """One line of the table.

  Attributes:
    kernel: name.
    direction: `forward`, `backward` or `decode`.
    make: returns the function of the forward pass and its arguments, of which the backward pass
      differentiates the first three; arrays that are yet to be filled are `ShapeDtypeStruct`.
    trips: returns how often regions run of each Pallas kernel, by what its name contains.
    heads: by which cycles are divided.
    tile: block of queries and keys.
    refetched: bytes that kernels without a `CostEstimate` fetch again after the first time.
    options: of the compiler.
  """

  kernel: str
  direction: str
  make: static.Make
  trips: Callable[[], Mapping[str, Trips]]
  heads: int
  tile: int | None = None
  refetched: int = 0
  options: Mapping[str, str] | None = None

  def program(self) -> tuple[Callable, tuple]:
    """Returns what to compile, fn and args: the backward pass without the forward pass."""
    fn, args = self.make()
    if self.direction != "backward":
      return fn, args
    out, pull = jax.eval_shape(functools.partial(_pull, fn), *args)
    return lambda pull, d_out: pull(d_out), (pull, out)


def _pull(fn, *args):
  """Returns the result and the backward pass."""
  return jax.vjp(lambda *x: fn(*x, *args[3:]), *args[:3])


# Cases.


def cases(shape: Shape) -> list[Case]:
  """Returns all there is to compare, pass by pass."""
  found = [
    *_ours(shape),
    *(_splash(shape, "splash causal", direction, tile) for direction, tile in _SPLASH),
    *(_splash(shape, "splash streams", direction, tile) for direction, tile in _SPLASH),
    *(_splash(shape, "splash streams fused", "backward", tile) for tile in TILES[:2]),
    _splash(shape, "splash fallback", "forward", splash.tile(shape.length)),
    _splash(shape, "splash fallback", "backward", splash.tile(shape.length)),
    *_xla(shape),
  ]
  return sorted(found, key=lambda case: _PASSES.index(case.direction))


_PASSES = ("forward", "backward", "decode")
_SPLASH = [("forward", tile) for tile in TILES] + [("backward", tile) for tile in TILES[:2]]


def _ours(shape: Shape) -> list[Case]:
  """Returns the kernels of tpu.py and tpu_decode.py."""
  make = functools.partial(_make_ours, shape)
  decode = functools.partial(_make_decode_ours, shape)
  trips, heads = functools.partial(_our_trips, shape), shape.heads
  return [
    Case("msjax", "forward", make, trips, heads, options=_IN_HBM),
    Case("msjax", "backward", make, trips, heads, options=_IN_HBM),
    Case("msjax", "decode", decode, trips, heads * SESSIONS, options=_IN_HBM),
  ]


def _make(attend, shape: Shape):
  return attend, (*shape.qkv(), shape.visibility())


def _make_ours(shape: Shape):
  q, k, v = shape.qkv()
  return tpu.attention, (q, k, v, tpu.plan(q, k, shape.visibility()))


def _our_trips(shape: Shape) -> dict[str, Trips]:
  """Reads off the plans of what is made above.

  Forward, the blocks that hold the queries' own keys come before those seen in part and those seen
  as a whole, and of them first those that are causal; backward, the others of
  them are among those seen in part.
  In decoding, a session's own row comes before blocks without and blocks with a mask.
  """
  K, group = shape.kv_heads, shape.heads // shape.kv_heads
  count = lambda visits: (visits.partial.size, int(visits.partial.sum()), int(visits.whole.sum()))
  *_, plan = _make_ours(shape)[1]
  rows, *visits = count(plan.forward.visits)
  causal = int(plan.forward.causal.sum())
  stacks = K * group // tpu_forward.stacked_heads(group, plan.keys.shape[2] // rows)
  forward = tuple(stacks * n for n in (causal, rows - causal, *visits))
  blocks, *seen = count(plan.backward.visits)
  backward = (int(plan.backward.causal.sum()), *seen)
  *_, cached = _make_decode_ours(shape)[1]
  return {
    "stream_forward": Trips(K * rows, forward),
    "stream_forward_streamed": Trips(K * sum((rows, *visits)), forward, edges=K * rows),
    "stream_backward": Trips(
      K * blocks, tuple(K * group * n for n in backward), edges=K * len(plan.backward.causal)
    ),
    "stream_block_decode": Trips(
      int(cached.steps) * len(cached.todo),
      (SESSIONS, *_cached_blocks(shape)),
      edges=SESSIONS,
    ),
  }


def _capacity(shape: Shape) -> int:
  """Cells of a cache that holds `length` and has room for one row more."""
  return -(-(shape.length + shape.streams) // 128) * 128


def _make_decode(attend, shape: Shape):
  """Returns what feeds one row to every session, in the first of two layers."""
  B, S, M, lanes = SESSIONS, shape.streams, _capacity(shape), shape.kv_heads * shape.head_dim
  new = shape.array(B, S, shape.kv_heads, shape.head_dim)
  cache = shape.array(2, B, M, lanes)
  row = np.full(B, -(-shape.length // S), np.int32)
  see = shape.rule.row_visibility(np.ones((B, S), np.int32), row, np.ones((B, M), bool))
  q = shape.array(B, S, shape.heads, shape.head_dim)
  return attend, (q, new, new, cache, cache, np.int32(0), Visibility(*map(np.asarray, see)))


def _cached_blocks(shape: Shape) -> tuple[int, int]:
  """Returns how many blocks of caches are seen as a whole, and how many in part."""
  *_, k_cache, _, _, see = _make_decode(None, shape)[1]
  block, cached = tpu_decode.key_block(k_cache), int(see.itself.min())
  return SESSIONS * (cached // block), SESSIONS * bool(cached % block)


def _make_decode_ours(shape: Shape):
  _, (*args, visibility) = _make_decode(None, shape)
  return tpu_decode.attention, (*args, tpu_decode.plan(visibility, args[3]))


def _splash(shape: Shape, kernel: str, direction: str, tile: int) -> Case:
  """Returns splash attention; `fallback` is what msjax calls, with segments."""
  fused = kernel.endswith("fused")
  return Case(
    kernel,
    direction,
    functools.partial(_make, functools.partial(_call_splash, shape, kernel, tile), shape),
    functools.partial(_splash_trips, shape, direction, tile, fused),
    shape.heads,
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


def _no_trips() -> dict[str, Trips]:
  return {}


def _xla(shape: Shape) -> list[Case]:
  """Returns dense attention."""
  make = functools.partial(_make, _dense, shape)
  decode = functools.partial(_make_decode, _decode_dense, shape)
  return [
    Case("XLA dense", "forward", make, _no_trips, shape.heads),
    Case("XLA dense", "backward", make, _no_trips, shape.heads),
    Case("XLA dense", "decode", decode, _no_trips, shape.heads * SESSIONS),
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


# Static figures.


def _measure(case: Case, topology: str) -> dict[str, Any]:
  """Compiles a case and counts; call it in a process of its own."""
  row = {"kernel": case.kernel, "pass": case.direction, "topology": topology, "tile": case.tile}
  row |= dict.fromkeys(("cycles_per_head", "mxu_floor_cycles", "hbm_bytes", "vmem_bytes"))
  row |= {"libtpu": static.libtpu_version()}
  try:
    program = static.measure_here(case.program, topology, case.options)
  except jax.errors.JaxRuntimeError as error:
    return row | {"reason": "does not compile: " + _sentence(error)}
  row |= {"compile_seconds": round(program.compile_seconds, 1)}
  if trips := case.trips():
    cycles = program.cycles(trips)
    total, floor, reason = cycles.total, cycles.mxu_floor, None
    row["schedule_per_head"] = round(cycles.schedule / case.heads)
    row["xla_cycles_per_head"] = _whole(program.xla_cycles / case.heads)
  else:
    total, floor = program.xla_cycles, program.flops / program.chip.flops_per_cycle
    reason = "XLA estimates no cycles for one of its operations" if math.isnan(total) else None
  return row | {
    "cycles_per_head": _whole(total / case.heads),
    "mxu_floor_cycles": round(floor / case.heads),
    "hbm_bytes": program.hbm_bytes + case.refetched,
    "hbm_microseconds": round(
      (program.hbm_bytes + case.refetched) / program.chip.hbm_bytes_per_second * 1e6, 1
    ),
    "vmem_bytes": program.vmem_bytes,
    "reason": reason,
  }


def _whole(x: float) -> int | None:
  return None if math.isnan(x) else round(x)


def _sentence(error: Exception) -> str:
  """First line of an error that says something."""
  return next(line for line in str(error).splitlines() if len(line.split()) > 3)[:160]


def compare(rows: list[dict[str, Any]], figure: str, baseline: str) -> list[dict[str, Any]]:
  """Adds to each row how its figure relates to the best of the baseline, as `ratio_to_splash`.

  Rows are compared within a topology and pass; `best` marks the baseline's best.
  """
  group = lambda row: (row.get("topology"), row["pass"])
  best = {}
  for row in rows:
    if row["kernel"] == baseline and row[figure]:
      best[group(row)] = min(best.get(group(row), math.inf), row[figure])
  name = "ratio_to_" + baseline.split()[-1 if baseline.startswith("XLA") else 0]
  for row in rows:
    known = row[figure] and group(row) in best
    row[name] = round(row[figure] / best[group(row)], 3) if known else None
    row["best"] = bool(known) and row["kernel"] == baseline and row[name] == 1
  return rows


def table(rows: list[dict[str, Any]], topology: str, shape: Shape) -> Table:
  """Lays the figures of one topology out for people."""
  out = Table(
    title=f"{topology}, libtpu {rows[0]['libtpu']}: {shape.length:,} cells, {shape.streams} "
    f"streams, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, {shape.dtype}; "
    f"decode: {SESSIONS} sessions"
  )
  out.add_column("pass")
  out.add_column("kernel")
  for column in ("tile", "cycles a head", "+ XLA", "MXU share", "of splash", "HBM MB", "VMEM MB"):
    out.add_column(column, justify="right")
  out.add_column("")
  for row in rows:
    cycles, floor = row["cycles_per_head"], row["mxu_floor_cycles"]
    out.add_row(
      row["pass"],
      row["kernel"],
      _cell(row["tile"], "{}"),
      _cell(cycles, "{:,}"),
      _cell(row.get("xla_cycles_per_head"), "{:,}"),
      _cell(cycles and floor / cycles, "{:.0%}"),
      _cell(row["ratio_to_splash"], "{:.2f}"),
      _cell(row["hbm_bytes"] and row["hbm_bytes"] / 1e6, "{:,.1f}"),
      _cell(row["vmem_bytes"] and row["vmem_bytes"] / 1e6, "{:,.1f}"),
      "best of splash causal" if row["best"] else row.get("reason") or "",
    )
  return out


def _cell(value: Any, form: str) -> str:
  return "–" if value is None else form.format(value)


def _static(shape: Shape, topologies: Iterable[str]) -> None:
  for topology in topologies:
    static.chip_of(topology)
  for topology in topologies:
    calls = [functools.partial(_measure, case, topology) for case in cases(shape)]
    rows = compare(list(static.fresh_processes(calls)), "cycles_per_head", "splash causal")
    _show(rows, lambda rows, topology=topology: table(rows, topology, shape))


def _show(rows: list[dict[str, Any]], lay_out: Callable[[list[dict[str, Any]]], Table]) -> None:
  if _JSON.value:
    for row in rows:
      print(json.dumps(row), flush=True)
  else:
    Console().print(lay_out(rows))


# Times.


def _device_cases(shape: Shape, backend: str) -> tuple[list[Case], str]:
  """Returns what can run here, and which kernel the others are compared with."""
  if backend == "tpu":
    return cases(shape), "splash causal"
  if backend in ("gpu", "cuda", "rocm"):
    make = functools.partial(_make, xla.attention, shape)
    chunked = [
      Case("XLA chunked", direction, make, _no_trips, shape.heads)
      for direction in ("forward", "backward")
    ]
    return [*chunked, *_xla(shape)], "XLA dense"
  raise InputError(
    f"device: there is only a {backend}; --device needs a TPU or a GPU: leave it out to count "
    "cycles without one"
  )


def _time(case: Case) -> float:
  """Returns the median milliseconds of one call, on arrays drawn at random."""
  fn, args = case.make()
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(args)) + 1))
  fill = lambda x: (
    jax.random.normal(next(keys), x.shape, x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct)
    else jnp.asarray(x)
  )
  args = jax.tree.map(fill, args)
  if case.direction == "backward":
    out, pull = jax.jit(functools.partial(_pull, fn))(*args)
    fn, args = lambda pull, d_out: pull(d_out), (pull, out)
  fn = jax.jit(fn, compiler_options=case.options if jax.default_backend() == "tpu" else None)
  jax.block_until_ready(fn(*args))
  seconds = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds) * 1e3


def _device(shape: Shape) -> None:
  here, baseline = _device_cases(shape, jax.default_backend())
  device = jax.devices()[0].device_kind
  rows = []
  for case in here:
    row = {"kernel": case.kernel, "pass": case.direction, "device": device, "tile": case.tile}
    try:
      rows.append(row | {"milliseconds": round(_time(case), 4)})
    except jax.errors.JaxRuntimeError as error:
      rows.append(row | {"milliseconds": None, "reason": _sentence(error)})
  rows = compare(rows, "milliseconds", baseline)
  _show(rows, functools.partial(_device_table, device))


def _device_table(device: str, rows: list[dict[str, Any]]) -> Table:
  """Lays times out for people."""
  ratio = next(key for key in rows[0] if key.startswith("ratio"))
  out = Table(title=f"{device}, median of {_REPEATS} calls")
  for column in ("pass", "kernel", "tile", "milliseconds", ratio.replace("_", " "), ""):
    out.add_column(column)
  for row in rows:
    out.add_row(
      row["pass"],
      row["kernel"],
      _cell(row["tile"], "{}"),
      _cell(row["milliseconds"], "{:,.3f}"),
      _cell(row[ratio], "{:.2f}"),
      "best" if row["best"] else row.get("reason", ""),
    )
  return out


def main(_) -> None:
  """Counts cycles for each topology, or takes times."""
  shape = Shape(
    _LENGTH.value,
    _STREAMS.value,
    _HEADS.value,
    _KV_HEADS.value,
    _HEAD_DIM.value,
    _DTYPE.value,
  )
  if _DEVICE.value:
    _device(shape)
  else:
    jax.config.update("jax_platforms", "cpu")
    _static(shape, _TOPOLOGY.value)


if __name__ == "__main__":
  cli.run(main)
