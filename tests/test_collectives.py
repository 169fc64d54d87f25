"""Collectives of modules that were shortened by hand, spelled as libtpu spells them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.kernels.collectives import Collective
from msjax.kernels.hlo import parse_module

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
MIB = 1 << 20


def collectives(line, computations=""):
  """Of a module that runs one line on `%x`, which is 1 MiB."""
  entry = f"""ENTRY %main (x: bf16[512,1024]) -> bf16[] {{
  %x = bf16[512,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  {line}
}}
"""
  return parse_module(HEADER + computations + entry).collectives


@pytest.mark.parametrize(
  ("line", "kind", "size", "asynchronous"),
  [
    ("%y = bf16[2048,1024]{1,0} all-gather(%x), GROUPS, dimensions={0}", "all-gather", 4, False),
    (
      "%y = (bf16[512,1024]{1,0}, bf16[2048,1024]{1,0}) all-gather-start(%x), GROUPS",
      "all-gather",
      4,
      True,
    ),
    ("%y = bf16[512,1024]{1,0} all-reduce(%x), GROUPS, to_apply=%add", "all-reduce", 1, False),
    (
      "%y = (bf16[512,1024], bf16[512,1024]) all-reduce(%x, %x), GROUPS, to_apply=%add",
      "all-reduce",
      2,
      False,
    ),
    ("%y = bf16[128,1024]{1,0} reduce-scatter(%x), GROUPS", "reduce-scatter", 1, False),
    ("%y = bf16[512,1024]{1,0} all-to-all(%x), GROUPS, dimensions={0}", "all-to-all", 1, False),
  ],
)
def test_kinds_and_full_bytes(line, kind, size, asynchronous):
  line = line.replace("GROUPS", "replica_groups={{0,1,2,3},{4,5,6,7}}")
  assert collectives(line) == (Collective(kind, size * MIB, 1, False, asynchronous, 4),)


def test_hosts_sum_between_slices():
  attributes = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_'
    'runtime",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  types = "(bf16[512,1024]{1,0:T(8,128)}, u32[]{:S(2)}, token[])"
  line = (
    "%t = token[] after-all()\n"
    f"  %y = {types} send(%x, %t), channel_id=8, {attributes}\n"
    f"  %z = {types} recv(%t), channel_id=9, {attributes}"
  )
  assert collectives(line) == (Collective("all-reduce", MIB, 1, False, True, 3, True),)
  plain = line.replace("_xla_megascale", "_xla_other")
  assert collectives(plain) == ()


def test_a_permute_goes_from_one_to_one():
  line = (
    "%y = (bf16[512,1024]{1,0}, bf16[512,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
    "collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}"
  )
  assert collectives(line) == (Collective("collective-permute", MIB, 1, False, True, 2),)


@pytest.mark.parametrize(
  ("groups", "chips"),
  [
    ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
    ("replica_groups={}", 8),
    ("replica_groups=[2,4]<=[8]", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}", 4),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8),
    ("replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'x'}", 2),
    ("replica_groups=mesh['x'=1,'y'=8] {'y':(2)4}", 4),
  ],
)
def test_group_sizes(groups, chips):
  (found,) = collectives(f"%y = bf16[512,1024]{{1,0}} all-reduce(%x), {groups}, to_apply=%add")
  assert found.group == chips


@pytest.mark.parametrize(
  "groups",
  [
    "replica_groups={{0},{1},{2},{3}}",
    "replica_groups=[8,1]<=[8]",
    "replica_groups=mesh['x'=8,'y'=1] {'y'}",
    "source_target_pairs={}",
  ],
)
def test_groups_of_one_chip_exchange_nothing(groups):
  assert not collectives(f"%y = bf16[512,1024]{{1,0}} all-reduce(%x), {groups}, to_apply=%add")


@given(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_spellings_of_groups_agree(rows, axes):
  size = math.prod(axes)
  listed = ",".join(
    "{" + ",".join(str(row * size + i) for i in range(size)) + "}" for row in range(rows)
  )
  mesh = ",".join(f"'a{i}'={n}" for i, n in enumerate(axes))
  names = ",".join(f"'a{i}'" for i in range(len(axes)))
  spellings = (
    f"{{{listed}}}",
    f"[{rows},{size}]<=[{rows * size}]",
    f"mesh['rows'={rows},{mesh}] {{{names}}}",
  )
  line = "%y = bf16[9]{{0}} all-reduce(%x), replica_groups={}, to_apply=%add"
  groups = [[x.group for x in collectives(line.format(groups))] for groups in spellings]
  assert groups == 3 * [[size] if size > 1 else []]


def test_a_reduce_scatter_that_is_spelled_as_a_fused_all_reduce():
  fused = """%all-reduce-scatter.1.clone (input.1: bf16[512,1024]) -> bf16[144,1024] {
  %input.1 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad.1 = bf16[576,1024]{1,0:T(8,128)(2,1)} pad(%input.1, %zero), padding=0_64x0_0
  %all-reduce.1 = bf16[576,1024]{1,0:T(8,128)(2,1)} all-reduce(%pad.1), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[144,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={144,1024}
}

"""  # noqa: E501
  line = "%y = bf16[144,1024] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone"
  padded = 576 * 1024 * 2
  assert collectives(line, fused) == (Collective("reduce-scatter", padded, 1, False, False, 4),)


GATHER = (
  "all-gather({}), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}"
)
PIECE = 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
IN_PIECES = f"""%start.1 (p.0: bf16[512,1024]) -> (bf16[512,1024], bf16[2048,1024], u32[]) {{
  %p.0 = bf16[512,1024]{{1,0}} parameter(0)
  %ag.0 = bf16[2048,1024]{{1,0}} {GATHER.format("%p.0")}, {PIECE.replace('"2"', '"-1"')}
  ROOT %begin = (bf16[512,1024]{{1,0}}, bf16[2048,1024]{{1,0}}, u32[]{{:S(2)}}) custom-call(%ag.0), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p.1: bf16[512,1024], p.2: bf16[2048,1024], p.3: bf16[2048,1024]) -> (bf16[2048,1024], bf16[512,1024], bf16[2048,1024]) {{
  %p.3 = bf16[2048,1024]{{1,0}} parameter(2)
  %conv = bf16[2048,1024]{{1,0}} convolution(%p.3, %p.3), dim_labels=bf_io->bf
  %p.1 = bf16[512,1024]{{1,0}} parameter(0)
  %p.2 = bf16[2048,1024]{{1,0}} parameter(1)
  %ag.1 = bf16[2048,1024]{{1,0}} {GATHER.format("%p.1")}, {PIECE}
  ROOT %out = (bf16[2048,1024]{{1,0}}, bf16[512,1024]{{1,0}}, bf16[2048,1024]{{1,0}}) tuple(%conv, %p.1, %ag.1)
}}

%done.3 (p.4: bf16[512,1024], p.5: bf16[2048,1024]) -> bf16[2048,1024] {{
  %p.4 = bf16[512,1024]{{1,0}} parameter(0)
  %p.5 = bf16[2048,1024]{{1,0}} parameter(1)
  %ag.2 = bf16[2048,1024]{{1,0}} {GATHER.format("%p.4")}, {PIECE}
  ROOT %end = bf16[2048,1024]{{1,0}} custom-call(%p.4, %p.5, %ag.2), custom_call_target="AsyncCollectiveDone"
}}

"""  # noqa: E501
RUN_IN_PIECES = """%s = (bf16[512,1024]{1,0}, bf16[2048,1024]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start.1
  %s.0 = bf16[512,1024]{1,0} get-tuple-element(%s), index=0
  %s.1 = bf16[2048,1024]{1,0} get-tuple-element(%s), index=1
  %b = bf16[2048,1024]{1,0:T(8,128)S(1)} copy(%s.1)
  %f = (bf16[2048,1024]{1,0:S(1)}, bf16[512,1024]{1,0}, bf16[2048,1024]{1,0}) fusion(%s.0, %s.1, %b), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.2
  %f.1 = bf16[512,1024]{1,0} get-tuple-element(%f), index=1
  %f.2 = bf16[2048,1024]{1,0} get-tuple-element(%f), index=2
  %d = bf16[2048,1024]{1,0} fusion(%f.1, %f.2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done.3"""  # noqa: E501


def test_an_asynchronous_gather_in_three_fusions_is_one():
  gather = Collective("all-gather", 4 * MIB, 1, False, True, 4)
  assert collectives(RUN_IN_PIECES, IN_PIECES) == (gather,)


def test_an_asynchronous_gather_moves_its_bytes_once():
  entry = "ENTRY %main (x: bf16[]) -> bf16[] {\n  %x = bf16[512,1024]{1,0} parameter(0)\n  "
  module = parse_module(HEADER + IN_PIECES + entry + RUN_IN_PIECES + "\n}\n")
  copied = 4 * MIB  # to VMEM, where the product takes and leaves it
  assert module.hbm_bytes == (1 + 4) * MIB + copied


def test_loops_multiply_and_equal_collectives_are_one():
  body = """%body (p: (s32[], bf16[512,1024])) -> (s32[], bf16[512,1024]) {
  %p = (s32[], bf16[512,1024]{1,0}) parameter(0)
  %w = bf16[512,1024]{1,0} get-tuple-element(%p), index=1
  %a = bf16[2048,1024]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  %b = bf16[2048,1024]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
}

%condition (p: (s32[], bf16[512,1024])) -> pred[] {
  %p = (s32[], bf16[512,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(36)
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

"""
  lines = """%w = (s32[], bf16[512,1024]{1,0}) while(%t), condition=%condition, body=%body
  %c = bf16[2048,1024]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}"""
  inside, outside = collectives(lines, body)
  assert inside == Collective("all-gather", 4 * MIB, 72, True, False, 4)
  assert outside == Collective("all-gather", 4 * MIB, 1, False, False, 4)


def test_what_another_core_does_is_asynchronous():
  off = """%offloaded (p: bf16[512,1024]) -> bf16[2048,1024] {
  %p = bf16[512,1024]{1,0} parameter(0)
  ROOT %g = bf16[2048,1024]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

"""
  line = (
    "%s = ((bf16[512,1024]{1,0}), bf16[2048,1024]{1,0}, u32[]{:S(8)}) async-start(%x), "
    'async_execution_thread="sparsecore", calls=%offloaded'
  )
  assert collectives(line, off) == (Collective("all-gather", 4 * MIB, 1, False, True, 4),)
