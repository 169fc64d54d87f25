"""A profiler trace of some steps, for XProf, TensorBoard or Perfetto."""

import pathlib
import re
from importlib import metadata
from typing import Any

import jax
from absl import logging

from msjax.errors import InputError
from msjax.kernels.static import libtpu_version


class Trace:
  """Traces the steps from `first` to `last`, as far as this process takes them.

  Process 0 alone traces. A trace shows the devices of one host, all hosts run the same program, and
  each more would be its own folder, for names go by the second in which a host began. A context
  manager: a run that ends in between leaves what there is.
  """

  def __init__(self, directory: pathlib.Path, first: int, last: int):
    """Names the directory to be made, and the steps; 0 and 0 for none.

    Raises:
      InputError: the profiler would end the process.
    """
    self.directory, self.first, self.last = directory, first, last
    self._traces = first > 0 and jax.process_index() == 0
    self._running = False
    if self._traces:
      _check_libtpu()

  def __enter__(self) -> "Trace":
    """Returns itself."""
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Ends a trace that is running."""
    if self._running:
      self._stop()

  def begin(self, step: int) -> None:
    """A step is about to get its batch."""
    if self._traces and not self._running and self.first <= step <= self.last:
      logging.info("tracing steps %d to %d", step, self.last)
      jax.profiler.start_trace(self.directory)
      self._running = True

  def end(self, step: int, result: Any) -> None:
    """A step has been dispatched; after the last one, waits for the arrays in `result`."""
    if self._running and step == self.last:
      jax.block_until_ready(result)
      self._stop()

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
    logging.info("the trace is in %s", self.directory)


def _check_libtpu() -> None:
  """The profiler of a libtpu that jax was not built for takes the process down."""
  found = libtpu_version()
  built_for = re.search(r"^libtpu==([\d.]+)\.\*", "\n".join(metadata.requires("jax")), re.MULTILINE)
  loads_it = "tpu" in (jax.config.jax_platforms or "tpu")  # by default jax looks for TPUs too
  if loads_it and found and built_for and not f"{found}.".startswith(f"{built_for[1]}."):
    raise InputError(
      f"config.train.profile_first_step: libtpu {found} is installed, and its profiler crashes "
      f"under jax {jax.__version__}; expected {built_for[1]}.*, by pip install 'jax[tpu]'; or set "
      "JAX_PLATFORMS=cpu where there is no TPU"
    )
