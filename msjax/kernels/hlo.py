"""What a compiled TPU program moves through memory and computes, read from its optimized HLO.

Loops are counted as often as they run, where XLA knows how often, else once. Branches of a
`conditional` are not looked into: it counts as one operation on its operands.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_UNKNOWN_CYCLES = 2**62  # what XLA writes for "unknown" is greater
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", re.M)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = ", re.M)
_OPCODE = re.compile(r"[)\]}]\s([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_MOVES_NOTHING = re.compile(
  r"(parameter|constant|tuple|get-tuple-element|bitcast|iota|after-all|.*-done)$"
)


@dataclasses.dataclass(frozen=True)
class Module:
  """What a compiled module says of itself.

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

  def plus(self, part: "Module", times: int = 1) -> "Module":
    """Adds a part of the program that runs so many times."""
    return Module(
      self.kernels + part.kernels,
      self.hbm_bytes + times * part.hbm_bytes,
      max(self.vmem_bytes, part.vmem_bytes),
      max(self.xla_vmem_bytes, part.xla_vmem_bytes),
      self.xla_cycles + times * part.xla_cycles,
    )


def parse_module(text: str) -> Module:
  """Reads the text of an optimized TPU module, as `jax.stages.Compiled.as_text` gives it."""
  bodies = {head[2]: body for head, body in _pieces(_COMPUTATION, text)}
  entry = next(head[2] for head in _COMPUTATION.finditer(text) if head[1])
  return _cost_of_computation(bodies, entry)


def _pieces(head: re.Pattern, text: str) -> Iterator[tuple[re.Match, str]]:
  """Yields every head and what stands between it and the next."""
  heads = list(head.finditer(text))
  ends = [following.start() for following in heads[1:]] + [len(text)]
  return ((found, text[found.end() : end]) for found, end in zip(heads, ends))


class _Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: of the result.
    op: opcode.
    types: of the result, which may be a tuple.
    operands: names.
    text: all that follows the name.
  """

  name: str
  op: str
  types: str
  operands: list[str]
  text: str

  def number(self, pattern: str, default: int = 0) -> int:
    """Returns what stands at the group of a pattern."""
    found = re.search(pattern, self.text)
    return int(found[1]) if found else default


def _instructions(body: str) -> Iterator[_Instruction]:
  for head, text in _pieces(_INSTRUCTION, body):
    if op := _OPCODE.search(text):
      operands = re.findall(r"%([\w.\-]+)", text[op.end() :].partition(")")[0])
      yield _Instruction(head[1], op[1], text[: op.start() + 1], operands, text)


def _cost_of_computation(bodies: Mapping[str, str], name: str) -> Module:
  """Adds up the instructions of one computation and of those it calls."""
  instructions = list(_instructions(bodies[name]))
  types = {instruction.name: instruction.types for instruction in instructions}
  total = Module()
  for instruction in instructions:
    if instruction.op in ("while", "call"):
      called = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", instruction.text)[1]
      times = instruction.number(r'known_trip_count"?:\{"?n"?:"?(\d+)', default=1)
      total = total.plus(_cost_of_computation(bodies, called), times)
    elif not _MOVES_NOTHING.match(instruction.op):
      total = total.plus(_cost(instruction, [types.get(name, "") for name in instruction.operands]))
  return total


def _cost(instruction: _Instruction, operands: list[str]) -> Module:
  """What one instruction costs; `operands` are their types."""
  if instruction.op == "copy-start":  # results: destination, source (the operand) and a flag
    destination, source, *_ = _ARRAY.finditer(instruction.types)
    return Module(hbm_bytes=_bytes(destination[0], vmem=False) + _bytes(source[0], vmem=False))
  arrays = " ".join([instruction.types, *operands])
  in_vmem, in_hbm = _bytes(arrays, vmem=True), _bytes(arrays, vmem=False)
  vmem_bytes = in_vmem + instruction.number(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"'
  )
  if 'custom_call_target="tpu_custom_call"' in instruction.text:
    estimate = instruction.number(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
    hbm_bytes = max(estimate - in_vmem, 0) if estimate else in_hbm
    return Module((instruction.name,), hbm_bytes, vmem_bytes)
  cycles = instruction.number(r'"estimated_cycles":"(\d+)"')
  return Module(
    hbm_bytes=in_hbm,
    xla_vmem_bytes=vmem_bytes,
    xla_cycles=math.nan if cycles > _UNKNOWN_CYCLES else cycles,
  )


def _bytes(types: str, vmem: bool) -> int:
  """Bytes of the arrays that stand in VMEM, or of those that do not."""
  return sum(
    math.prod(map(int, filter(None, shape.split(",")))) * _bits(dtype) // 8
    for dtype, shape, layout in _ARRAY.findall(types)
    if ("S(" in layout) == vmem
  )


def _bits(dtype: str) -> int:
  """Of one number: the first in the name, as in bf16 and f8e4m3fn; a token has none."""
  if dtype == "pred":
    return 8
  found = re.search(r"\d+", dtype)
  return int(found[0]) if found else 0
