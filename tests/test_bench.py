"""The bench: how often regions run, what figures are compared with, what people read, and times."""

import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental import pallas as pl
from rich.console import Console

from msjax.errors import InputError
from msjax.kernels import api, bench, bench_cases, static
from msjax.kernels.bench_cases import PASSES, SESSIONS, Shape

SHAPE = Shape(length=1500, streams=10, heads=4, kv_heads=2, head_dim=128, dtype="bfloat16")
TINY = Shape(length=60, streams=5, heads=2, kv_heads=2, head_dim=64, dtype="float32")


def trips_of(shape, kernel, direction, tile=None):
  (case,) = (
    case
    for case in bench_cases.cases(shape)
    if (case.kernel, case.direction, case.tile) == (kernel, direction, tile)
  )
  return case.trips()


def blocks(shape, size):
  """How many blocks are seen in part and as a whole."""
  see = np.pad(np.asarray(shape.visibility().dense())[0], [(0, -shape.length % size)] * 2, "edge")
  n = see.shape[0] // size
  see = see.reshape(n, size, n, size)
  whole = see.all((1, 3)).sum()
  return see.any((1, 3)).sum() - whole, whole


# How often regions run.


def test_our_kernels_visit_what_is_seen():
  partial, whole = blocks(SHAPE, 512)
  trips = trips_of(SHAPE, "msjax", "forward")
  stacks = SHAPE.kv_heads  # two heads a stack
  own = 3  # blocks that hold their queries' own keys, of which none sees a later one
  others = partial - own, whole
  assert partial > own  # for 512 cells are no whole rows
  assert trips["stream_forward"].bodies == tuple(stacks * n for n in (own, 0, *others))
  assert trips["stream_backward"].bodies == tuple(SHAPE.heads * n for n in (own, *others))


def test_splash_visits_the_triangle():
  (trips,) = trips_of(SHAPE, "splash streams", "forward", 512).values()
  assert trips.bodies == (SHAPE.heads * sum(blocks(SHAPE, 512)),)
  assert trips.steps == SHAPE.heads * 9


def test_decoding_visits_the_cache():
  (trips,) = trips_of(SHAPE, "msjax", "decode").values()
  assert trips.bodies == (SESSIONS, SESSIONS, SESSIONS)  # a row, 1,024 cells, and 476
  assert trips.steps == 2 * SESSIONS


# What figures are compared with.


def row(kernel, direction="forward", tile=None, reason=None, **figures):
  counts = dict.fromkeys(bench._COUNTS) | figures
  return {"kernel": kernel, "pass": direction, "tile": tile, "reason": reason} | counts


ROWS = [
  row("msjax", cycles_per_head=59_379, mxu_floor_cycles=52_480, hbm_bytes=52_600_000),
  row("splash causal", tile=512, cycles_per_head=103_656, mxu_floor_cycles=56_320),
  row("splash causal", tile=1024, cycles_per_head=83_046, mxu_floor_cycles=61_440),
  row("splash streams fused", tile=1024, reason="it does not compile"),
  row("XLA dense", "backward", cycles_per_head=2_683_442, mxu_floor_cycles=208_008),
  row("msjax", "decode", cycles_per_head=959, mxu_floor_cycles=328, microseconds=214),
  row("XLA dense", "decode", cycles_per_head=32_337, mxu_floor_cycles=208, microseconds=2_759),
]


def test_ratios_are_to_the_best_tile():
  compared = bench.compare(ROWS, bench.COUNTED)
  assert [r["ratio"] for r in compared] == [0.715, 1.2482, 1, None, None, 0.0776, 1]
  assert compared[1]["ratio_to"] == "cycles_per_head of splash causal 1024"
  assert compared[4]["ratio_to"] is None
  assert compared[5]["ratio_to"] == "microseconds of XLA dense"


# What people read.


def printed(rows, cells):
  out = io.StringIO()
  Console(width=bench.WIDTH, file=out).print(bench.table(rows, cells))
  return out.getvalue()


def test_a_table_fits_with_all_words():
  widest = row(
    "splash streams fused",
    tile=1024,
    cycles_per_head=2_683_442,
    mxu_floor_cycles=2_683_442,
    xla_cycles_per_head=196_053,
    microseconds=114_312,
    hbm_bytes=96_763_642_884,
    vmem_bytes=130_187_520,
  )
  rows = bench.compare([*ROWS, widest], bench.COUNTED)
  text = printed(rows, bench.counted_cells)
  words = [*PASSES, "splash streams fused", "96,764", *bench.counted_cells(rows[0])]
  assert [word for word in words if word not in text] == []
  assert "…" not in text
  assert max(map(len, text.splitlines())) <= bench.WIDTH


