"""`python -m msjax.compile`: what it prints, and how it ends."""

import json
import os
import subprocess
import sys

import forked
import pytest

CONFIG = """
from msjax.config import *

def get_config():
  return Config(
    streams=("user:input", "think:internal", "output:output"),
    model=ModelConfig(dim=256, heads=4, kv_heads=4, head_dim=64, mlp_dim=512),
    data=DataConfig(source="arithmetic", rows=40),
    train=TrainConfig(batch=8, eval_batches=1),
  )
"""
WITHOUT_LIBTPU = """
import runpy
from msjax.kernels import static
static.libtpu_version = lambda: None
runpy.run_module("msjax.compile", run_name="__main__")
"""
KEYS = {
  *("program", "topology", "chips", "mesh", "batch", "tokens", "remat", "fits", "short_by"),
  *("capacity", "hbm_per_chip_bytes", "hbm_bytes", "hbm_bytes_min", "xla_ms", "kernels"),
  *("collectives", "compile_seconds"),
}
TOO_LARGE = (
  "--topology=v5e:2x2",
  "--config.model.layers=20_000",
  "--config.model.mlp_dim=8192",
  "--config.model.remat=attention",
)


@pytest.fixture
def command(tmp_path):
  """Runs the command with flags; `script` stands in for it."""
  path = tmp_path / "run.py"
  path.write_text(CONFIG)

  def call(*flags, script=None):
    words, env = (f"--config={path}", *flags), {**os.environ, "COLUMNS": "80"}
    if not script:
      return forked.run("msjax.compile", *words, env=env, timeout=600)
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)

  return call


@pytest.mark.tpu_compiler
def test_decoding_is_told_in_json(command):
  done = command(
    *("--topology=v5e:2x2", "--program=decode", "--json"),
    *("--config.mesh.model=4", "--sessions=2", "--rows=1000"),
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert set(told) == KEYS
  assert (told["program"], told["fits"], told["mesh"]) == ("decode", True, {"model": 4})
  assert (told["batch"], told["tokens"]) == (2, 6)
  assert set(told["hbm_per_chip_bytes"]) == {"arguments", "temporaries"}
  assert 0 < told["hbm_bytes_min"] < told["hbm_per_chip_bytes"]["arguments"]
  assert told["collectives"][0]["kind"] and told["xla_ms"] > 0 < told["compile_seconds"]


@pytest.mark.tpu_compiler
def test_training_is_told_in_tables(command):
  done = command("--topology=v5e:2x2", "--num_slices=2")
  assert done.returncode == 0, done.stderr
  title, _, memory, fits, *facts = (" ".join(line.split()) for line in done.stdout.splitlines())
  assert title == (
    "train on 8 chips of v5e:2x2 (slices 2 x fsdp 4): 8 sequences, 960 tokens a step"
  )
  assert memory.startswith("memory a chip") and "GiB of 15.75: arguments" in memory
  assert fits == "fits yes"
  assert facts[0] == "kept for the backward pass dots"
  assert facts[1].endswith(" ms, without collectives and kernels")
  assert facts[2].startswith("memory traffic 0.") and facts[2].endswith(" GB")
  assert facts[3] == "Pallas kernels stream_backward, stream_forward"
  assert facts[4].startswith("compiled in ")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
  ("words", "advice"),
  [
    (
      ("--config.model.layers=300", "--config.data.rows=8000"),
      "more chips, a larger --config.train.micro_batches, a smaller --config.data.rows or "
      "--config.model.remat=full",
    ),
    (
      ("--config.model.layers=20_000",),
      "more chips, for parameters and optimizer alone are too much",
    ),
  ],
)
def test_a_program_that_does_not_fit_ends_with_status_1_and_advice(command, words, advice):
  done = command(*TOO_LARGE, *words, "--config.train.batch=16")
  assert done.returncode == 1, done.stderr
  assert done.stdout.startswith("train on 4 chips of v5e:2x2 (fsdp 4): 16 sequences")
  told = " ".join(done.stdout.split())
  assert f" GiB too much: {advice} kept for the backward pass attention" in told
  assert "XLA" not in told  # it was not compiled to the end


@pytest.mark.tpu_compiler
def test_where_no_batch_fits_the_smallest_is_told(command):
  done = command(*TOO_LARGE, "--search=batch", "--json")
  assert done.returncode == 1, done.stderr
  told = json.loads(done.stdout)
  assert set(told) == KEYS
  assert (told["fits"], told["batch"], told["xla_ms"]) == (False, 4, None)
  needed = sum(told["hbm_per_chip_bytes"].values())
  assert told["short_by"] == needed - told["capacity"] > 0


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_the_largest_batch_fits_and_one_more_does_not(command):
  flags = (
    *("--topology=v5e:1x1", "--json", "--config.data.rows=1024", "--config.model.layers=1250"),
    *("--config.model.dim=512", "--config.model.heads=1", "--config.model.kv_heads=1"),
    *("--config.model.head_dim=128", "--config.model.mlp_dim=128", "--config.model.remat=full"),
  )
  done = command(*flags, "--search=batch")
  assert done.returncode == 0, done.stderr
  largest = json.loads(done.stdout)
  assert largest["fits"]
  done = command(*flags, f"--config.train.batch={largest['batch'] + 1}")
  assert done.returncode == 1
  assert not json.loads(done.stdout)["fits"]


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    ((), "--topology: not given; expected a slice, as in v5e:8x8"),
    (
      ("--topology=v6:2x2",),
      "topology 'v6:2x2': expected one of v5e, v5p, v6e and a shape, as in v5e:2x2; did you mean "
      "'v6e'?",
    ),
    pytest.param(
      ("--topology=v5e:3x77",),
      "; v5e:2x2 would do",
      marks=pytest.mark.tpu_compiler,
    ),
    pytest.param(
      ("--topology=v5e:2x4", "--config.mesh.model=8"),
      "config.model.kv_heads: 4 cannot be dealt out to 8 chips (config.mesh.model); expected "
      "4 chips",
      marks=pytest.mark.tpu_compiler,
    ),
    (
      ("--topology=v5e:2x2", "--program=decode", "--search=batch"),
      "--search: batch is for --program=train; leave it out",
    ),
    (
      ("--topology=v5e:2x2", "--sessions=2"),
      "--sessions: 2 is for --program=decode; leave it out",
    ),
  ],
)
def test_what_a_user_got_wrong_is_one_line_and_status_2(command, flags, line):
  done = command(*flags)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("msjax.compile: error: ") and done.stderr.endswith(f"{line}\n")
  assert done.stderr.count("\n") == 1


def test_without_libtpu_it_is_told_what_to_install(command):
  done = command("--topology=v5e:2x2", script=WITHOUT_LIBTPU)
  assert (done.returncode, done.stdout) == (2, "")
  assert "is not installed: pip install -e '.[tpu-compiler]'" in done.stderr
  assert done.stderr.count("\n") == 1
