"""Reading a compiled module: one written by hand, as XLA prints it."""

import math

import pytest

from msjax.kernels.hlo import parse_module

MODULE = """HloModule jit_f

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,128]{1,0:T(8,128)S(1)} negate(%x), backend_config={"estimated_cycles":"10"}
}

%condition.1 (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %more = pred[]{:T(512)} compare(%i, %five), direction=LT
}

ENTRY %main (a: f32[8,128]) -> bf16[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %while = (s32[], f32[8,128]{1,0}) while(%t), condition=%condition.1, body=%body.1
  %k.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%copy-done, %a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"a line of its own"
}}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"100"}]@}
  ROOT %z = bf16[8,128]{1,0} copy(%k.1), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501
F32, BF16 = 8 * 128 * 4, 8 * 128 * 2


def test_modules_tell_their_traffic():
  module = parse_module(MODULE)
  assert module.kernels == ("k.1",)
  assert module.vmem_bytes == 100 + F32
  assert module.xla_cycles == 5 * 10 + 7
  # the copy reads a, each turn of the loop too; k.1 reads a and writes; what follows does both
  assert module.hbm_bytes == F32 + 5 * F32 + (F32 + BF16) + 2 * BF16


def test_a_cost_estimate_stands_for_what_a_kernel_fetches():
  estimate = ',"cost_estimate":{"flops":"1","bytes_accessed":"50000"}'
  told, untold = (parse_module(MODULE.replace("@", x)) for x in (estimate, ""))
  assert told.hbm_bytes - untold.hbm_bytes == (50000 - F32) - (F32 + BF16)


def test_cycles_that_xla_does_not_know_are_not_a_number():
  assert math.isnan(parse_module(MODULE.replace('"7"', f'"{2**63 - 1}"')).xla_cycles)


def test_a_loop_of_unknown_length_counts_once():
  once = parse_module(
    MODULE.replace("%five = s32[]{:T(128)} constant(5)", "%five = s32[] negate(%i)")
  )
  assert parse_module(MODULE).xla_cycles - once.xla_cycles == 4 * 10


PRODUCTS = """HloModule jit_f

%inner (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %c = f32[8,128]{1,0:T(8,128)} convolution(%p, %p), dim_labels=bf_io->bf
}

%outer (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %f = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput, calls=%inner
  ROOT %t = f32[8,128]{1,0:T(8,128)} tanh(%f)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kOutput, calls=%outer, backend_config={"estimated_cycles":"1000"}
  %c = f32[8,128]{1,0:T(8,128)} copy(%b), backend_config={"estimated_cycles":"100"}
  %d = f32[8,128]{1,0:T(8,128)} negate(%c), backend_config={"estimated_cycles":"10"}
  ROOT %e = f32[8,128]{1,0:T(8,128)} all-reduce(%d), replica_groups={{0,1}}, to_apply=%add, backend_config={"estimated_cycles":"1"}
}
"""  # noqa: E501


def test_cycles_are_told_apart_and_collectives_left_out():
  module = parse_module(PRODUCTS)
  assert (module.matmul_cycles, module.copy_cycles, module.xla_cycles) == (1000, 100, 1110)


@pytest.mark.parametrize(
  ("array", "size"),
  [
    ("pred[8,3]", 24),
    ("f8e4m3fn[8,3]", 24),
    ("s4[8,3]", 12),
    ("c64[8,3]", 192),
    ("bf16[]", 2),
    ("f32[0]", 0),
    ("token[]", 0),
    ("(s8[2], u16[3])", 8),
    ("(s8[2]{0:T(128)S(1)}, u16[3]{0})", 6),
  ],
)
def test_bytes_of_arrays(array, size):
  module = f"ENTRY %main () -> {array} {{\n  ROOT %x = {array} custom-call()\n}}\n"
  assert parse_module(module).hbm_bytes == size
