"""Cycles of a Pallas kernel, read from the final schedule that the TPU compiler dumps.

A schedule is a list of bundles, each one cycle if nothing stalls. They are counted in three steps.

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

import dataclasses
import itertools
import re
from collections.abc import Mapping

import numpy as np

from msjax.kernels.chips import Chip

Span = tuple[int, int]  # of bundles: the first, and one past the last

_DELAY_SLOTS = 4  # bundles after a branch that run whether or not it is taken
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*[> ]*\{?(.*)")
_BRANCH = re.compile(r"sbr\.rel (?:\(!?%p\w+\) )?target = \$region(\d+)")
_TARGET = re.compile(r"Start(?:/End empty)? region (\d+)")
_VMATMUL = re.compile(r"= vmatmul\.(?:mubr\.)?(\w+)")


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
  """Time of one or more kernels.

  Attributes:
    total: of each region the larger of the next two.
    mxu_floor: if there were nothing but matrix products.
    schedule: if the MXU kept up with it.
  """

  total: float = 0
  mxu_floor: float = 0
  schedule: float = 0

  def __add__(self, other: "Cycles") -> "Cycles":
    """Returns the time of one after the other."""
    return Cycles(
      self.total + other.total,
      self.mxu_floor + other.mxu_floor,
      self.schedule + other.schedule,
    )


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
    total = Cycles()
    for times, region in zip(self._times(trips), self.regions):
      bundles, products = times * region.bundles, times * region.mxu_cycles(chip)
      total += Cycles(max(bundles, products), products, bundles)
    return total

  def _times(self, trips: Trips) -> list[int]:
    """How often each region runs."""
    if len(self.bodies) != len(trips.bodies):
      found = ", ".join(f"{r.bundles} bundles at {r.start:#x}" for r in self.bodies)
      raise ValueError(
        f"kernel {self.name}: trips.bodies has {len(trips.bodies)} counts, but the program has "
        f"{len(self.bodies)} regions with matrix products: {found}"
      )
    bodies = list(zip(self.bodies, trips.bodies))
    own = {body.start: times for body, times in bodies}

    def times(region: Region) -> int:
      if region.start in own:
        return own[region.start]
      if region.edge:
        return trips.edges
      inner = set(region.loops[1:])
      beside = [times for body, times in bodies if inner & set(body.loops)]
      if beside:
        return sum(beside)
      return trips.steps if region.loops else 1

    return [times(region) for region in self.regions]


def parse_kernel(name: str, bundles: str, utilization: str) -> Kernel:
  """Reads one kernel from the texts of its dumps.

  Args:
    name: of the kernel.
    bundles: text of `*-final_bundles.txt`.
    utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
  """
  code = _code(bundles)
  loops, guards = _branches(code)
  vmatmuls = np.array([_count_vmatmuls(text) for text in code])
  names, used = _slots(utilization)

  def region(start: int, stop: int) -> Region:
    slots = dict(zip(names, used[start:stop].sum(0).tolist()))
    idle = any(not vmatmuls[slice(*guard)].any() for guard in _around(guards, start))
    return Region(
      start=start,
      bundles=stop - start,
      loops=tuple(first for first, _ in _around(loops, start)),
      vmatmuls=float(vmatmuls[start:stop].sum()),
      edge=bool(idle and slots["VSTORE"]),
      slots=slots,
    )

  cuts = {0, len(code)} | {min(end, len(code)) for span in loops + guards for end in span}
  return Kernel(name, tuple(region(*span) for span in itertools.pairwise(sorted(cuts))))


def _code(text: str) -> list[str]:
  """Bundles in order of their addresses; one may stand on several lines."""
  code = []
  for line in text.partition("= control target key end")[2].splitlines():
    if found := _BUNDLE.match(line):
      code.append(found.group(1))
    elif code:
      code[-1] += line
  return code


def _branches(code: list[str]) -> tuple[list[Span], list[Span]]:
  """Loops and guards."""
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


def _around(spans: list[Span], bundle: int) -> list[Span]:
  """Those that hold a bundle, longest first."""
  found = [(first, end) for first, end in spans if first <= bundle < end]
  return sorted(found, key=lambda span: span[0] - span[1])


def _count_vmatmuls(text: str) -> float:
  return sum(0.5 if dtype == "f32" else 1 for dtype in _VMATMUL.findall(text))


def _slots(text: str) -> tuple[list[str], np.ndarray]:
  """Names of slots and what each bundle uses of them, [bundles, names]."""
  _, names, _, _, *rows = text.splitlines()
  names = [name.strip() for name in names.split(",")]
  return names, np.array([row.split()[: len(names)] for row in rows if row.strip()], int)
