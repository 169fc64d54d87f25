"""What attention costs, kernel beside kernel: `python -m msjax.kernels.bench --topology=v5e:2x2`.

Without a TPU it compiles for one and counts cycles in the compiler's schedule (see schedule.py): of
our kernels, of jax's splash attention under several masks, and of dense attention by XLA. It takes
about a minute a topology. With `--device` it times them on the TPU or GPU at hand instead.
"""

import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

_TOPOLOGY = flags.DEFINE_multi_string(
  "topology", ["v5e:2x2"], "chip and shape to compile for, such as v5p:2x2x1 or v6e:2x2"
)
_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line instead of tables")
_DEVICE = flags.DEFINE_bool("device", False, "time kernels on the TPU or GPU at hand")
_LENGTH = flags.DEFINE_integer("length", 5120, "cells: of a sequence, or cached", lower_bound=1)
_STREAMS = flags.DEFINE_integer("streams", 10, "streams of the grid", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 8, "query heads", lower_bound=1)
_KV_HEADS = flags.DEFINE_integer("kv_heads", 4, "key and value heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "H, numbers a head", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of q, k and v")

WIDTH = 100  # of what is printed, where no terminal says otherwise
_COUNTS = (
  "cycles_per_head",
  "mxu_floor_cycles",
  "schedule_per_head",
  "xla_cycles_per_head",
  "microseconds",
  "hbm_bytes",
  "vmem_bytes",
  "compile_seconds",
)
_REPEATS = 20
_REFUSALS = (jax.errors.JaxRuntimeError, ValueError, NotImplementedError)  # of shapes

Row = dict[str, Any]  # one line of JSON
Baselines = Mapping[str, tuple[str, str]]  # by pass: a kernel, and the figure to compare
COUNTED: Baselines = {
  "forward": ("splash causal", "cycles_per_head"),
  "backward": ("splash causal", "cycles_per_head"),
  "decode": ("XLA dense", "microseconds"),  # it waits for memory, which cycles do not tell
}
CLOCKED_ON_TPU: Baselines = {
  direction: (kernel, "milliseconds") for direction, (kernel, _) in COUNTED.items()
}
CLOCKED_ON_GPU: Baselines = dict.fromkeys(PASSES, ("XLA dense", "milliseconds"))


# Figures.


