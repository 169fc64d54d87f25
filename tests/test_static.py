"""Compiling for a TPU that is not there, and reading what comes out."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from msjax.errors import InputError
from msjax.kernels import static
from msjax.kernels.schedule import Trips


def test_without_libtpu_it_is_told_what_to_install(monkeypatch):
  monkeypatch.setattr(static, "libtpu_version", lambda: None)
  with pytest.raises(InputError, match=r"^libtpu is not installed; .*pip install libtpu$"):
    static.compile_for(jnp.sin, (1.0,), "v5e:2x2")


def add_products(rows=128):
  """Four blocks of rows of x @ y, three to six times, in a kernel."""

  def kernel(x, y, out):
    out[...] = jnp.zeros_like(out)

    def add(_, carry):
      out[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
      return carry

    jax.lax.fori_loop(0, pl.program_id(0) + 3, add, 0)

  block = pl.BlockSpec((rows, 128), lambda i: (i, 0))
  call = pl.pallas_call(
    kernel,
    grid=(4,),
    in_specs=[block, pl.BlockSpec((128, 128), lambda i: (0, 0))],
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct((4 * rows, 128), jnp.float32),
    cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1 << 20),
    name="add_products",
  )
  x = jax.ShapeDtypeStruct((4 * rows, 128), jnp.bfloat16)
  return call, (x, jax.ShapeDtypeStruct((128, 128), jnp.bfloat16))


@pytest.mark.tpu_compiler
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


def measure_all(*rows):
  return [static.measure_here(functools.partial(add_products, n), "v5e:2x2") for n in rows]


@pytest.mark.tpu_compiler
def test_a_process_reads_the_schedule_of_what_it_compiled_last():
  (programs,) = static.fresh_processes([functools.partial(measure_all, 64, 128, 32, 256)])
  assert [k.bodies[0].vmatmuls for p in programs for k in p.kernels.values()] == [4, 8, 2, 16]


def product():
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
  return functools.partial(jnp.dot, preferred_element_type=jnp.float32), (x, x)


@pytest.mark.tpu_compiler
def test_a_program_without_kernels_is_read():
  program = static.measure(product, "v5e:2x2")
  assert not program.kernels
  assert program.flops == pytest.approx(2 * 1024**3, rel=0.01)
  assert program.hbm_bytes >= 1024**2 * (2 + 2 + 4)
  assert program.xla_cycles >= 2 * 1024**3 / program.chip.flops_per_cycle


@pytest.mark.tpu_compiler
def test_a_topology_that_libtpu_does_not_know_is_told():
  with pytest.raises(InputError, match=r"^topology 'v5e:3x77': .*; v5e:2x2 would do$"):
    static.measure(product, "v5e:3x77")
