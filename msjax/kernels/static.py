"""What a program costs on a TPU that is not there: compile ahead of time, read the schedule.

libtpu (package `libtpu`, part of `jax[tpu]`) compiles for any topology on any machine and can dump
the final program of every kernel: a list of bundles, each one cycle if nothing stalls. A kernel's
cycles are counted in three steps.

1. Branches cut the program into regions (basic blocks), loops (a branch back) and guards (a branch
   forward: what it jumps over).
2. The MXU cannot take matrix products as fast as the scheduler believes, so a region costs at least
   `vmatmul instructions x cycles each / number of MXUs` (see `Chip`): the larger counts.
3. How often a region runs may depend on data, so `Trips` says it:
   - a region outside of the grid's loop runs once;
   - a region with matrix products runs as `Trips.bodies` says, in program order;
   - a region of an inner loop runs as often as the bodies of that loop together;
   - a region that stores vectors, under a guard without matrix products (`pl.when(first block)`),
     runs `Trips.edges` times;
   - everything else runs once a grid step.

DMA stalls, bank conflicts and links between chips are not covered: compare figures, promise none.
Compare them within one version of libtpu only.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
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

from msjax.errors import InputError, nearest

Make = Callable[[], tuple[Callable, Sequence[Any]]]  # returns fn, args

_DELAY_SLOTS = 4  # bundles after a branch that run whether or not it is taken


# Chips.


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a TPU generation.

  A `vmatmul` streams one register through an MXU: 16 rows of bfloat16 or, at half the time, 8 of
  float32. Peak arithmetic settles how long that takes: on v5e 197 TFLOP/s at 1.5 GHz are 131,072 a
  cycle, that is four MXUs of 128 x 128, each with a row a cycle; on v6e 918 at 1.75 GHz are
  524,288, two MXUs of 256 x 256 with two rows a cycle. The schedules agree: they never put two
  `vmatmul` of one MXU closer for long.

  Attributes:
    name: as topologies are called, without the shape.
    mxus: matrix units.
    vmatmul_cycles: time of one bfloat16 `vmatmul`.
    mxu_side: rows and columns of a matrix unit.
    hertz: clock.
    cores: TensorCores of a chip; kernels split their grid over them.
    hbm_bytes_per_second: of the chip.
  """

  name: str
  mxus: int
  vmatmul_cycles: int
  mxu_side: int
  hertz: float
  cores: int
  hbm_bytes_per_second: float

  @property
  def flops_per_cycle(self) -> float:
    """Peak bfloat16 arithmetic of one core."""
    return self.mxus * 2 * self.mxu_side**2 * 16 / self.vmatmul_cycles


