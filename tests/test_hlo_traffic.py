"""Bytes that XLA's own operations move, in modules that were shortened by hand."""

import pytest

from msjax.kernels.hlo import parse_module

LAYER = 512 * 1024 * 4  # bytes of ONE
STACK = "f32[6,512,1024]{2,1,0:T(8,128)}"
ONE = "f32[1,512,1024]{2,1,0:T(8,128)}"
IN_VMEM = "f32[1,512,1024]{2,1,0:T(8,128)S(1)}"
INDEX = "%i = s32[]{:T(128)S(6)} parameter(1)"


def moved(lines, fused="", branch=max):
  """HBM bytes of lines that may use `%stack`, `%one` and the scalar `%i`, which costs nothing."""
  entry = f"""ENTRY %main (stack: f32[6,512,1024], i: s32[], one: f32[1,512,1024]) -> f32[] {{
  %stack = {STACK} parameter(0)
  {INDEX}
  %one = {ONE} parameter(2)
  {lines}
}}
"""
  return parse_module(f"HloModule jit_f\n\n{fused}{entry}", branch).hbm_bytes


def fused(*lines):
  """A fused computation `%fused` of `%a`, all layers, the scalar `%i` and `%b`, one layer."""
  body = "\n  ".join([A, INDEX, B, *lines])
  return f"%fused (a: f32[], i: s32[], b: f32[]) -> f32[] {{\n  {body}\n}}\n\n"


A, B = f"%a = {STACK} parameter(0)", f"%b = {ONE} parameter(2)"
SLICE = f"%s = {ONE} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={{1,512,1024}}"
UPDATE = f"%u = {STACK} dynamic-update-slice(%a, %b, %i, %i, %i)"


@pytest.mark.parametrize(
  ("line", "layers"),
  [
    (f"%y = {ONE} copy(%one)", 2),
    (f"%y = {ONE} dynamic-slice(%stack, %i, %i, %i)", 2),
    (f"%y = {ONE} slice(%stack), slice={{[0:1], [0:512], [0:1024]}}", 2),
    (f"%y = {IN_VMEM} dynamic-slice(%stack, %i, %i, %i)", 1),
    (f"%y = {STACK} dynamic-update-slice(%stack, %one, %i, %i, %i)", 2),
    (f"%y = {STACK} iota(), iota_dimension=0", 6),
    ("%y = f32[512,1024]{1,0:T(8,128)} bitcast(%one)", 0),
    (f'%y = {STACK} custom-call(), custom_call_target="AllocateBuffer"', 0),
    (
      f"%y = (({STACK}), {IN_VMEM}, s32[]{{:S(2)}}) slice-start(%stack), "
      "slice={[0:1], [0:512], [0:1024]}",
      1,
    ),
    (f"%y = ({ONE}, {ONE}, u32[]{{:S(2)}}) copy-start(%one)", 2),
    (f"%y = ({ONE}, {ONE}) all-gather-start(%one), replica_groups={{{{0,1}}}}", 2),
    (f"%y = {ONE} all-reduce-start(%one), replica_groups={{{{0,1}}}}, to_apply=%add", 2),
  ],
)
def test_operations_on_their_own(line, layers):
  assert moved(line) == layers * LAYER


@pytest.mark.parametrize(
  ("body", "result", "layers"),
  [
    # of all layers one is read, and one is written
    ([SLICE, f"ROOT %n = {ONE} negate(%s)"], ONE, 2),
    # a view of the operand is cut
    (
      [
        "%v = f32[3072,1024]{1,0:T(8,128)} bitcast(%a)",
        "ROOT %s = f32[512,1024]{1,0:T(8,128)} dynamic-slice(%v, %i, %i)",
      ],
      "f32[512,1024]{1,0:T(8,128)}",
      2,
    ),
    # two slices; the whole
    ([SLICE, SLICE.replace("%s", "%t"), f"ROOT %n = {ONE} add(%s, %t)"], ONE, 3),
    ([SLICE, f"ROOT %n = {STACK} add(%a, %s)"], STACK, 12),
    # an update in place reads and writes the update
    (["ROOT " + UPDATE], STACK, 2),
    ([UPDATE, "ROOT %v = f32[3072,1024]{1,0} bitcast(%u)"], "f32[3072,1024]{1,0}", 2),
    ([UPDATE, f"ROOT %t = ({STACK}, {ONE}) tuple(%u, %b)"], f"({STACK}, {ONE})", 3),
    # what it updates is made on the spot, and has to be written
    (
      [f"%m = {STACK} broadcast(%i), dimensions={{}}", "ROOT " + UPDATE.replace("%a", "%m")],
      STACK,
      6 + 1,
    ),
    # rows that are added to are read and written
    ([f"ROOT %n = {STACK} scatter(%a, %i, %b), to_apply=%add"], STACK, 3),
    ([f"ROOT %g = {ONE} gather(%a, %i), slice_sizes={{1,512,1024}}"], ONE, 2),
  ],
)
def test_fusions_count_what_they_touch(body, result, layers):
  line = f"%y = {result} fusion(%stack, %i, %one), kind=kLoop, calls=%fused"
  assert moved(line, fused(*body)) == layers * LAYER


def test_fusions_within_fusions():
  inner = fused(SLICE, f"ROOT %n = {ONE} negate(%s)")
  outer = f"""%outer (p: f32[], i: s32[]) -> f32[] {{
  %p = {STACK} parameter(0)
  {INDEX}
  %x = {ONE} fusion(%p, %i), kind=kLoop, calls=%fused
  ROOT %z = {IN_VMEM} negate(%x)
}}

"""
  line = f"%y = {IN_VMEM} fusion(%stack, %i), kind=kLoop, calls=%outer"
  assert moved(line, inner + outer) == LAYER


