"""Reading a schedule: one written by hand, as libtpu dumps it."""

import pytest

from msjax.kernels.chips import CHIPS
from msjax.kernels.schedule import Kernel, Region, Trips, parse_kernel

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
  return parse_kernel("k.1", BUNDLES, UTILIZATION)


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
  regions = parse_kernel("k.1", without_name, UTILIZATION).regions
  assert not any(r.edge for r in regions)  # for the rest holds products
  assert {r.loops for r in regions} == {(), (1,), (1, 9)}
  assert sum(r.bundles for r in regions) == 0x17


def test_wrong_trips_are_told_with_what_there_is(kernel):
  with pytest.raises(ValueError, match=r"2 counts.* 1 regions.*: 7 bundles at 0x9"):
    kernel.cycles(Trips(1, (1, 1)), CHIPS["v5e"])
