"""Tests run on the CPU; those that compile for TPU are skipped without the compiler."""

import importlib.util
import os
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; commands run by tests inherit it
if "PYTEST_XDIST_WORKER" in os.environ:
  os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy and torch: workers have a core each


def pytest_configure(config):
  config.option.loadscopereorder = False  # by which xdist would start files with many tests first


def pytest_collection_modifyitems(items):
  """Files with slow tests come first, lest one worker have them all in the end."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """What the marker says in pyproject.toml."""
  if item.get_closest_marker("tpu_compiler") and not importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Programs of tests are small: LLVM takes longer to optimise them than they take to run.

  What is compiled for TPU is compiled as users compile it.
  """
  jax = sys.modules.get("jax")
  if jax is None or item.get_closest_marker("tpu_compiler"):
    return (yield)
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    return (yield)
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
  """Programs that many tests of a module build anew are compiled for the first of them."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  before = {name: jax.config.values[name] for name in settings}

  def use(values):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  use(settings)
  yield
  use(before)
