"""Rows a second by streams and sessions, and how near memory's speed that is.

`python benchmarks/decode.py [--model=58m] [--streams=1,2,4,10,16] [--sessions=1,8,32]
[--repeats=20] [--json]`

Sessions of one model write greedy rows into caches of 512 cells that are half full. A tick must
read the layers, the output matrix and the cells that are filled; the least it can take is these
bytes at the speed of a product of a matrix of 1 GiB with a vector, in the same dtype and run. Then
a prompt of 100 rows is read in blocks, and row by row. Medians; what stands side by side is timed
in turn, so that a busy machine slows all alike.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from msjax import cli
from msjax.config import Config, ModelConfig
from msjax.decoding.engine import Engine
from msjax.decoding.prepared import Prepared, prepare
from msjax.decoding.session import RUNNING, Stop
from msjax.errors import InputError
from msjax.models.presets import preset
from msjax.streams import Stream, Streams
from msjax.training.state import Learner

_MODEL = flags.DEFINE_string("model", "58m", "58m, tiny or a preset of msjax/models/presets.py")
_STREAMS = flags.DEFINE_list("streams", ["1", "2", "4", "10", "16"], "streams of the model")
_SESSIONS = flags.DEFINE_list("sessions", ["1", "8", "32"], "sessions at once")
_REPEATS = flags.DEFINE_integer("repeats", 20, "timed ticks", 1, 100)
_AT_ONCE = flags.DEFINE_integer("rows_at_once", 32, "of a prompt that is read in", 1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of tables")

CELLS, PROMPT = 512, 100  # of a session's cache; rows
MATRIX_BYTES, COLUMNS = 1 << 30, 4_096
PREFILLS = 5  # repeats at most: reading row by row takes as long as a hundred ticks
SIZES = {
  "58m": ModelConfig(
    dim=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_dim=1536, vocab_size=32_000
  ),
  "tiny": ModelConfig(
    dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=192, vocab_size=1_000
  ),
}

Figures = list[dict[str, float]]


class Ticks:
  """Sessions that are all in the middle of their caches."""

  def __init__(self, model: Prepared, sessions: int):
    """Fills half of every cache; nothing is compiled after that."""
    rows = CELLS // len(model.trunk.streams)
    self.model, self.sessions = model, sessions
    self._engine = Engine(model, sessions, rows, rows_at_once=rows // 2)
    self._read(prompt(model, rows // 2), Stop(rows=rows))
    self.run()

  def run(self) -> None:
    """Takes a tick; where caches are full, their sessions make room for others first."""
    if not self._engine.sessions:
      self._read(self._prompt, self._stop)
    self._engine.step()

  def _read(self, rows, stop):
    self._prompt, self._stop = rows, stop
    for _ in range(self.sessions):
      session = self._engine.join(rows, stop=stop)
      while session.status != RUNNING:
        self._engine.step()
      session.pause()
    for session in self._engine.sessions:
      session.resume()

  @property
  def bytes_to_read(self) -> int:
    """By a tick, at least."""
    cells = sum(len(s.rows) for s in self._engine.sessions) * len(self.model.trunk.streams)
    cfg, itemsize = self.model.trunk.cfg, self.model.unembed.dtype.itemsize
    weights = sum(x.nbytes for x in jax.tree.leaves((self.model.layers, self.model.unembed)))
    return weights + cells * cfg.layers * 2 * cfg.kv_heads * cfg.head_dim * itemsize


def made(cfg: ModelConfig, count: int) -> Prepared:
  """A model of so many streams, random weights."""
  streams = Streams(tuple(Stream.parse(f"s{i}:internal") for i in range(count)), silence_id=0)
  learner = Learner(Config(model=cfg), streams, cfg.vocab_size)
  return prepare(learner.model(jax.jit(learner.init)(jax.random.key(0)).params))


def prompt(model: Prepared, rows: int) -> np.ndarray:
  """Random rows int32 [rows, S]."""
  shape = rows, len(model.trunk.streams)
  return np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)


def memory(dtype: jnp.dtype) -> tuple[int, Callable[[], Any]]:
  """Bytes, and what reads them once: the product of a matrix and a vector."""
  rows = MATRIX_BYTES // (COLUMNS * jnp.dtype(dtype).itemsize)
  matrix, vector = jnp.ones((rows, COLUMNS), dtype), jnp.ones(COLUMNS, dtype)
  product = jax.jit(jnp.matmul)
  return matrix.nbytes, lambda: product(matrix, vector).block_until_ready()


def time_ticks(model: Prepared) -> Figures:
  """Times ticks of as many sessions as are asked for, each in turn with the memory's speed."""
  all_ticks = [Ticks(model, int(sessions)) for sessions in _SESSIONS.value]
  size, read = memory(model.unembed.dtype)
  runs = {"memory": read} | {ticks.sessions: ticks.run for ticks in all_ticks}
  to_read = {ticks.sessions: ticks.bytes_to_read for ticks in all_ticks}
  medians = timed(runs, _REPEATS.value)
  bytes_per_second = size / medians["memory"]
  S = len(model.trunk.streams)
  return [
    {
      "streams": S,
      "sessions": B,
      "ms": medians[B] * 1e3,
      "rows_per_second": B / medians[B],
      "tokens_per_second": B * S / medians[B],
      "mb_to_read": to_read[B] / 1e6,
      "gb_per_second": bytes_per_second / 1e9,
      "share_of_bound": to_read[B] / bytes_per_second / medians[B],
    }
    for B in runs
    if B != "memory"
  ]


