"""What a program costs on a TPU that is not there: compile ahead of time, read what comes out.

libtpu (package `libtpu`, part of `jax[tpu]`) compiles for any topology on any machine. The compiled
module tells what XLA's own operations cost (hlo.py), the schedules that libtpu can dump what Pallas
kernels do (schedule.py).
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax.errors import InputError
from msjax.kernels.chips import Chip, chip_of
from msjax.kernels.hlo import parse_module
from msjax.kernels.schedule import Cycles, Kernel, Trips, parse_kernel

Make = Callable[[], tuple[Callable, Sequence[Any]]]  # returns fn, args

_WITHOUT_A_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks Google's metadata server
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two processes fight for a lock
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
_OVERRUN = re.compile(  # before buffers are assigned; after
  r"total memory required.* \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
  r"|Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"
)
_DUMP_SCHEDULES = (
  " --xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
)


def libtpu_version() -> str | None:
  """Returns the version of libtpu, None where it is not installed."""
  try:
    return metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return None


def compile_for(
  fn: Callable,
  args: Sequence[Any],
  topology: str,
  options: Mapping[str, str] | None = None,
  **jit: Any,
) -> jax.stages.Compiled:
  """Compiles `fn(*args)` for the first device of a topology that need not be there.

  Args:
    fn: what to compile.
    args: trees of `jax.ShapeDtypeStruct` or arrays.
    topology: such as `v5e:2x2`.
    options: of the compiler, such as `{"xla_tpu_scoped_vmem_limit_kib": "65536"}`.
    jit: further arguments of `jax.jit`, such as `donate_argnums`.

  Raises:
    InputError: libtpu is not installed, or knows no such topology.
    jax.errors.JaxRuntimeError: it does not compile.
  """
  return _lower_for(fn, args, topology, **jit).compile(options)


def _lower_for(fn: Callable, args: Sequence[Any], topology: str, **jit: Any) -> jax.stages.Lowered:
  device = Mesh(np.array(devices_of(topology)[:1]), ("device",))
  sharding = NamedSharding(device, PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.jit(fn, **jit).lower(*jax.tree.map(place, tuple(args)))


def compile_with_text(
  lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled, str]:
  """Compiles for TPU and returns the optimized HLO as well, which `hlo.parse_module` reads.

  The text is what XLA dumps: `as_text` of the compiled program has jaxlib parse it anew, which
  fails where libtpu is newer than jaxlib and has moved a gather to a SparseCore.

  Args:
    lowered: a function that is jitted over devices of a topology.
    options: of the compiler.

  Raises:
    InputError: this libtpu dumps nothing.
    jax.errors.JaxRuntimeError: it does not compile.
  """
  with tempfile.TemporaryDirectory() as dump:
    dumping = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile({**(options or {}), **dumping})
    texts = sorted(pathlib.Path(dump).glob("*.after_codegen.txt"))
    if not texts:
      raise InputError(
        f"libtpu {libtpu_version()} did not tell jaxlib {metadata.version('jaxlib')} what it "
        f"compiled; install the pair that fits: pip install 'jax[tpu]=={jax.__version__}'"
      )
    return compiled, texts[-1].read_text()


def hbm_overrun(error: Exception) -> tuple[int, int] | None:
  """Reads how much HBM a program needs, and how much there is, where it was too much.

  Args:
    error: what compiling raised.

  Returns:
    Bytes a chip needs and has, to a hundredth of the unit in the message; None if the error tells
    of something else.
  """
  found = _OVERRUN.search(str(error))
  return found and tuple(_bytes(figure) for figure in found.groups() if figure)


def _bytes(text: str) -> int:
  """Of a figure such as 15.75G."""
  return round(float(text.rstrip("KMGT")) * 1024 ** " KMGT".index(text[-1]))


def devices_of(topology: str, slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of slices that need not be there, to compile for.

  Args:
    topology: of a slice, such as `v5e:2x2`.
    slices: of this topology.

  Raises:
    InputError: libtpu is not installed, or knows no such topology.
  """
  chip = chip_of(topology)
  if libtpu_version() is None:
    raise InputError(
      "libtpu, which compiles for TPUs that are not there, is not installed: "
      "pip install -e '.[tpu-compiler]'"
    )
  os.environ.update(_WITHOUT_A_TPU)
  try:
    many = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **many).devices
  except Exception as error:  # of many kinds
    raise InputError(f"topology {topology!r}: {error}; {chip.name}:2x2 would do") from None


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler made of a function.

  Attributes:
    topology: what it was compiled for.
    libtpu: version of the compiler.
    kernels: its Pallas kernels, by name.
    xla_cycles: XLA's own estimate for everything but Pallas kernels, NaN if it has none.
    flops: arithmetic as XLA counts it, and as kernels estimate it.
    hbm_bytes: traffic of all operations, see `hlo.Module`.
    vmem_bytes: the most that one Pallas call holds, or where there is none, one operation.
    temp_bytes: HBM for what is neither argument nor result.
    compile_seconds: time of the compiler.
  """

  topology: str
  libtpu: str
  kernels: Mapping[str, Kernel]
  xla_cycles: float
  flops: float
  hbm_bytes: int
  vmem_bytes: int
  temp_bytes: int
  compile_seconds: float

  @property
  def chip(self) -> Chip:
    """The chip it was compiled for."""
    return chip_of(self.topology)

  def cycles(self, trips: Mapping[str, Trips]) -> Cycles:
    """Counts the cycles of all Pallas kernels.

    Args:
      trips: of every kernel, by what its name contains (JAX adds how it was differentiated): the
        longest that fits. It may name kernels that are not there.

    Raises:
      ValueError: no name fits, or see `Kernel.cycles`.
    """
    total = Cycles()
    for name, kernel in self.kernels.items():
      fitting = [part for part in trips if part in name]
      if not fitting:
        raise ValueError(f"kernel {name}: trips are given for {', '.join(trips) or 'none'}")
      total += kernel.cycles(trips[max(fitting, key=len)], self.chip)
    return total


def measure(make: Make, topology: str, options: Mapping[str, str] | None = None) -> Program:
  """Compiles `fn(*args)` of `make() -> fn, args` for a topology and reads the result.

  It happens in a fresh process; `make` is pickled.

  Args:
    make: returns what `compile_for` takes first.
    topology: such as `v5e:2x2`.
    options: of the compiler.

  Raises:
    InputError: as of `compile_for`, like what follows.
    jax.errors.JaxRuntimeError: it does not compile.
  """
  (program,) = fresh_processes([functools.partial(measure_here, make, topology, options)])
  return program


def fresh_processes(calls: Sequence[Callable[[], Any]]) -> Iterator[Any]:
  """Yields what each call returns, in order; two fresh processes share the work.

  Where a call raises, those that have not begun are dropped.
  """
  fresh = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
  try:
    for future in [fresh.submit(call) for call in calls]:
      yield future.result()
  finally:
    fresh.shutdown(cancel_futures=True)


def measure_here(make: Make, topology: str, options: Mapping[str, str] | None = None) -> Program:
  """What `measure` does, in this process: libtpu must not have been loaded by anything else."""
  jax.config.update("jax_platforms", "cpu")
  dumps = pathlib.Path(_dumps().name)
  for old in dumps.iterdir():
    old.unlink()
  fn, args = make()
  began = time.perf_counter()
  compiled, text = compile_with_text(_lower_for(fn, args, topology), options)
  seconds = time.perf_counter() - began
  module = parse_module(text)
  return Program(
    topology=topology,
    libtpu=libtpu_version(),
    kernels={name: _read_kernel(dumps, name) for name in module.kernels},
    xla_cycles=module.xla_cycles,
    flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
    hbm_bytes=module.hbm_bytes,
    vmem_bytes=module.vmem_bytes or module.xla_vmem_bytes,
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    compile_seconds=seconds,
  )


@functools.cache
def _dumps() -> tempfile.TemporaryDirectory:
  """Where libtpu, which reads its flags but once, writes schedules while this process lives."""
  directory = tempfile.TemporaryDirectory()
  given = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = given + _DUMP_SCHEDULES.format(directory.name)
  return directory


def _read_kernel(dumps: pathlib.Path, name: str) -> Kernel:
  """Reads the dump of one kernel."""
  ours = [path for path in dumps.iterdir() if re.match(rf"\d+-{re.escape(name)}-\d+-", path.name)]
  text = lambda ending: next(p.read_text() for p in ours if re.search(rf"-\d+-{ending}", p.name))
  return parse_kernel(
    name, text("final_bundles.txt"), text("final_hlo-static-per-bundle-utilization.txt")
  )