def test_an_update_within_a_nested_fusion_is_in_place():
  inner = fused("ROOT " + UPDATE)
  outer = f"""%outer (p: f32[], i: s32[], q: f32[]) -> f32[] {{
  %p = {STACK} parameter(0)
  {INDEX}
  %q = {ONE} parameter(2)
  ROOT %x = {STACK} fusion(%p, %i, %q), kind=kLoop, calls=%fused
}}

"""
  line = f"%y = {STACK} fusion(%stack, %i, %one), kind=kLoop, calls=%outer"
  assert moved(line, inner + outer) == 2 * LAYER
  made = outer.replace("fusion(%p", "fusion(%m").replace(
    "ROOT", f"%m = {STACK} broadcast(%i), dimensions={{}}\n  ROOT"
  )
  assert moved(line, inner + made) == (6 + 1) * LAYER


def test_operands_that_a_fusion_hands_on_are_not_touched():
  body = fused(f"%n = {ONE} negate(%b)", f"ROOT %t = ({STACK}, {ONE}) tuple(%a, %n)")
  line = f"%y = ({STACK}, {ONE}) fusion(%stack, %i, %one), kind=kLoop, calls=%fused"
  alias = ", output_to_operand_aliasing={{0}: (0, {})}"
  assert moved(line.replace(", calls", alias + ", calls"), body) == 2 * LAYER
  assert moved(line, body) == (6 + 6 + 2) * LAYER


def test_a_scan_reads_each_layer_once():
  loop = (
    fused(SLICE, f"ROOT %n = {IN_VMEM} negate(%s)")
    + f"""%body (p: (s32[], f32[6,512,1024])) -> (s32[], f32[6,512,1024]) {{
  %p = (s32[]{{:T(128)S(6)}}, {STACK}) parameter(0)
  %i = s32[]{{:T(128)S(6)}} get-tuple-element(%p), index=0
  %w = {STACK} get-tuple-element(%p), index=1
  %f = {IN_VMEM} fusion(%w, %i), kind=kLoop, calls=%fused
}}

%condition (p: (s32[], f32[6,512,1024])) -> pred[] {{
  %p = (s32[]{{:T(128)S(6)}}, {STACK}) parameter(0)
  %i = s32[]{{:T(128)S(6)}} get-tuple-element(%p), index=0
  %n = s32[]{{:T(128)}} constant(6)
  ROOT %more = pred[]{{:T(512)}} compare(%i, %n), direction=LT
}}

"""
  )
  line = f"%y = (s32[], {STACK}) while(%t), condition=%condition, body=%body"
  assert moved(line, loop) == 6 * LAYER


def test_of_a_conditional_the_dearest_or_the_cheapest_branch_counts():
  branches = f"""%cheap (a: f32[]) -> f32[] {{
  %a = {ONE} parameter(0)
  ROOT %n = {ONE} negate(%a)
}}

%dear (b: f32[]) -> f32[] {{
  %b = {ONE} parameter(0)
  %c = {ONE} negate(%b)
  ROOT %n = {ONE} negate(%c)
}}

"""
  line = f"%y = {ONE} conditional(%i, %one, %one), branch_computations={{%cheap, %dear}}"
  assert moved(line, branches) == 4 * LAYER
  assert moved(line, branches, min) == 2 * LAYER
  pair = "true_computation=%dear, false_computation=%cheap"
  line = f"%y = {ONE} conditional(%i, %one, %one), {pair}"
  assert moved(line, branches) == 4 * LAYER


GATHERED = """%rows (t: f32[6,512,1024], i: s32[]) -> f32[1,512,1024] {
  %t = f32[6,512,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %g = f32[1,512,1024]{2,1,0:T(8,128)} gather(%t, %i), slice_sizes={1,512,1024}
}, execution_thread="sparsecore"

%inner (t: f32[6,512,1024], i: s32[]) -> f32[1,512,1024] {
  %t = f32[6,512,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %f = f32[1,512,1024]{2,1,0:T(8,128)} fusion(%t, %i), kind=kCustom, calls=%rows, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}, execution_thread="sparsecore"

%outer (t: f32[6,512,1024], i: s32[]) -> f32[1,512,1024] {
  %t = f32[6,512,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %c = f32[1,512,1024]{2,1,0:T(8,128)} custom-call(%t, %i), custom_call_target="offload", called_computations={%inner}
}, execution_thread="sparsecore"

ENTRY %main (stack: f32[6,512,1024], i: s32[]) -> f32[1,512,1024] {
  %stack = f32[6,512,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %start = ((), (), (s32[99080]{0:T(1)S(15)}, s32[0]{0})) async-start(), async_execution_thread="sparsecore", calls=%outer
  %update = ((f32[6,512,1024]{2,1,0:T(8,128)}, s32[]{:T(128)S(6)}), f32[1,512,1024]{2,1,0:T(8,128)}, (s32[99080]{0:T(1)S(15)})) async-update(%start, %stack, %i)
  ROOT %done = f32[1,512,1024]{2,1,0:T(8,128)} async-done(%update)
}
"""  # noqa: E501


def test_a_gather_on_a_sparsecore_moves_rows_and_takes_no_cycles():
  module = parse_module("HloModule jit_f\n\n" + GATHERED)
  assert module.hbm_bytes == 2 * LAYER
  assert module.xla_cycles == 0
