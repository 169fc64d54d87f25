"""What attention costs, kernel beside kernel: `python -m msjax.kernels.bench --topology=v5e:2x2`.

Without a TPU it compiles for one and counts cycles in the compiler's schedule (see schedule.py): of
our kernels, of jax's splash attention under several masks, and of dense attention by XLA. It takes
about a minute a topology. With `--device` it times them on the TPU or GPU at hand instead.
"""

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from msjax import cli
from msjax.errors import InputError
from msjax.kernels import api, bench_cases, static
from msjax.kernels.bench_cases import PASSES, SESSIONS, Case, Shape
from msjax.kernels.chips import chip_of

_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:2x2"], "what to compile for; repeatable")
_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line instead of tables")
_DEVICE = flags.DEFINE_bool("device", False, "time kernels on the TPU or GPU at hand")
_LENGTH = flags.DEFINE_integer("length", 5120, "cells: of a sequence, or cached", lower_bound=1)
_STREAMS = flags.DEFINE_integer("streams", 10, "streams of the grid", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 8, "query heads", lower_bound=1)
_KV_HEADS = flags.DEFINE_integer("kv_heads", 4, "key and value heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "numbers a head", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")

WIDTH = 100  # of what is printed, where no terminal says otherwise
TO_SPLASH = {"forward": "splash causal", "backward": "splash causal", "decode": "XLA dense"}
TO_DENSE = dict.fromkeys(PASSES, "XLA dense")
_REPEATS = 20
_REFUSALS = (jax.errors.JaxRuntimeError, ValueError, NotImplementedError)  # of shapes

Row = dict[str, Any]  # one line of JSON


# Figures.


def count(case: Case, topology: str) -> Row:
  """Compiles a case and counts; call it in one of `static.fresh_processes`."""
  row = {"kernel": case.kernel, "pass": case.direction, "topology": topology, "tile": case.tile}
  row |= dict.fromkeys(("cycles_per_head", "mxu_floor_cycles", "hbm_bytes", "vmem_bytes"))
  row |= {"libtpu": static.libtpu_version(), "reason": None}
  try:
    program = static.measure_here(case.program, topology, case.options)
  except InputError:
    raise
  except _REFUSALS as error:
    return row | {"reason": _sentence(error)}
  hbm_bytes = program.hbm_bytes + case.refetched
  row |= {
    "hbm_bytes": hbm_bytes,
    "hbm_microseconds": round(hbm_bytes / program.chip.hbm_bytes_per_second * 1e6, 1),
    "vmem_bytes": program.vmem_bytes,
    "compile_seconds": round(program.compile_seconds, 1),
  }
  if trips := case.trips():
    cycles = program.cycles(trips)
    return row | {
      "cycles_per_head": round(cycles.total / case.heads),
      "mxu_floor_cycles": round(cycles.mxu_floor / case.heads),
      "schedule_per_head": round(cycles.schedule / case.heads),
      "xla_cycles_per_head": _whole(program.xla_cycles / case.heads),
    }
  unknown = math.isnan(program.xla_cycles)
  return row | {
    "cycles_per_head": _whole(program.xla_cycles / case.heads),
    "mxu_floor_cycles": round(program.flops / program.chip.flops_per_cycle / case.heads),
    "reason": "XLA estimates no cycles for one of its operations" if unknown else None,
  }


def clock(case: Case) -> Row:
  """Takes the time of a case on the device at hand."""
  device = jax.devices()[0].device_kind
  row = {"kernel": case.kernel, "pass": case.direction, "device": device, "tile": case.tile}
  try:
    return row | {"milliseconds": round(_milliseconds(case), 4), "reason": None}
  except _REFUSALS as error:
    return row | {"milliseconds": None, "reason": _sentence(error)}


def _milliseconds(case: Case) -> float:
  """Returns the median of one call, on arrays drawn at random."""
  fn, args = case.make()
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(args))))
  fill = lambda x: (
    jax.random.normal(next(keys), x.shape, x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct)
    else jnp.asarray(x)
  )
  args = jax.tree.map(fill, args)
  if case.direction == "backward":
    out, pull = jax.jit(functools.partial(bench_cases.with_pullback, fn))(*args)
    fn, args = bench_cases.call_pullback, (pull, out)
  fn = jax.jit(fn, compiler_options=case.options)
  jax.block_until_ready(fn(*args))
  seconds = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds) * 1e3


def _whole(x: float) -> int | None:
  return None if math.isnan(x) else round(x)


def _sentence(error: Exception) -> str:
  """First line of an error that says something."""
  lines = str(error).splitlines()
  return next((line for line in lines if len(line.split()) > 3), type(error).__name__)[:200]


