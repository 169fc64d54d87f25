"""Memory that importing and exporting a large Hugging Face checkpoint takes, above the parameters.

  python benchmarks/hub_memory.py [--gigabytes=4]

Makes a Qwen3 checkpoint of that size in bfloat16 and 500 MB shards, of random numbers, in a
temporary directory (which needs four times the room), imports it and exports what was imported,
each in a process of its own.
"""

import json
import multiprocessing
import os
import pathlib
import re
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np
from absl import flags, logging

from msjax import cli
from msjax.config import Config, ModelConfig
from msjax.hub.config import to_hf
from msjax.hub.export import export, open_run
from msjax.hub.import_ import import_checkpoint, read_checkpoint
from msjax.hub.names import tensors
from msjax.hub.weights import Part, write_safetensors
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.state import Learner
from msjax.workdir import WorkDir

_GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "size of the checkpoint in bfloat16")
_SHARD_BYTES = 500 * 10**6
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_VOCAB, _DIM, _MLP = 32_000, 2048, 6144


def main(_) -> None:
  """Prints one line a direction."""
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    size = _make(place / "source", _GIGABYTES.value * 1e9)
    print(f"{size / 1e9:.2f} GB of bfloat16 in shards of {_SHARD_BYTES / 1e9} GB")
    print(f"{'':8}{'peak above start':>18}{'without float32 parameters':>28}{'seconds':>9}")
    for name, act, held in (("import", _import, 2 * size), ("export", _export, 0)):
      peak, seconds = _measured(act, place)
      print(f"{name:8}{peak / 1e9:>15.2f} GB{(peak - held) / 1e9:>25.2f} GB{seconds:>9.0f}")


def _make(folder: pathlib.Path, size: float) -> int:
  """Writes the checkpoint; returns its bytes."""
  folder.mkdir()
  layer = 2 * (2 * _DIM * _DIM + 2 * _DIM * _DIM // 2 + 3 * _DIM * _MLP)
  layers = round((size - 2 * _VOCAB * _DIM) / layer)
  model = ModelConfig(dim=_DIM, layers=layers, heads=16, kv_heads=8, head_dim=128, mlp_dim=_MLP)
  train_bpe(["to be - or not to be"], 300).save(folder / "tokenizer.json")
  (folder / "config.json").write_text(json.dumps(to_hf(model, _VOCAB)))
  config = Config(streams=("text:output",), model=model)
  learner = Learner(config, config.stream_set(0), _VOCAB)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  rng = np.random.default_rng(0)
  draw = lambda shape: 0.02 * rng.standard_normal(shape, np.float32)
  parts = [
    Part(t.name, t.shape, lambda shape=t.shape: draw(shape))
    for t in tensors({name: leaf for name, leaf in like.items() if name != "stream_embed"})
  ]
  shard, written = [], 0
  for i, part in enumerate(parts):
    shard.append(part)
    if i + 1 == len(parts) or sum(p.nbytes(_BFLOAT16) for p in shard) > _SHARD_BYTES:
      write_safetensors(folder / f"model-{written:05}.safetensors", shard, _BFLOAT16)
      shard, written = [], written + 1
  return sum(part.nbytes(_BFLOAT16) for part in parts)


def _import(place: pathlib.Path) -> None:
  checkpoint = read_checkpoint(place / "source", ("user:input", "output:output"))
  import_checkpoint(checkpoint, WorkDir(place / "run"))


def _export(place: pathlib.Path) -> None:
  run = open_run(WorkDir(place / "run"))
  export(run, place / "out", shard_bytes=_SHARD_BYTES)


def _measured(act, place: pathlib.Path) -> tuple[int, float]:
  """Returns peak bytes above the start, and seconds, of a fresh process."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=_child, args=(act, place, theirs))
  process.start()
  theirs.close()
  found = ours.recv()
  process.join()
  return found


def _child(act, place: pathlib.Path, answer) -> None:
  logging.set_verbosity(logging.ERROR)
  jax.devices()
  start, begun = _peak(), time.perf_counter()
  act(place)
  answer.send((_peak() - start, time.perf_counter() - begun))


def _peak() -> int:
  """Largest resident size of this program so far, in bytes; rusage would count its parent's too."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
  cli.run(main)
