"""Compiling for a TPU that is not there, and reading what comes out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msjax.errors import InputError
from msjax.kernels import hlo, static
from msjax.kernels.chips import CHIPS
from msjax.kernels.schedule import Trips


def test_without_libtpu_it_is_told_what_to_install(monkeypatch):
  monkeypatch.setattr(static, "libtpu_version", lambda: None)
  with pytest.raises(InputError, match=r"^libtpu.* is not installed: pip install -e '\.\[tpu-"):
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


def read(topology, fn, in_specs, out_specs, *shapes, dtype=jnp.bfloat16):
  """Compiles `fn` for all chips of a topology, on an axis `x`, and reads what they do.

  Args:
    topology: such as `v5e:2x2`.
    fn: what each chip runs.
    in_specs: of its arguments.
    out_specs: of its results.
    shapes: of its arguments, all chips together; that of indices has one dimension.
    dtype: of arguments that are no indices.
  """
  static.compile_for(jnp.sin, (jnp.zeros(8),), topology)  # it sets what libtpu needs to start
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = Mesh(np.array(devices), "x")
  fn = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  args = (
    jax.ShapeDtypeStruct(
      shape, dtype if len(shape) > 1 else jnp.int32, sharding=NamedSharding(mesh, spec)
    )
    for shape, spec in zip(shapes, in_specs)
  )
  _, text = static.compile_with_text(jax.jit(fn).lower(*args))
  return hlo.parse_module(text)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("topology", "chips"), [("v5e:2x2", 4), ("v6e:2x4", 8)])
def test_a_scan_over_layers_reads_weights_once_and_reduces_once_a_layer(topology, chips):
  layers, rows, dim, hidden = 4, 16, 4096, 8192

  def forward(up, down, x):
    layer = lambda x, w: (x + jax.lax.psum(x @ w[0] @ w[1], "x"), None)
    return jax.lax.scan(layer, x, (up, down))[0]

  module = read(
    topology,
    forward,
    (P(None, None, "x"), P(None, "x"), P()),
    P(),
    (layers, dim, hidden * chips),
    (layers, hidden * chips, dim),
    (rows, dim),
  )
  (reduction,) = module.collectives
  assert (reduction.kind, reduction.group) == ("all-reduce", chips)
  assert (reduction.bytes, reduction.count, reduction.in_loop) == (rows * dim * 2, layers, True)
  assert module.hbm_bytes == pytest.approx(2 * layers * dim * hidden * 2, rel=0.01)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_sharded_weights_are_gathered_twice_and_their_gradients_scattered(topology):
  layers, rows, dim = 3, 1024, 2048

  def gradients(weights, x):
    gather = lambda w: jax.lax.all_gather(w, "x", axis=0, tiled=True)
    layer = jax.checkpoint(lambda x, w: (jax.nn.relu(x @ gather(w)), None))
    return jax.grad(lambda weights: jax.lax.scan(layer, x, weights)[0].sum())(weights)

  spec = P(None, "x")
  module = read(topology, gradients, (spec, P("x")), spec, (layers, dim, dim), (4 * rows, dim))
  found = {x.kind: x for x in module.collectives}
  whole = dim * dim * 2
  assert set(found) <= {"all-gather", "reduce-scatter", "collective-permute"}
  assert all(x.in_loop for x in module.collectives)
  gather, scatter = found["all-gather"], found["reduce-scatter"]
  assert (gather.bytes, gather.count, gather.group) == (whole, 2 * layers, 4)
  assert (scatter.count, scatter.group) == (layers, 4)
  assert whole <= scatter.bytes < 1.1 * whole  # the compiler pads
  chip = CHIPS[topology[:3]]
  least = layers * 4 * 2 * rows * dim**2 / chip.flops_per_cycle / chip.cores
  assert least < module.matmul_cycles < 1.5 * least


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_rows_that_a_sparsecore_gathers_are_read(topology):
  rows, words, dim = 20_480, 153_600, 64

  def embed(table, words):
    return jax.lax.all_gather(table[words], "x", axis=0, tiled=True)

  specs = (P(None, "x"), P("x"))
  module = read(topology, embed, specs, P(), (words, 4 * dim), (4 * rows,))
  (gather,) = module.collectives
  assert (gather.kind, gather.bytes, gather.group) == ("all-gather", 4 * rows * dim * 2, 4)
  assert module.hbm_bytes > 2 * rows * dim * 2
  assert math.isfinite(module.xla_cycles)


def test_a_libtpu_that_tells_nothing(monkeypatch):
  monkeypatch.setattr(static, "libtpu_version", lambda: "0.0.1")
  with pytest.raises(InputError, match=r"^libtpu 0\.0\.1 did not tell jaxlib .*pip install 'jax"):
    static.compile_with_text(jax.jit(jnp.sin).lower(1.0))  # as the compiler for CPUs does


@pytest.mark.parametrize(
  ("message", "figures"),
  [
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
      "required for HLO temporaries (66.50G) exceeds available HBM (15.75G). HLO module: jit_f.",
      (66.5 * 2**30, 15.75 * 2**30),
    ),
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
      "memory in memory space hbm. Used 31.50G of 31.24G hbm. Exceeded hbm capacity by 266.24M.",
      (31.5 * 2**30, round(31.24 * 2**30)),
    ),
    ("Used 1.50M of 512.00K hbm. Exceeded ...", (1.5 * 2**20, 2**19)),
    ("Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem. Exceeded ...", None),
    ("INVALID_ARGUMENT: no", None),
  ],
)
def test_how_much_memory_was_missing(message, figures):
  assert static.hbm_overrun(RuntimeError(message)) == figures


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_memory_of_chips_is_what_the_compiler_says(topology, factor):
  size = CHIPS[topology[:3]].hbm_bytes
  x = jax.ShapeDtypeStruct((int(size * factor) >> 16, 1 << 14), jnp.float32)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    static.compile_for(lambda x: x[0, :1024], (x,), topology)
  needed, capacity = static.hbm_overrun(caught.value)
  assert needed == pytest.approx(size * factor, rel=0.002)
  assert capacity == pytest.approx(size, abs=1 << 23)