def compare(rows: Sequence[Row], figure: str, baselines: Mapping[str, str]) -> list[Row]:
  """Adds to each row `ratio`, of its figure to the least of its pass's baseline, `ratio_to`."""
  compared = []
  for row in rows:
    same = [r for r in rows if (r["pass"], r["kernel"]) == (row["pass"], baselines[row["pass"]])]
    best = min((r for r in same if r[figure]), key=lambda r: r[figure], default=None)
    known = best and row[figure]
    compared.append(
      row
      | {"ratio": round(row[figure] / best[figure], 3) if known else None}
      | {"ratio_to": best and _name(best)}
    )
  return compared


def _name(row: Row) -> str:
  return f"{row['kernel']}, tile {row['tile']}" if row["tile"] else row["kernel"]


# Tables.


def counted_cells(row: Row) -> dict[str, str]:
  """What `count` found, as cells of a table by column."""
  cycles, floor = row["cycles_per_head"], row["mxu_floor_cycles"]
  return {
    "tile": _cell(row["tile"], "{}"),
    "cycles": _cell(cycles, "{:,}"),
    "ratio": _cell(row["ratio"], "{:.2f}"),
    "MXU busy": _cell(cycles and floor / cycles, "{:.0%}"),
    "XLA cycles": _cell(row.get("xla_cycles_per_head"), "{:,}"),
    "HBM MB": _cell(row["hbm_bytes"] and row["hbm_bytes"] / 1e6, "{:,.1f}"),
    "HBM µs": _cell(row.get("hbm_microseconds"), "{:,.0f}"),
    "VMEM MB": _cell(row["vmem_bytes"] and row["vmem_bytes"] / 1e6, "{:,.1f}"),
  }


def clocked_cells(row: Row) -> dict[str, str]:
  """What `clock` found, as cells of a table by column."""
  return {
    "tile": _cell(row["tile"], "{}"),
    "ms": _cell(row["milliseconds"], "{:,.3f}"),
    "ratio": _cell(row["ratio"], "{:.2f}"),
  }


def _cell(value: Any, form: str) -> str:
  return "–" if value is None else form.format(value)


def tables(rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> Iterator[Table | Text]:
  """Yields a table for each pass, and under it its notes."""
  for direction in PASSES:
    of_pass = [row for row in rows if row["pass"] == direction]
    if not of_pass:
      continue
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column(direction, no_wrap=True)
    for column in cells(of_pass[0]):
      out.add_column(column, justify="right", no_wrap=True)
    for row in of_pass:
      out.add_row(row["kernel"], *cells(row).values())
    yield out
    if to := of_pass[0]["ratio_to"]:
      yield Text(f"ratio: to {to}")
    yield from (Text(f"{_name(row)}: {row['reason']}") for row in of_pass if row["reason"])


# The command.


def _count_all(shape: Shape, topology: str, console: Console) -> None:
  cases = bench_cases.cases(shape)
  calls = [functools.partial(count, case, topology) for case in cases]
  waiting = track(
    static.fresh_processes(calls),
    description=f"compiling for {topology}",
    total=len(calls),
    console=Console(stderr=True),
    transient=True,
  )
  rows = compare(list(waiting), "cycles_per_head", TO_SPLASH)
  title = f"{topology}, libtpu {static.libtpu_version()}: {shape}"
  _show(console, rows, title, counted_cells)


def _clock_all(shape: Shape, console: Console) -> None:
  platform = api.platform()
  if platform == "cpu":
    raise InputError(
      "--device: needs a TPU or a GPU, here is only a CPU; leave it out to count cycles without one"
    )
  cases, baselines = (
    (bench_cases.cases(shape), TO_SPLASH)
    if platform == "tpu"
    else (bench_cases.gpu_cases(shape), TO_DENSE)
  )
  rows = compare([clock(case) for case in cases], "milliseconds", baselines)
  title = f"{rows[0]['device']}, median of {_REPEATS} calls: {shape}"
  _show(console, rows, title, clocked_cells)


def _show(console: Console, rows: Sequence[Row], title: str, cells) -> None:
  if _JSON.value:
    for row in rows:
      print(json.dumps(row), flush=True)
  else:
    console.print(Text(title, style="bold"))
    console.print(*tables(rows, cells), sep="\n")


_LEGEND = f"""
cycles: of one query head (of decode: in one of {SESSIONS} sessions), by the compiler's schedule, or by
the MXU where that takes longer; of XLA dense by XLA's estimate. MXU busy: the MXU's share of them.
XLA cycles: what XLA's operations around a kernel add, by its estimate.
HBM MB: traffic of all heads. HBM µs: the time it takes a chip at peak.
VMEM MB: the most that one kernel holds."""


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
  if shape.heads % shape.kv_heads:
    raise InputError(f"--heads: {shape.heads}; expected a multiple of --kv_heads, {shape.kv_heads}")
  console = Console(width=None if sys.stdout.isatty() else WIDTH)
  if _DEVICE.value:
    _clock_all(shape, console)
    return
  for topology in _TOPOLOGY.value:
    chip_of(topology)
  for topology in _TOPOLOGY.value:
    _count_all(shape, topology, console)
  if not _JSON.value:
    console.print(Text(_LEGEND))


if __name__ == "__main__":
  cli.run(main)
