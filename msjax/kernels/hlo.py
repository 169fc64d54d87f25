"""What a compiled TPU program moves, computes and exchanges, read from its optimized HLO.

Loops that count to a constant are taken to count from 0 by 1, as those of `jax.lax.scan` do; others
count once. Of the branches of a `conditional` one counts, by its HBM traffic. Work on a SparseCore
moves bytes, but takes no cycles of the TensorCore.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from msjax.kernels.collectives import Collective, collectives_of, kind_of, merge
from msjax.kernels.hlo_text import HBM, VMEM, Computation, Instruction, Text, parse_text, size
from msjax.kernels.hlo_traffic import hbm_bytes, moves_nothing

_CALLERS = ("while", "call", "conditional", "async-start")
_UNKNOWN_CYCLES = 2**62  # what XLA writes for "unknown" is greater


@dataclasses.dataclass(frozen=True)
class Module:
  """What a compiled module says of itself.

  Attributes:
    kernels: names of its Pallas calls.
    collectives: those that more than one chip takes part in.
    hbm_bytes: what every operation reads and writes in HBM (see hlo_traffic.py); of a Pallas call
      what its `CostEstimate` says, less what XLA keeps in VMEM for it. A kernel without an estimate
      counts operands and results, but may fetch blocks again: then this is a lower bound.
    vmem_bytes: the most of any Pallas call: its scratch, blocks, and operands kept in VMEM.
    xla_vmem_bytes: likewise of XLA's own operations.
    xla_cycles: what XLA estimates for its own operations except collectives, NaN if it does not
      know of one.
    matmul_cycles: the part of it that goes to operations with matrix products.
    copy_cycles: the part of it that goes to copies.
  """

  kernels: tuple[str, ...] = ()
  collectives: tuple[Collective, ...] = ()
  hbm_bytes: int = 0
  vmem_bytes: int = 0
  xla_vmem_bytes: int = 0
  xla_cycles: float = 0
  matmul_cycles: float = 0
  copy_cycles: float = 0

  def __add__(self, other: "Module") -> "Module":
    """Returns one part of a program after the other."""
    return Module(
      self.kernels + other.kernels,
      self.collectives + other.collectives,
      self.hbm_bytes + other.hbm_bytes,
      max(self.vmem_bytes, other.vmem_bytes),
      max(self.xla_vmem_bytes, other.xla_vmem_bytes),
      self.xla_cycles + other.xla_cycles,
      self.matmul_cycles + other.matmul_cycles,
      self.copy_cycles + other.copy_cycles,
    )

  def repeated(self, times: int) -> "Module":
    """Returns the part of a program that runs in a loop."""
    return dataclasses.replace(
      self,
      collectives=tuple(
        dataclasses.replace(x, count=times * x.count, in_loop=True) for x in self.collectives
      ),
      hbm_bytes=times * self.hbm_bytes,
      xla_cycles=times * self.xla_cycles,
      matmul_cycles=times * self.matmul_cycles,
      copy_cycles=times * self.copy_cycles,
    )

  def off_core(self) -> "Module":
    """Returns the same work done by another core than the TensorCore."""
    return dataclasses.replace(self, xla_cycles=0, matmul_cycles=0, copy_cycles=0)


def parse_module(text: str, branch: Callable[..., Module] = max) -> Module:
  """Reads the text of an optimized TPU module, as `static.compile_with_text` gives it.

  Args:
    text: of the module.
    branch: `max` or `min`: which branch of a conditional is taken, by what it moves.
  """
  parsed = parse_text(text)
  return _cost_of_computation(parsed, parsed.computations[parsed.entry], False, branch)


def _cost_of_computation(
  text: Text, computation: Computation, asynchronous: bool, branch: Callable[..., Module]
) -> Module:
  """Adds up the instructions of one computation and of those it calls."""
  instructions = computation.instructions.values()
  costs = (_cost(text, computation, x, asynchronous, branch) for x in instructions)
  total = sum(costs, Module())
  return dataclasses.replace(total, collectives=merge(total.collectives))


def _cost(
  text: Text,
  computation: Computation,
  instruction: Instruction,
  asynchronous: bool,
  branch: Callable[..., Module],
) -> Module:
  """What one instruction costs with all that it calls."""
  if instruction.op in _CALLERS or "called_computations=" in instruction.text:
    asynchronous |= instruction.op == "async-start"
    called = text.called_by(instruction)
    costs = [_cost_of_computation(text, each, asynchronous, branch) for each in called]
    cost = branch(costs, key=lambda cost: cost.hbm_bytes)  # only a conditional calls several
    if instruction.op == "while":
      cost = cost.repeated(_trips(text, instruction))
    return cost.off_core() if 'execution_thread="sparsecore"' in instruction.text else cost
  if moves_nothing(instruction):
    return Module()
  if 'custom_call_target="tpu_custom_call"' in instruction.text:
    return _cost_of_kernel(computation, instruction)
  return _cost_of_xla(text, computation, instruction, asynchronous)


def _trips(text: Text, loop: Instruction) -> int:
  """How often a `while` runs its body."""
  condition = text.computations[re.search(r"condition=%?([\w.\-]+)", loop.text)[1]]
  if not (condition.root.op == "compare" and "direction=LT" in condition.root.text):
    return 1
  limit = condition.instructions[condition.root.operands[1]]
  return limit.number(r"constant\((\d+)\)", default=1)


def _cost_of_kernel(computation: Computation, instruction: Instruction) -> Module:
  in_vmem = _bytes(computation, instruction, VMEM)
  estimate = instruction.number(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
  return Module(
    kernels=(instruction.name,),
    hbm_bytes=max(estimate - in_vmem, 0) if estimate else _bytes(computation, instruction, HBM),
    vmem_bytes=in_vmem + _scratch(instruction),
  )


def _cost_of_xla(
  text: Text, computation: Computation, instruction: Instruction, asynchronous: bool
) -> Module:
  collectives = tuple(collectives_of(text, computation, instruction, asynchronous))
  cycles = instruction.number(r'"estimated_cycles":"(\d+)"')
  if kind_of(instruction) or (collectives and "kind=kCustom" in instruction.text):
    cycles = 0  # of the links between chips, if XLA estimates any
  elif cycles > _UNKNOWN_CYCLES:
    cycles = math.nan
  return Module(
    collectives=collectives,
    hbm_bytes=hbm_bytes(text, computation, instruction),
    xla_vmem_bytes=_bytes(computation, instruction, VMEM) + _scratch(instruction),
    xla_cycles=cycles,
    matmul_cycles=cycles if _multiplies(text, instruction) else 0,
    copy_cycles=cycles if instruction.op == "copy" else 0,
  )


def _multiplies(text: Text, instruction: Instruction) -> bool:
  """Whether there are matrix products in an operation or in what is fused in it."""
  return instruction.op in ("convolution", "dot") or any(
    _multiplies(text, inner)
    for callee in text.called_by(instruction)
    for inner in callee.instructions.values()
  )


def _bytes(computation: Computation, instruction: Instruction, space: int) -> int:
  """Of the operands and results in one memory space."""
  types = [instruction.types, *map(computation.types, instruction.operands)]
  return size(" ".join(types), space)


def _scratch(instruction: Instruction) -> int:
  """Bytes of VMEM that an operation takes for itself."""
  return instruction.number(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"'
  )
