"""Tests run on the CPU; those that compile for TPU are skipped without the compiler."""

import importlib.util
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; commands run by tests inherit it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """What the marker says in pyproject.toml."""
  if item.get_closest_marker("tpu_compiler") and not importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is not installed")
