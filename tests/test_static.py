"""Reading the TPU compiler's schedule: a schedule written by hand, and two programs compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from msjax.errors import InputError
from msjax.kernels import static
from msjax.kernels.static import CHIPS, Kernel, Region, Trips

needs_libtpu = pytest.mark.skipif(not static.libtpu_version(), reason="libtpu is not installed")

# A grid's loop (1 to 27) around an init under a guard, a loop with products, and a last step.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 1 }
   0x1 LB: > { %s2 = sphi } /* Start region 9 */
   0x2   : > { %3 = sbr.rel (%p1) target = $region4 } /* Start region 2 */
   0x3   : > {}
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > { %4 = vst [vmem:[#a]] %v1 }
   0x8 PF: > { %s5 = sld } /* Start/End empty region 4 */
   0x9 LB: >> { %6 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %7 = vmatmul.bf16.gmra.mxu1 %v1
     /* a second line of one bundle */ } /* Start region 5 */
   0xa   : >> { %8 = vmatmul.f32.gmra.mxu0 %v1  ;;  %9 = vst [vmem:[#b]] %v2 }
   0xb   : >> { %10 = sbr.rel (!%p2) target = $region5 }
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   : > { %11 = vst [vmem:[#c]] %v3 }
  0x11   : > { %12 = sbr.rel (!%p3) target = $region9 }
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  { %13 = vsyncpa }
"""
STORES = (7, 10, 16)
UTILIZATION = "== CAPACITY:\nMATMUL, VSTORE, VSTORE:SPILL\n4 1 1\n== UTILIZATION:\n" + "".join(
  f"{2 * (i == 9)} {int(i in STORES)} {int(i == 10)}\n" for i in range(0x17)
)


@pytest.fixture
def kernel():
  return static.parse_kernel("k.1", BUNDLES, UTILIZATION)


def test_regions_are_cut_at_branches_and_their_targets(kernel):
  assert [(r.start, r.bundles) for r in kernel.regions] == [
    (0, 1),
    (1, 6),
    (7, 1),
    (8, 1),
    (9, 7),
    (16, 6),
    (22, 1),
  ]
  assert [r.loops for r in kernel.regions] == [(), (1,), (1,), (1,), (1, 9), (1,), ()]


def test_only_what_a_guard_without_products_stores_is_an_edge(kernel):
  assert [r.start for r in kernel.regions if r.edge] == [7]


def test_products_and_slots_are_counted(kernel):
  (body,) = kernel.bodies
  assert body.vmatmuls == 2.5
  assert body.slots["MATMUL"] == 2
  assert kernel.spills == 1


def test_cycles_follow_trips(kernel):
  trips = Trips(steps=10, bodies=(30,), edges=2)
  cycles = kernel.cycles(trips, CHIPS["v5e"])
  assert cycles.schedule == 2 * 1 + 10 * (6 + 1 + 6) + 2 * 1 + 30 * 7
  assert cycles.mxu_floor == 30 * 2.5 * 16 / 4
  assert cycles.total == cycles.schedule + 30 * (10 - 7)  # the MXU takes longer than 7 bundles


def test_a_region_of_an_inner_loop_runs_as_often_as_its_bodies():
  loop = [Region(0, 5, (0, 1)), Region(5, 10, (0, 1), 1), Region(15, 10, (0, 1), 1)]
  cycles = Kernel("k", tuple(loop)).cycles(Trips(100, (3, 4)), CHIPS["v5e"])
  assert cycles.schedule == 7 * 5 + 3 * 10 + 4 * 10


def test_a_branch_to_the_end_guards_the_rest():
  without_name = BUNDLES.replace("Start/End empty region 4", "")
  regions = static.parse_kernel("k.1", without_name, UTILIZATION).regions
  assert not any(r.edge for r in regions)  # for the rest holds products
  assert sum(r.bundles for r in regions) == 0x17


def test_wrong_trips_are_told_with_what_there_is(kernel):
  with pytest.raises(ValueError, match=r"2 counts.* 1 regions.*: 7 bundles at 0x9"):
    kernel.cycles(Trips(1, (1, 1)), CHIPS["v5e"])


@pytest.mark.parametrize(
  ("chip", "teraflops", "vmatmuls", "cycles"),
  [
    # scores and values of 512 queries, 512 keys and a head of 128: 134 million multiplications
    ("v5e", 197, 2 * 4 * 512 / 16, 1024),
    ("v5p", 459 / 2, 2 * 4 * 512 / 16, 1024),
    ("v6e", 918, 2 * 2 * 512 / 16, 512),  # half of a unit of 256 x 256 is idle
  ],
)
def test_floor_is_peak_arithmetic(chip, teraflops, vmatmuls, cycles):
  chip = CHIPS[chip]
  assert chip.flops_per_cycle * chip.hertz == pytest.approx(teraflops * 1e12, rel=0.005)
  assert Region(0, 1, (), vmatmuls).mxu_cycles(chip) == cycles