def test_notes_are_a_line_each():
  assert list(bench.notes(bench.compare(ROWS, bench.COUNTED))) == [
    "forward: ratio to cycles per head of splash causal 1024",
    "decode: ratio to microseconds of XLA dense",
    "forward, splash streams fused 1024: it does not compile",
  ]
  assert max(map(len, bench._LEGEND.splitlines())) <= bench.WIDTH


# The command.


@pytest.fixture
def command():
  """Calls the bench for a tiny shape, with flags."""
  flags.FLAGS(["bench"])

  def call(**values):
    with flagsaver.flagsaver(**dataclasses.asdict(TINY) | values):
      bench.main([])

  return call


@pytest.mark.parametrize(
  ("values", "sentence"),
  [
    ({"heads": 7}, "^--heads: 7; expected a multiple of --kv_heads, 2$"),
    ({"topology": ["v5e:2x2", "v9:2x2"]}, "^topology 'v9:2x2': expected one of v5e, v5p, v6e "),
    ({"device": True}, "^--device: needs a TPU or a GPU, here is only a CPU; leave it out "),
  ],
)
def test_wrong_flags_are_told(command, values, sentence):
  with pytest.raises(InputError, match=sentence):
    command(**values)


@pytest.fixture
def on_tpu(monkeypatch):
  """As if there were a TPU: kernels are interpreted, and as small as they come."""
  monkeypatch.setattr(api, "platform", lambda: "tpu")
  monkeypatch.setattr(bench_cases, "TILES", (128,))
  monkeypatch.setattr(bench_cases, "FUSED_TILE", 128)
  monkeypatch.setattr(bench_cases, "SESSIONS", 2)
  # Compiling takes most of the time here, and LLVM's optimisation most of that.
  for options in ("_IN_HBM", "_ROOM"):
    monkeypatch.setattr(bench_cases, options, {"xla_backend_optimization_level": 0})
  call = pl.pallas_call
  interpreted = lambda *args, **how: call(*args, **how | {"interpret": True})
  monkeypatch.setattr(pl, "pallas_call", interpreted)


def times(command, capsys):
  command(device=True, json=True)
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_device_times_all_kernels_on_tpu(on_tpu, monkeypatch, command, capsys):
  monkeypatch.setattr(bench, "_REPEATS", 1)
  rows = times(command, capsys)
  assert [(r["kernel"], r["pass"]) for r in rows] == [
    (case.kernel, case.direction) for case in bench_cases.cases(TINY)
  ]
  assert {r["device"] for r in rows} == {jax.devices()[0].device_kind}
  assert [r["reason"] for r in rows if not r["milliseconds"]] == []


def test_device_times_xla_on_gpu(monkeypatch, command, capsys):
  monkeypatch.setattr(api, "platform", lambda: "gpu")
  rows = times(command, capsys)
  assert [(r["kernel"], r["pass"]) for r in rows] == [
    ("XLA chunked", "forward"),
    ("XLA dense", "forward"),
    ("XLA chunked", "backward"),
    ("XLA dense", "backward"),
    ("XLA dense", "decode"),
  ]
  assert all(r["ratio"] == 1 for r in rows if r["kernel"] == "XLA dense")
  command(device=True)
  assert "median of 20 calls: 60 cells, 5 streams" in capsys.readouterr().out


@pytest.mark.tpu_compiler
def test_what_does_not_run_is_a_line_with_a_reason(command, capsys):
  shape = dataclasses.replace(TINY, heads=9, kv_heads=1)  # more than our kernels group
  measured = [case for case in bench_cases.cases(shape) if case.direction == "forward"]
  ours, *_, dense = [functools.partial(bench.count, case, "v5e:2x2") for case in measured]
  refused, counted = static.fresh_processes([ours, dense])
  assert refused["reason"].startswith("k: 1 heads;")
  assert refused["cycles_per_head"] is None
  assert counted["cycles_per_head"] > 0
  assert counted["microseconds"] > 0
  assert counted.keys() == refused.keys()