CHIPS = {
  "v5e": Chip("v5e", 4, 16, 128, 1.5e9, 1, 819e9),
  "v5p": Chip("v5p", 4, 16, 128, 1.75e9, 2, 2765e9),
  "v6e": Chip("v6e", 2, 8, 256, 1.75e9, 1, 1640e9),
}


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology such as `v5e:2x2`."""
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise InputError(
      f"topology {topology!r}: expected one of {', '.join(CHIPS)} and a shape, as in v5e:2x2"
      f"{nearest(name, CHIPS)}"
    )
  return CHIPS[name]


# Programs and their cycles.


@dataclasses.dataclass(frozen=True)
class Region:
  """A stretch of bundles that run one after another.

  Attributes:
    start: address of the first bundle.
    bundles: how many there are.
    loops: starts of the loops around it, outermost first; the first is the grid's.
    vmatmuls: `vmatmul` instructions, those of float32 counted half.
    edge: whether it stores vectors under a guard that holds no matrix products.
    slots: instructions by slot (`VALU`, `VLOAD:FILL`, `VSTORE:SPILL`, ...).
  """

  start: int
  bundles: int
  loops: tuple[int, ...] = ()
  vmatmuls: float = 0
  edge: bool = False
  slots: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def mxu_cycles(self, chip: Chip) -> float:
    """Returns the least time its matrix products take."""
    return self.vmatmuls * chip.vmatmul_cycles / chip.mxus


@dataclasses.dataclass(frozen=True)
class Trips:
  """How often regions of a kernel run in one call; the rules stand at the top of this file.

  Attributes:
    steps: steps of the grid.
    bodies: one count for each region with matrix products, in program order.
    edges: how often regions under `pl.when` run, such as the first and last block of a row.
  """

  steps: int
  bodies: tuple[int, ...]
  edges: int = 0


@dataclasses.dataclass(frozen=True)
class Cycles:
  """Time of a kernel: `total` by the schedule and the MXU, `mxu_floor` by the MXU alone."""

  total: float
  mxu_floor: float
  schedule: float


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The final program of one kernel."""

  name: str
  regions: tuple[Region, ...]

  @property
  def bodies(self) -> tuple[Region, ...]:
    """Regions with matrix products, in program order."""
    return tuple(r for r in self.regions if r.vmatmuls)

  @property
  def spills(self) -> int:
    """Registers spilled by regions with matrix products."""
    return sum(r.slots.get("VSTORE:SPILL", 0) for r in self.bodies)

  def cycles(self, trips: Trips, chip: Chip) -> Cycles:
    """Counts the cycles of one call, of all cores together.

    Raises:
      ValueError: there are not as many bodies as `trips` counts.
    """
    times = self._times(trips)
    return Cycles(
      total=sum(n * max(r.bundles, r.mxu_cycles(chip)) for n, r in zip(times, self.regions)),
      mxu_floor=sum(n * r.mxu_cycles(chip) for n, r in zip(times, self.regions)),
      schedule=sum(n * r.bundles for n, r in zip(times, self.regions)),
    )

  def _times(self, trips: Trips) -> list[int]:
    """How often each region runs."""
    if len(self.bodies) != len(trips.bodies):
      found = ", ".join(f"{r.bundles} bundles at {r.start:#x}" for r in self.bodies)
      raise ValueError(
        f"kernel {self.name}: trips.bodies has {len(trips.bodies)} counts, but the program has "
        f"{len(self.bodies)} regions with matrix products: {found}"
      )
    body_trips = dict(zip((r.start for r in self.bodies), trips.bodies))

    def times(region: Region) -> int:
      if region.start in body_trips:
        return body_trips[region.start]
      if region.edge:
        return trips.edges
      inner = set(region.loops[1:])
      shared = [body_trips[r.start] for r in self.bodies if inner and inner & set(r.loops)]
      if inner and shared:
        return sum(shared)
      return trips.steps if region.loops else 1

    return [times(region) for region in self.regions]