MODULE = """HloModule jit_f

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,128]{1,0:T(8,128)S(1)} negate(%x), backend_config={"estimated_cycles":"10"}
}

ENTRY %main (a: f32[8,128]) -> bf16[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %while = (s32[], f32[8,128]{1,0}) while(%t), body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %k.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%copy-done, %a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"a line of its own"
}}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"100"}]@}
  ROOT %z = bf16[8,128]{1,0} copy(%k.1), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501
F32, BF16 = 8 * 128 * 4, 8 * 128 * 2


def test_modules_tell_their_traffic():
  module = static.parse_module(MODULE)
  assert module.kernels == ("k.1",)
  assert module.vmem_bytes == 100 + F32
  assert module.xla_cycles == 5 * 10 + 7
  # the copy reads a, each turn of the loop too; k.1 reads a and writes; what follows does both
  assert module.hbm_bytes == F32 + 5 * F32 + (F32 + BF16) + 2 * BF16


def test_a_cost_estimate_stands_for_what_a_kernel_fetches():
  estimate = ',"cost_estimate":{"flops":"1","bytes_accessed":"50000"}'
  told, untold = (static.parse_module(MODULE.replace("@", x)) for x in (estimate, ""))
  assert told.hbm_bytes - untold.hbm_bytes == (50000 - F32) - (F32 + BF16)


def test_cycles_that_xla_does_not_know_are_not_a_number():
  assert math.isnan(static.parse_module(MODULE.replace('"7"', f'"{2**63 - 1}"')).xla_cycles)


def test_unknown_topology_is_told():
  with pytest.raises(InputError, match=r"'v5q:2x2'.* v5e, v5p, v6e .*did you mean"):
    static.chip_of("v5q:2x2")


# With the compiler.


def add_products():
  """Four blocks of rows of x @ y, three times each, in a kernel."""

  def kernel(x, y, out):
    out[...] = jnp.zeros_like(out)

    def add(_, carry):
      out[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
      return carry

    jax.lax.fori_loop(0, pl.program_id(0) + 3, add, 0)

  rows = pl.BlockSpec((128, 128), lambda i: (i, 0))
  call = pl.pallas_call(
    kernel,
    grid=(4,),
    in_specs=[rows, pl.BlockSpec((128, 128), lambda i: (0, 0))],
    out_specs=rows,
    out_shape=jax.ShapeDtypeStruct((512, 128), jnp.float32),
    cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1 << 20),
    name="add_products",
  )
  x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
  return call, (x, jax.ShapeDtypeStruct((128, 128), jnp.bfloat16))


@pytest.mark.tpu_compiler
@needs_libtpu
@pytest.mark.parametrize(
  ("topology", "vmatmuls"), [("v5e:2x2", 8), ("v5p:2x2x1", 8), ("v6e:2x2", 4)]
)
def test_a_kernel_is_compiled_and_read(topology, vmatmuls):
  program = static.measure(add_products, topology)
  (kernel,) = program.kernels.values()
  (body,) = kernel.bodies
  assert body.vmatmuls == vmatmuls  # 128 rows, 16 at a time; v6e does two such side by side
  assert len(body.loops) == 2
  trips = Trips(steps=4, bodies=(3 + 4 + 5 + 6,))
  cycles = program.cycles({"add_products": trips})
  assert cycles.mxu_floor == 18 * vmatmuls * program.chip.vmatmul_cycles / program.chip.mxus
  assert cycles.total >= cycles.schedule > cycles.mxu_floor
  assert 0 < program.vmem_bytes < 1 << 20
  assert program.libtpu == static.libtpu_version()


def product():
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
  return functools.partial(jnp.dot, preferred_element_type=jnp.float32), (x, x)


@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_program_without_kernels_is_read():
  program = static.measure(product, "v5e:2x2")
  assert not program.kernels
  assert program.flops == pytest.approx(2 * 1024**3, rel=0.01)
  assert program.hbm_bytes >= 1024**2 * (2 + 2 + 4)
  assert program.xla_cycles >= 2 * 1024**3 / program.chip.flops_per_cycle


@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_told():
  with pytest.raises(InputError, match="v5e:3x77"):
    static.measure(product, "v5e:3x77")
