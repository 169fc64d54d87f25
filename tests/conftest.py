"""Tests run on the CPU, and may use what lies beside the benchmarks."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; commands run by tests inherit it
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