# Reading the compiler's dumps.

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*[> ]*\{?(.*)")
_BRANCH = re.compile(r"sbr\.rel (?:\(!?%p\w+\) )?target = \$region(\d+)")
_TARGET = re.compile(r"Start(?:/End empty)? region (\d+)")
_VMATMUL = re.compile(r"= vmatmul\.(?:mubr\.)?(\w+)")


def parse_kernel(name: str, bundles: str, utilization: str = "") -> Kernel:
  """Reads one kernel from the texts of its dumps.

  Args:
    name: of the kernel.
    bundles: text of `*-final_bundles.txt`.
    utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
  """
  code = _code(bundles)
  columns, slots = _slots(utilization)
  loops, guards = _branches(code)
  vmatmuls = np.array([_count_vmatmuls(text) for text in code])
  after = lambda i: min(i + _DELAY_SLOTS + 1, len(code))
  cuts = {0, len(code)} | {edge for span in loops + guards for edge in span}
  cuts |= {after(i) for i, text in enumerate(code) if _BRANCH.search(text)}
  around = lambda spans, i: [span for span in spans if span[0] <= i < span[1]]
  regions = []
  for start, stop in zip(sorted(cuts), sorted(cuts)[1:]):
    used = dict(zip(columns, slots[start:stop].sum(0).tolist()))
    idle_guard = any(not vmatmuls[slice(*span)].any() for span in around(guards, start))
    regions.append(
      Region(
        start=start,
        bundles=stop - start,
        loops=tuple(first for first, _ in sorted(around(loops, start), key=lambda s: s[0] - s[1])),
        vmatmuls=float(vmatmuls[start:stop].sum()),
        edge=bool(idle_guard and used.get("VSTORE")),
        slots=used,
      )
    )
  return Kernel(name, tuple(regions))


def _code(text: str) -> list[str]:
  """Bundles in order of their addresses; one may stand on several lines."""
  code = []
  for line in text.partition("= control target key end")[2].splitlines():
    if found := _BUNDLE.match(line):
      code.append(found.group(2))
    elif code:
      code[-1] += line
  return code


def _branches(code: list[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """Loops and guards, as spans of bundles."""
  targets = {name: i for i, text in enumerate(code) for name in _TARGET.findall(text)}
  loops, guards = [], []
  for i, text in enumerate(code):
    for name in _BRANCH.findall(text):
      after = i + _DELAY_SLOTS + 1
      target = targets.get(name, len(code))  # only the end of the program has no name
      if target <= i:
        loops.append((target, after))
      else:
        guards.append((after, target))
  return loops, guards


def _count_vmatmuls(text: str) -> float:
  return sum(0.5 if dtype == "f32" else 1 for dtype in _VMATMUL.findall(text))


def _slots(text: str) -> tuple[list[str], np.ndarray]:
  """Names of slots and what each bundle uses of them, [bundles, names]."""
  if not text:
    return [], np.zeros((0, 0), int)
  _, names, _, _, *rows = text.splitlines()
  names = [name.strip() for name in names.split(",")]
  return names, np.array([row.split()[: len(names)] for row in rows if row.strip()], int)


# Reading the compiled module.

_KNOWN_CYCLES = 2**62  # a greater number means "unknown"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", re.M)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = ", re.M)
_OPCODE = re.compile(r"[)\]}]\s([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_IDLE = re.compile(
  r"(parameter|constant|tuple|get-tuple-element|bitcast|iota|after-all|while|call|.*-done)$"
)


@dataclasses.dataclass(frozen=True)
class Module:
  """What a compiled module says of itself; loops are counted as often as they run.

  Attributes:
    kernels: names of its Pallas calls.
    hbm_bytes: of every operation the operands and results that stand in HBM, each once; of a
      Pallas call what its `CostEstimate` says, less what XLA keeps in VMEM for it. A kernel
      without an estimate may fetch blocks again: then this is a lower bound.
    vmem_bytes: the most of any Pallas call: its scratch, blocks, and operands kept in VMEM.
    xla_vmem_bytes: likewise of XLA's own operations.
    xla_cycles: what XLA estimates for its own operations, NaN if it does not know of one.
  """

  kernels: tuple[str, ...] = ()
  hbm_bytes: int = 0
  vmem_bytes: int = 0
  xla_vmem_bytes: int = 0
  xla_cycles: float = 0

  def after(self, other: "Module", times: int = 1) -> "Module":
    """Adds another part of a program, run so many times."""
    return Module(
      self.kernels + other.kernels,
      self.hbm_bytes + times * other.hbm_bytes,
      max(self.vmem_bytes, other.vmem_bytes),
      max(self.xla_vmem_bytes, other.xla_vmem_bytes),
      self.xla_cycles + times * other.xla_cycles,
    )


def parse_module(text: str) -> Module:
  """Reads the text of an optimized TPU module."""
  heads = list(_COMPUTATION.finditer(text))
  ends = [head.start() for head in heads[1:]] + [len(text)]
  bodies = {head.group(2): text[head.end() : end] for head, end in zip(heads, ends)}
  entry = next(head.group(2) for head in heads if head.group(1))
  return _computation(bodies, entry)


def _computation(bodies: Mapping[str, str], name: str) -> Module:
  """Adds up the instructions of one computation."""
  found = list(_INSTRUCTION.finditer(bodies[name]))
  ends = [match.start() for match in found[1:]] + [len(bodies[name])]
  code = {f.group(1): bodies[name][f.end() : end] for f, end in zip(found, ends)}
  opcode = {key: _OPCODE.search(text) for key, text in code.items()}
  types = {key: code[key][: op.start() + 1] if op else "" for key, op in opcode.items()}
  total = Module()
  for key, text in code.items():
    if opcode[key] is None:
      continue
    inside = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", text)
    op = opcode[key].group(1)
    if op == "while":
      trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', text)
      total = total.after(_computation(bodies, inside[1]), int(trips[1]) if trips else 1)
    elif op == "call":
      total = total.after(_computation(bodies, inside[1]))
    else:
      operands = re.findall(r"%([\w.\-]+)", text[opcode[key].end() :].partition(")")[0])
      arrays = types[key] + " " + " ".join(types.get(operand, "") for operand in operands)
      total = total.after(_instruction(key, op, text, arrays))
  return total


def _instruction(name: str, op: str, text: str, arrays: str) -> Module:
  """What one instruction costs; `arrays` are the types of its results and operands."""
  number = lambda pattern: int((re.search(pattern, text) or [0, 0])[1])
  in_vmem, in_hbm = _bytes(arrays, vmem=True), _bytes(arrays, vmem=False)
  scoped = number(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')
  cycles = number(r'"estimated_cycles":"(\d+)"')
  cycles = math.nan if cycles > _KNOWN_CYCLES else cycles
  if 'custom_call_target="tpu_custom_call"' in text:
    estimate = number(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
    return Module((name,), max(estimate - in_vmem, 0) if estimate else in_hbm, scoped + in_vmem)
  if op == "copy-start":  # results: destination, source, flag; operand: the source once more
    destination, source = (m.group(0) for m in itertools.islice(_ARRAY.finditer(arrays), 2))
    return Module((), _bytes(destination, vmem=False) + _bytes(source, vmem=False))
  if _IDLE.match(op):
    return Module()
  return Module((), in_hbm, 0, scoped + in_vmem, cycles)


def _bytes(types: str, vmem: bool) -> int:
  """Bytes of the arrays that stand in VMEM, or of those that do not."""
  total = 0
  for dtype, shape, layout in _ARRAY.findall(types):
    bits = {"pred": 8, "bf16": 16}.get(dtype) or int(re.search(r"\d+$", dtype)[0])
    if ("S(" in layout) == vmem:
      total += math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
  return total


# Compiling.


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
  """
  chip_of(topology)
  os.environ.update(_WITHOUT_A_TPU)
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:
    if libtpu_version() is None:
      raise InputError(
        "libtpu is not installed; it compiles for TPUs without one: pip install libtpu"
      ) from None
    raise InputError(f"topology {topology!r}: {error}") from None
  device = Mesh(np.array(described.devices[:1]), ("device",))
  sharding = NamedSharding(device, PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.jit(fn, **jit).lower(*jax.tree.map(place, tuple(args))).compile(options)


_WITHOUT_A_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks Google's metadata server
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else two processes fight for a lock
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
_DUMP = (
  " --xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
)


def libtpu_version() -> str | None:
  """Returns the version of libtpu, None where it is not installed."""
  try:
    return metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return None


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler made of a function.

  Attributes:
    topology: what it was compiled for.
    libtpu: version of the compiler.
    kernels: its Pallas kernels, by name.
    xla_cycles: XLA's own estimate for everything but Pallas kernels, NaN if it has none.
    flops: arithmetic as XLA counts it, and as kernels estimate it.
    hbm_bytes: traffic of all operations, see `Module`.
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
    each = []
    for name, kernel in self.kernels.items():
      fitting = [part for part in trips if part in name]
      if not fitting:
        raise ValueError(f"kernel {name}: trips are given for {', '.join(trips) or 'none'}")
      each.append(kernel.cycles(trips[max(fitting, key=len)], self.chip))
    return Cycles(*(sum(getattr(c, f.name) for c in each) for f in dataclasses.fields(Cycles)))


def measure(make: Make, topology: str, options: Mapping[str, str] | None = None) -> Program:
  """Compiles `fn(*args)` of `make() -> fn, args` for a topology and reads the result.

  It happens in a fresh process, for libtpu reads its flags but once; `make` is pickled.

  Args:
    make: returns what `compile_for` takes first.
    topology: such as `v5e:2x2`.
    options: of the compiler.

  Raises:
    InputError: as of `compile_for`.
    jax.errors.JaxRuntimeError: it does not compile.
  """
  return next(fresh_processes([functools.partial(measure_here, make, topology, options)]))


def fresh_processes(calls: Sequence[Callable[[], Any]]) -> Iterator[Any]:
  """Yields what each call returns, in order; two at a time, each in a process of its own."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(2, context, max_tasks_per_child=1) as fresh:
    for future in [fresh.submit(call) for call in calls]:
      yield future.result()


def measure_here(make: Make, topology: str, options: Mapping[str, str] | None = None) -> Program:
  """What `measure` does, in this process: libtpu must not have been loaded."""
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as dumps:
    os.environ["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "") + _DUMP.format(dumps)
    fn, args = make()
    began = time.perf_counter()
    compiled = compile_for(fn, args, topology, options)
    seconds = time.perf_counter() - began
    module = parse_module(compiled.as_text())
    kernels = {name: _read_kernel(pathlib.Path(dumps), name) for name in module.kernels}
  return Program(
    topology=topology,
    libtpu=libtpu_version(),
    kernels=kernels,
    xla_cycles=module.xla_cycles,
    flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
    hbm_bytes=module.hbm_bytes,
    vmem_bytes=module.vmem_bytes or module.xla_vmem_bytes,
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    compile_seconds=seconds,
  )


def _read_kernel(dumps: pathlib.Path, name: str) -> Kernel:
  """Reads the dump of one kernel."""
  ours = [path for path in dumps.iterdir() if re.match(rf"\d+-{re.escape(name)}-\d+-", path.name)]
  text = lambda ending: next(p.read_text() for p in ours if re.search(rf"-\d+-{ending}", p.name))
  return parse_kernel(
    name, text("final_bundles.txt"), text("final_hlo-static-per-bundle-utilization.txt")
  )
