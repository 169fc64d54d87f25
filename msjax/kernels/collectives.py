"""The collectives of a compiled program: what a chip sends to others and gets from them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from msjax.kernels.hlo_text import Computation, Instruction, Text, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x[^"]*"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")  # a whole axis or a part of it: 'x':(2)4


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a step.

  Attributes:
    kind: one of `KINDS`, as the chips run it: what gathers by summing is an all-reduce.
    bytes: of one run and chip: of an all-gather the result, else the operands. So a gather and a
      scatter of one array both count the whole of it; padding of the compiler is included.
    count: runs in a step.
    in_loop: whether it stands in the body of a loop.
    asynchronous: whether the chip can compute meanwhile.
    group: chips that take part together; 2 for a permute, one sends to one.
    between_slices: over the network of the data centre, by the hosts; of the chips that stand at
      the same place in their slices.
  """

  kind: str
  bytes: int
  count: int
  in_loop: bool
  asynchronous: bool
  group: int
  between_slices: bool = False


def merge(found: Iterable[Collective]) -> tuple[Collective, ...]:
  """Adds up the counts of those that are otherwise equal."""
  counts = collections.Counter()
  for collective in found:
    counts[dataclasses.replace(collective, count=0)] += collective.count
  return tuple(dataclasses.replace(kind, count=count) for kind, count in counts.items())


def kind_of(instruction: Instruction) -> str | None:
  """Returns the kind of a collective or of its start, None for everything else."""
  kind = instruction.op.removesuffix("-start")
  if instruction.op == "send" and (megascale := _TRANSFER.search(instruction.text)):
    kind = megascale[1].lower().replace("_", "-")
  return kind if kind in KINDS else None


def collectives_of(
  text: Text, computation: Computation, instruction: Instruction, asynchronous: bool
) -> Iterator[Collective]:
  """Yields the collectives that one instruction runs: itself, or those fused in it.

  Args:
    text: of the module.
    computation: that holds the instruction.
    instruction: any.
    asynchronous: whether the computation runs beside another.
  """
  if instruction.op == "fusion":
    for callee in text.called_by(instruction):
      for inner in callee.instructions.values():
        yield from collectives_of(text, callee, inner, asynchronous)
  kind = kind_of(instruction)
  if kind is None or carries_on(computation, instruction):
    return
  between_slices = instruction.op == "send"
  group = _slices(instruction) if between_slices else _group(instruction, text.chips)
  if group == 1:
    return
  if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
    kind = "reduce-scatter"  # so TPU spells it: each chip keeps a slice of the sum
  operands = sum(size(computation.types(name)) for name in instruction.operands)
  beside = asynchronous or instruction.op.endswith("-start") or _in_pieces(instruction)
  yield Collective(
    kind,
    bytes=operands * group if kind == "all-gather" else operands,
    count=1,
    in_loop=False,
    asynchronous=beside or between_slices,
    group=group,
    between_slices=between_slices,
  )


def carries_on(computation: Computation, instruction: Instruction) -> bool:
  """Whether it is a later piece of a collective that an earlier fusion began.

  An asynchronous collective fusion holds it again wherever matrix products run beside it, and
  where it ends.
  """
  users = computation.users[instruction.name]
  return _in_pieces(instruction) and not any("AsyncCollectiveStart" in x.text for x, _ in users)


def _in_pieces(instruction: Instruction) -> bool:
  return '"async_collective_fusion_config"' in instruction.text


def _slices(instruction: Instruction) -> int:
  """Slices that exchange with each other."""
  return len(_SLICES.search(instruction.text)[1].split(","))


def _group(instruction: Instruction, chips: int) -> int:
  """Chips that take part in one collective together."""
  text = instruction.text
  if "source_target_pairs={{" in text:
    return 2
  if listed := _LISTED.search(text):
    return len(listed[1].split(","))
  if iota := _IOTA.search(text):
    return int(iota[1])
  if mesh := _MESH.search(text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(mesh[2]))
  return chips if "replica_groups={}" in text else 1
