"""The text of an optimized HLO module, cut into computations and instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", re.M)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ", re.M)
_OPCODE = re.compile(r"[)\]}]\s([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|called_computations|branch_computations|(?:true|false)_computation)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"\bS\((\d+)\)")

HBM, VMEM = 0, 1  # memory spaces; others are small or not on the chip


class Array(NamedTuple):
  """Where an array stands and its bytes, without what its tiles pad."""

  size: int
  space: int


def arrays(types: str) -> list[Array]:
  """Reads the arrays of a type, which may be a tuple."""
  return [
    Array(
      math.prod(map(int, filter(None, shape.split(",")))) * _bits(dtype) // 8,
      int(space[1]) if (space := _SPACE.search(layout)) else HBM,
    )
    for dtype, shape, layout in _ARRAY.findall(types)
  ]


def size(types: str, space: int | None = None) -> int:
  """Adds up the bytes of all arrays of a type, or of those in one memory space."""
  return sum(array.size for array in arrays(types) if space in (None, array.space))


def _bits(dtype: str) -> int:
  """Of one number: the first in the name, as in bf16 and f8e4m3fn; a token has none."""
  if dtype == "pred":
    return 8
  found = re.search(r"\d+", dtype)
  return int(found[0]) if found else 0


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: of the result.
    op: opcode.
    types: of the result, which may be a tuple.
    operands: names.
    text: all that follows the name.
    root: whether the computation returns it.
  """

  name: str
  op: str
  types: str
  operands: list[str]
  text: str
  root: bool

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls, without the condition of a loop."""
    return [name for group in _CALLED.findall(self.text) for name in re.findall(r"[\w.\-]+", group)]

  def number(self, pattern: str, default: int = 0) -> int:
    """Returns what stands at the group of a pattern."""
    found = re.search(pattern, self.text)
    return int(found[1]) if found else default


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of a module: its instructions by name, in order."""

  name: str
  instructions: Mapping[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction | None:
    """The instruction whose result it returns."""
    return next((x for x in self.instructions.values() if x.root), None)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by position."""
    parameters = (x for x in self.instructions.values() if x.op == "parameter")
    return {x.number(r"parameter\((\d+)\)"): x for x in parameters}

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Instruction, int]]]:
    """Of every instruction those that take its result, and as which operand."""
    users = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for position, name in enumerate(instruction.operands):
        users.setdefault(name, []).append((instruction, position))
    return users

  def types(self, name: str) -> str:
    """Returns the type of a result, nothing where the text lacks it."""
    return self.instructions[name].types if name in self.instructions else ""


@dataclasses.dataclass(frozen=True)
class Text:
  """A module.

  Attributes:
    computations: by name.
    entry: name of the one that runs.
    chips: how many devices run it together.
  """

  computations: Mapping[str, Computation]
  entry: str
  chips: int

  def called_by(self, instruction: Instruction) -> Iterator[Computation]:
    """Yields the computations that an instruction calls."""
    return (self.computations[name] for name in instruction.called if name in self.computations)


def parse_text(text: str) -> Text:
  """Reads an optimized module, as `jax.stages.Compiled.as_text` or a dump of XLA gives it."""
  header = text.partition("\n")[0]
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
  return Text(
    {
      head[2]: Computation(head[2], _instructions(body))
      for head, body in _pieces(_COMPUTATION, text)
    },
    next(head[2] for head in _COMPUTATION.finditer(text) if head[1]),
    math.prod(map(int, counts)),
  )


def _instructions(body: str) -> dict[str, Instruction]:
  found = {}
  for head, text in _pieces(_INSTRUCTION, body):
    if op := _OPCODE.search(text):
      operands = _NAME.findall(text[op.end() :].partition(")")[0])
      types = text[: op.start() + 1]
      found[head[2]] = Instruction(head[2], op[1], types, operands, text, bool(head[1]))
  return found


def _pieces(head: re.Pattern, text: str) -> Iterator[tuple[re.Match, str]]:
  """Yields every head and what stands between it and the next."""
  heads = list(head.finditer(text))
  ends = [following.start() for following in heads[1:]] + [len(text)]
  return ((found, text[found.end() : end]) for found, end in zip(heads, ends))
