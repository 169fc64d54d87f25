"""Tests run on the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; commands run by tests inherit it