def count(case: Case, topology: str) -> Row:
  """Compiles a case and counts; call it in one of `static.fresh_processes`."""
  row = {"kernel": case.kernel, "pass": case.direction, "topology": topology, "tile": case.tile}
  row |= dict.fromkeys(_COUNTS) | {"libtpu": static.libtpu_version(), "reason": None}
  try:
    program = static.measure_here(case.program, topology, case.options)
  except InputError:
    raise
  except _REFUSALS as error:
    return row | {"reason": _sentence(error)}
  cycles, xla_cycles, chip = program.cycles(case.trips()), program.xla_cycles, program.chip
  by_head = lambda x: _whole(x / case.heads)
  if program.kernels:
    row |= {
      "cycles_per_head": by_head(cycles.total),
      "mxu_floor_cycles": by_head(cycles.mxu_floor),
      "schedule_per_head": by_head(cycles.schedule),
      "xla_cycles_per_head": by_head(xla_cycles),
    }
  else:
    row |= {
      "cycles_per_head": by_head(xla_cycles),
      "mxu_floor_cycles": by_head(program.flops / chip.flops_per_cycle),
    }
  if math.isnan(xla_cycles):
    row |= {"reason": "XLA estimates no cycles for one of its operations"}
  hbm_bytes = program.hbm_bytes + case.refetched
  seconds = (
    (cycles.total / chip.cores + xla_cycles) / chip.hertz,
    hbm_bytes / chip.hbm_bytes_per_second,
  )
  return row | {
    "microseconds": _whole(1e6 * float(np.max(seconds))),  # NaN if either is
    "hbm_bytes": hbm_bytes,
    "vmem_bytes": program.vmem_bytes,
    "compile_seconds": round(program.compile_seconds, 1),
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
  jit = functools.partial(jax.jit, compiler_options=case.options)
  if case.direction == "backward":
    out, pull = jit(functools.partial(bench_cases.with_pullback, fn))(*args)
    fn, args = bench_cases.call_pullback, (pull, out)
  fn = jit(fn)
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


def compare(rows: Sequence[Row], baselines: Baselines) -> list[Row]:
  """Adds to each row `ratio`, of a figure to the least of its pass's baseline, and `ratio_to`."""
  compared = []
  for row in rows:
    kernel, figure = baselines[row["pass"]]
    known = [r for r in rows if (r["pass"], r["kernel"]) == (row["pass"], kernel) and r[figure]]
    best = min(known, key=lambda r: r[figure], default=None)
    ratio = round(row[figure] / best[figure], 4) if best and row[figure] else None
    compared.append(row | {"ratio": ratio, "ratio_to": best and f"{figure} of {_name(best)}"})
  return compared


def _name(row: Row) -> str:
  return f"{row['kernel']} {row['tile'] or ''}".strip()


# Tables.


def counted_cells(row: Row) -> dict[str, str]:
  """What `count` found, as cells of a table by column."""
  cycles = row["cycles_per_head"]
  return {
    "tile": _cell(row["tile"], "{}"),
    "cycles": _cell(cycles, "{:,}"),
    "MXU busy": _cell(cycles and row["mxu_floor_cycles"] / cycles, "{:.0%}"),
    "+ XLA": _cell(row["xla_cycles_per_head"], "{:,}"),
    "µs": _cell(row["microseconds"], "{:,}"),
    "ratio": _cell(row["ratio"], "{:.2f}"),
    "HBM MB": _cell(row["hbm_bytes"] and row["hbm_bytes"] / 1e6, "{:,.0f}"),
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


def table(rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> Table:
  """Lays rows out for people, pass by pass."""
  out = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
  out.add_column("kernel", no_wrap=True)
  for column in cells(rows[0]):
    out.add_column(column, justify="right", no_wrap=True)
  for direction, of_pass in itertools.groupby(rows, key=lambda row: row["pass"]):
    out.add_section()
    out.add_row(Text(direction, style="bold"))
    for row in of_pass:
      out.add_row("  " + row["kernel"], *cells(row).values())
  return out


def notes(rows: Sequence[Row]) -> Iterator[str]:
  """Yields what to know of single passes and rows."""
  for direction, to in dict.fromkeys((row["pass"], row["ratio_to"]) for row in rows):
    if to:
      yield f"{direction}: ratio to {to.replace('_', ' ')}"
  for row in rows:
    if row["reason"]:
      yield f"{row['pass']}, {_name(row)}: {row['reason']}"


# The command.


def _count_all(shape: Shape, topology: str) -> None:
  calls = [functools.partial(count, case, topology) for case in bench_cases.cases(shape)]
  waiting = track(
    static.fresh_processes(calls),
    description=f"compiling for {topology}",
    total=len(calls),
    console=Console(stderr=True),
    transient=True,
    disable=not sys.stderr.isatty(),
  )
  title = f"{topology}, libtpu {static.libtpu_version()}: {shape}"
  _show(compare(list(waiting), COUNTED), title, counted_cells, _LEGEND)


_LEGEND = f"""\
cycles: of one query head (decode: in one of {SESSIONS} sessions), by the schedule, or by the MXU
  where that takes longer; for XLA dense by XLA's estimate. MXU busy: its share of them.
+ XLA: cycles that XLA's operations around the kernel add, by its estimate.
µs: of the whole program: all cycles on all cores, or HBM at its peak where that takes longer.
HBM MB: traffic of the whole program. VMEM MB: the most that one operation holds."""


def _clock_all(shape: Shape) -> None:
  platform = api.platform()
  if platform == "cpu":
    raise InputError(
      "--device: needs a TPU or a GPU, here is only a CPU; leave it out to count cycles without one"
    )
  on_tpu = bench_cases.cases, CLOCKED_ON_TPU
  on_gpu = bench_cases.gpu_cases, CLOCKED_ON_GPU
  cases, baselines = on_tpu if platform == "tpu" else on_gpu
  rows = compare([clock(case) for case in cases(shape)], baselines)
  title = f"{rows[0]['device']}, median of {_REPEATS} calls: {shape}"
  _show(rows, title, clocked_cells)


def _show(rows: Sequence[Row], title: str, cells, legend: str = "") -> None:
  if _JSON.value:
    for row in rows:
      print(json.dumps(row), flush=True)
    return
  console = Console(width=None if sys.stdout.isatty() else WIDTH)
  console.print(Text(title, style="bold"))
  console.print(table(rows, cells))
  for line in (*notes(rows), *legend.splitlines()):
    console.print(Text(line))
  console.print()


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
  if _DEVICE.value:
    _clock_all(shape)
    return
  for topology in _TOPOLOGY.value:
    chip_of(topology)
  for topology in _TOPOLOGY.value:
    _count_all(shape, topology)


if __name__ == "__main__":
  cli.run(main)
