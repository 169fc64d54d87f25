"""What the TPU compiler makes of the TPU kernels; there need be no TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from attention_cases import cells, differentiated

from msjax.kernels import bench_cases, static
from msjax.kernels.tpu import attention

pytestmark = pytest.mark.tpu_compiler
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
TOPOLOGIES = pytest.mark.parametrize("topology", CHIPS)
LEAST_VMEM = "v5p:2x2x1"


def compiled_for(topology, shape, dtype=jnp.bfloat16, attend=attention):
  """The program of output and gradients on one core."""
  N, K, H, L = shape
  q, k, v = (jax.ShapeDtypeStruct((1, heads, L, H), dtype) for heads in (N, K, K))
  return static.compile_for(differentiated(attend), (q, k, v, cells(1, L), q), topology)


def calls(program):
  """How often the kernels are called, forward and backward."""
  text = program.as_text()
  found = re.findall(r"%(\S+) = .* custom_call_target=\"tpu_custom_call\"", text)
  return [sum(kernel in name for name in found) for kernel in ("stream_forward", "stream_backward")]


@pytest.mark.parametrize(
  ("topology", "shape", "dtype"),
  [
    *((chip, (8, 4, 128, 5120), jnp.bfloat16) for chip in CHIPS),
    *((chip, (4, 1, 64, 1280), jnp.bfloat16) for chip in ("v5p:2x2x1", "v6e:2x2")),
    *((chip, (2, 1, 128, 1280), jnp.float32) for chip in ("v5e:2x2", "v6e:2x2")),
  ],
)
def test_compiles_without_an_array_of_all_pairs(topology, shape, dtype):
  program = compiled_for(topology, shape, dtype)
  assert calls(program) == [1, 1]
  assert not re.search(rf"\b{shape[-1]},{shape[-1]}\b", program.as_text())


def test_long_sequences_compile():
  """Keys are streamed, queries cut into parts."""
  L = 40_960
  memory = compiled_for(LEAST_VMEM, (8, 4, 128, L)).memory_analysis()
  assert memory.temp_size_in_bytes < L * L  # bytes: an array of all pairs is more, were it of bool


def test_parts_of_padded_heads_fit():
  """It is the padded heads that must fit."""
  assert calls(compiled_for(LEAST_VMEM, (8, 4, 160, 8192))) == [1, 1]


def test_remat_keeps_what_is_named_attention():
  """Then the forward kernel does not run again before the backward one."""
  policies = jax.checkpoint_policies

  def calls_with(policy):
    attend = jax.checkpoint(attention, policy=policy)
    return calls(compiled_for("v5e:2x2", (2, 1, 128, 512), attend=attend))

  assert calls_with(policies.save_only_these_names("attention")) == [1, 1]
  assert calls_with(policies.nothing_saveable) == [2, 1]


COMPARED = (
  ("msjax", "forward", None),
  ("msjax", "backward", None),
  ("splash causal", "forward", 512),
  ("splash causal", "forward", 1024),
)


def measured(topology):
  """The programs that are compared, and the cycles of each for one query head."""
  shape = bench_cases.Shape(5120, 10, heads=8, kv_heads=4, head_dim=128, dtype="bfloat16")
  cases = {(c.kernel, c.direction, c.tile): c for c in bench_cases.cases(shape)}
  cases = [cases[key] for key in COMPARED]
  measure = lambda c: functools.partial(static.measure_here, c.program, topology, c.options)
  programs = list(static.fresh_processes([measure(c) for c in cases]))
  return programs, [p.cycles(c.trips()).total / c.heads for p, c in zip(programs, cases)]


@pytest.mark.slow
@TOPOLOGIES
def test_costs(topology):
  """Budgets by the compiler's schedule, see schedule.py: what these kernels were to reach."""
  (_, backward, *_), (forward, _, *splash) = measured(topology)
  chip = topology.partition(":")[0]
  assert forward / min(splash) <= {"v5e": 0.78, "v5p": 0.78, "v6e": 0.68}[chip]
  if static.libtpu_version() != "0.0.52":
    return  # other versions make other schedules
  assert forward <= {"v5e": 65_000, "v5p": 65_000, "v6e": 43_000}[chip]
  assert backward.hbm_bytes <= 110e6
  (kernel,) = backward.kernels.values()
  if chip == "v5e":
    assert kernel.bodies[-1].bundles <= 2300  # the loop over whole blocks comes last
