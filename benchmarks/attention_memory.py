"""Peak memory of a training step by length: linear, for no array is [L, L].

`python benchmarks/attention_memory.py [--json]`

Hidden 128, 2 layers, vocabulary 4,096, 10 streams, up to 2,048 rows. Every figure is the largest
resident size of a fresh process that takes one step on the CPU, compilation included.
"""

import concurrent.futures
import json
import multiprocessing
import resource
import time

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from msjax import cli
from msjax.config import Config, ModelConfig
from msjax.streams import Stream, Streams
from msjax.training.state import Learner

_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line instead of a table")

STREAMS, VOCAB = 10, 4_096
LENGTHS = (2_560, 5_120, 10_240, 20_480)  # L, in tokens


def measure(length: int, remat: str) -> dict[str, float | str]:
  """Takes one step on one sequence of `length` tokens; call it in a process of its own."""
  jax.config.update("jax_platforms", "cpu")
  imported = _peak_mb()
  model = ModelConfig(dim=128, layers=2, heads=4, kv_heads=2, mlp_dim=384, remat=remat)
  specs = (f"s{i}:internal" for i in range(STREAMS))
  streams = Streams(tuple(map(Stream.parse, specs)), silence_id=0)
  learner = Learner(Config(model=model), streams, VOCAB)
  shape = (1, 1, length // STREAMS, STREAMS)
  batch = {
    "tokens": np.random.default_rng(0).integers(0, VOCAB, shape, np.int32),
    "weights": np.ones(shape, np.float32),
    "segments": np.zeros(shape[:3], np.int32),
  }
  state = jax.jit(learner.init)(jax.random.key(0))
  step = jax.jit(learner.step, donate_argnums=0).lower(state, batch).compile()
  start = time.perf_counter()
  jax.block_until_ready(step(state, batch))
  seconds = time.perf_counter() - start
  peak = _peak_mb()
  return {
    "tokens": length,
    "remat": remat,
    "peak_mb": peak,
    "above_imports_mb": peak - imported,
    "mb_per_1000_tokens": (peak - imported) / length * 1_000,
    "step_seconds": seconds,
  }


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def table(figures: list[dict[str, float | str]]) -> Table:
  """Lays figures out for people."""
  out = Table(title=f"One training step on L tokens, {STREAMS} streams")
  for column in ("remat", "L", "peak MB", "above imports MB", "MB / 1,000 tokens", "step s"):
    out.add_column(column, justify="right")
  for f in figures:
    out.add_row(
      f["remat"],
      f"{f['tokens']:,}",
      f"{f['peak_mb']:,.0f}",
      f"{f['above_imports_mb']:,.0f}",
      f"{f['mb_per_1000_tokens']:.0f}",
      f"{f['step_seconds']:.1f}",
    )
  return out


def main(_) -> None:
  """Measures every length under every remat policy, one process after another."""
  context = multiprocessing.get_context("spawn")
  figures = []
  with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as fresh:
    for remat in ("none", "dots", "full"):
      for length in LENGTHS:
        figures.append(fresh.submit(measure, length, remat).result())
        if _JSON.value:
          print(json.dumps(figures[-1]))
  if not _JSON.value:
    Console().print(table(figures))


if __name__ == "__main__":
  cli.run(main)