def time_prompts(model: Prepared) -> dict[str, float]:
  """Times reading a prompt, in blocks and row by row."""
  rows = prompt(model, PROMPT)
  engine = Engine(model, rows=2 * PROMPT + _AT_ONCE.value, rows_at_once=_AT_ONCE.value)

  def read(**given):
    session = engine.join(stop=Stop(rows=PROMPT), **given)
    while session.status != RUNNING or len(session.rows) < PROMPT:
      engine.step()
      if session.reason:
        break
    session.end("read")

  runs = {"blocks": lambda: read(prompt=rows), "rows": lambda: read(script=rows)}
  medians = timed(runs, min(_REPEATS.value, PREFILLS))
  return {
    "streams": len(model.trunk.streams),
    "blocks_ms": medians["blocks"] * 1e3,
    "rows_ms": medians["rows"] * 1e3,
    "ratio": medians["rows"] / medians["blocks"],
  }


def timed(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
  """Median seconds of each, run in turn; a first round compiles and is not counted."""
  seconds = {name: [] for name in runs}
  for _ in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def tables(ticks: Figures, prompts: Figures, conditions: str) -> list[Table]:
  """Lays figures out for people."""
  of_ticks = Table(title="A row of every session", caption=conditions)
  columns = (
    "streams",
    "sessions",
    "ms",
    "rows/s",
    "tokens/s",
    "x 1st",
    "MB to read",
    "GB/s",
    "share",
  )
  for column in columns:
    of_ticks.add_column(column, justify="right")
  for figures in ticks:
    first = next(f for f in ticks if f["streams"] == figures["streams"])
    of_ticks.add_row(
      f"{figures['streams']}",
      f"{figures['sessions']}",
      f"{figures['ms']:,.2f}",
      f"{figures['rows_per_second']:,.1f}",
      f"{figures['tokens_per_second']:,.0f}",
      f"{figures['rows_per_second'] / first['rows_per_second']:.2f}x",
      f"{figures['mb_to_read']:,.0f}",
      f"{figures['gb_per_second']:,.1f}",
      f"{figures['share_of_bound']:.0%}",
    )
  of_prompts = Table(title=f"A prompt of {PROMPT} rows")
  for column in ("streams", f"{_AT_ONCE.value} rows at once, ms", "row by row, ms", "ratio"):
    of_prompts.add_column(column, justify="right")
  for f in prompts:
    cells = f"{f['blocks_ms']:,.1f}", f"{f['rows_ms']:,.1f}", f"{f['ratio']:.1f}x"
    of_prompts.add_row(f"{f['streams']}", *cells)
  return [of_ticks, of_prompts]


def main(_) -> None:
  """Times and prints."""
  wrong = [n for n in (*_STREAMS.value, *_SESSIONS.value) if not (n.isdigit() and int(n))]
  if wrong:
    raise InputError(f"--streams, --sessions: {wrong[0]!r}; expected numbers from 1, as in 1,8,32")
  cfg = SIZES.get(_MODEL.value) or preset(_MODEL.value)
  device, ticks, prompts = jax.devices()[0], [], []
  for count in map(int, _STREAMS.value):
    model = made(cfg, count)
    ticks += time_ticks(model)
    prompts.append(time_prompts(model))
  conditions = (
    f"{_MODEL.value}, {model.unembed.dtype}, caches of {CELLS} cells, half full, medians of "
    f"{_REPEATS.value}; MB: of weights and filled cells; GB/s: a product of a matrix of 1 GiB with "
    "a vector, in turn with the ticks; share: MB at that speed over ms; "
    f"{device.device_kind}, {os.cpu_count()} CPUs, load after {os.getloadavg()[0]:.1f}, "
    f"jax {jax.__version__}"
  )
  if _JSON.value:
    print(json.dumps({"conditions": conditions, "ticks": ticks, "prompts": prompts}))
  else:
    for table in tables(ticks, prompts, conditions):
      Console().print(table)


if __name__ == "__main__":
  cli.run(main)
