"""Configs and records for tests of `python -m msjax.train`, and the environment of its commands."""

import json
import os
import re

import pytest

DEADLINE = 180  # seconds, for anything that is waited for
CONFIG = """
from msjax.config import *

def get_config():
  return Config(
    streams=("user:input", "output:output"),
    model=ModelConfig(
      dim=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, attention_dropout=0.2
    ),
    data=DataConfig(train="train.jsonl", valid="valid.jsonl", rows=16, pack=True),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(
      steps=100, batch=8, micro_batches=2, eval_every=45, save_every=20, log_every=1
    ),
  )
"""
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d  ")


SUMS = """
import run

def get_config():
  return run.get_config().changed({
    "streams": ("user:input", "think:internal", "output:output"),
    "same_row": "inputs",
    "data.source": "arithmetic",
    "data.train": "",
    "data.valid": "",
    "data.end_token": False,
    "data.pack": False,
    "train.steps": 3,
    "train.eval_batches": 1,
    "report": "arithmetic",
    "baseline": {"streams": ("chat:output",), "data.chat": True, "data.rows": 24},
  })
"""


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
  """Commands compile the same few programs: once, and not for speed. They start without torch,
  which tensorboardX imports where it is installed and which takes long."""
  no_torch = tmp_path_factory.mktemp("no_torch")
  (no_torch / "torch.py").write_text("raise ImportError")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(no_torch), prepend=os.pathsep)
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    yield


def write(path, *records):
  lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
  path.write_text("".join(line + "\n" for line in lines))


def chat(number, **fields):
  """Messages; the assistant answers 2 seconds after the user."""
  said = f"quark {number} with bread"
  return {
    "messages": [
      {"role": "user", "content": said, "time": 0},
      {"role": "assistant", "content": said.upper(), "time": 2, **fields},
    ]
  }


def complaints(stderr):
  """What a command says apart from its log."""
  return [line for line in stderr.splitlines() if not LOG_LINE.match(line)]
