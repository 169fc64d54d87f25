"""Bytes of HBM that one operation of XLA's own reads and writes.

What an operation takes and returns counts as often as it stands in HBM, with these exceptions. Who
cuts a slice out of an array reads the slice; who updates a part of an array in place writes that
part: within fusions too, so that of the weights of all layers a turn of a scan over layers reads
one. An operand that a fusion hands on as a result of its own is not touched.
"""

import math
import re

from msjax.kernels.collectives import carries_on
from msjax.kernels.hlo_text import HBM, Computation, Instruction, Text, arrays, size

_MOVES_NOTHING = re.compile(
  r"(parameter|constant|tuple|get-tuple-element|bitcast|after-all|add-dependency|opt-barrier"
  r"|partition-id|replica-id|async-update|.*-done)$"
)
_RENAMES = re.compile(
  r'custom_call_target="(AllocateBuffer|ConcatBitcast|Sharding|Assume\w+|AsyncCollectiveDone)"'
)
_VIEWS = ("bitcast", "reshape", "transpose", "copy")  # what they take is read as their result is
_UPDATES = ("dynamic-update-slice", "scatter")
_CUTS = ("slice", "dynamic-slice", "gather")
_HANDED_ON = re.compile(r"\{(\d*)\}: \((\d+), \{\}")  # result: operand


def moves_nothing(instruction: Instruction) -> bool:
  """Whether an instruction only names things."""
  return bool(_MOVES_NOTHING.match(instruction.op) or _RENAMES.search(instruction.text))


def hbm_bytes(text: Text, computation: Computation, instruction: Instruction) -> int:
  """Counts what an instruction, a fusion for example, reads and writes in HBM."""
  operands = [arrays(computation.types(name)) for name in instruction.operands]
  if instruction.op in ("slice-start", "dynamic-slice-start"):
    source, target, *_ = arrays(instruction.types)
    return target.size * ((source.space == HBM) + (target.space == HBM))
  if instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
    return size(instruction.types, HBM)  # which holds the operands too
  read = sum(
    _read(text, computation, instruction, position, array.size)
    for position, operand in enumerate(operands)
    for array in operand
    if array.space == HBM
  )
  written = sum(
    _written(text, computation, instruction, index, array.size)
    for index, array in enumerate(arrays(instruction.types))
    if array.space == HBM
  )
  return read + written


def _read(
  text: Text, computation: Computation, instruction: Instruction, position: int, whole: int
) -> int:
  """Bytes that an instruction reads of one operand, which has `whole`."""
  if carries_on(computation, instruction):
    return 0
  if instruction.op == "fusion":
    (callee,) = text.called_by(instruction)
    name = callee.parameters[position].name
    return min(whole, _read_by_users(text, callee, name, whole, _handed_on(instruction)))
  if position == 0 and instruction.op in _CUTS:
    return min(whole, size(instruction.types))
  if position == 0 and instruction.op == "dynamic-update-slice":
    return 0
  if position == 0 and instruction.op == "scatter":  # adds to rows, which it has to read
    return min(whole, _update(computation, instruction))
  return 0 if _RENAMES.search(instruction.text) else whole


def _read_by_users(
  text: Text, body: Computation, name: str, whole: int, handed_on: dict[int, int]
) -> int:
  """Bytes that a fused computation reads of one array."""
  total = 0
  for user, position in body.users[name]:
    if user.op in _VIEWS and not user.root:
      total += _read_by_users(text, body, user.name, whole, handed_on)
    elif not (user.root and user.op == "tuple" and position in handed_on):
      total += _read(text, body, user, position, whole)
  return total


def _written(
  text: Text, computation: Computation, instruction: Instruction, index: int, whole: int
) -> int:
  """Bytes that an instruction writes of one of its results, which has `whole`."""
  if instruction.op in _UPDATES:
    return min(whole, _update(computation, instruction))
  if instruction.op != "fusion":
    return whole
  (callee,) = text.called_by(instruction)
  source = _source(callee, index)
  if carries_on(callee, source) or _RENAMES.search(source.text):
    return 0
  handed_on = index in _handed_on(instruction)
  if "AsyncCollectiveStart" in source.text:
    return 0 if handed_on else whole
  changed, _ = _changed(text, callee, source)
  return min(whole, changed) if changed or handed_on else whole


def _changed(text: Text, body: Computation, instruction: Instruction) -> tuple[float, int]:
  """Tells how much of a parameter an instruction changes, if it returns that array.

  Returns:
    The bytes, without limit where the result is a new array, and the position of the parameter.
  """
  if instruction.op == "parameter":
    return 0, instruction.number(r"parameter\((\d+)\)")
  if instruction.op in (*_UPDATES, "bitcast", "reshape"):
    changed, parameter = _changed(text, body, body.instructions[instruction.operands[0]])
    update = _update(body, instruction) if instruction.op in _UPDATES else 0
    return changed + update, parameter
  if instruction.op == "fusion":
    (callee,) = text.called_by(instruction)
    inside, position = _changed(text, callee, _source(callee, 0))
    before, parameter = _changed(text, body, body.instructions[instruction.operands[position]])
    return before + inside, parameter
  return math.inf, 0


def _source(body: Computation, index: int) -> Instruction:
  """The instruction that makes a result of a computation."""
  root = body.root
  return body.instructions[root.operands[index]] if root.op == "tuple" else root


def _update(computation: Computation, instruction: Instruction) -> int:
  """Bytes that replace a part of an array, or are added to it."""
  place = 2 if instruction.op == "scatter" else 1
  return size(computation.types(instruction.operands[place]))


def _handed_on(instruction: Instruction) -> dict[int, int]:
  """Results of a fusion that are operands."""
  aliasing = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.text)
  pairs = _HANDED_ON.findall(aliasing[1]) if aliasing else []
  return {int(result or 0): int(operand) for result, operand in pairs}
