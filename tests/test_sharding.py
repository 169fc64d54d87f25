"""What chips hold and exchange, against NumPy."""

import jax
import numpy as np
import pytest
from eight_devices import mesh, on_eight_devices

from msjax import sharding
from msjax.mesh import described

# An axis that is cut lies in the order of the chips.

MESHES = pytest.mark.parametrize(
  ("sizes", "chips"),
  [({"fsdp": 8}, 8), ({"fsdp": (2, 2), "model": 2}, 8), ({"data": 2, "fsdp": 2, "model": 2}, 4)],
  ids=str,
)
EIGHT = {"slices": 2, "fsdp": 2, "model": 2}


def run(sizes, f, in_specs, out_specs, *args):
  """What `f` makes on all chips of arrays whose axes have these names."""
  cut = lambda tree: jax.tree.map(
    lambda names: sharding.spec(*names), tree, is_leaf=lambda x: isinstance(x, tuple)
  )
  in_specs, out_specs = tuple(cut(in_specs)), cut(out_specs)
  with jax.set_mesh(mesh(**sizes)):
    return jax.device_get(jax.jit(sharding.on_chips(f, in_specs, out_specs))(*args))


def numbers(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def gather(x):
  return sharding.gather(x, "table_dim", 1)[None]


@MESHES
def test_gathering_joins_the_parts_on_every_chip(sizes, chips):
  x = numbers(3, 16)
  whole = on_eight_devices(run, sizes, gather, [(None, "table_dim")], ("table_dim",), x)
  np.testing.assert_array_equal(whole, np.stack([x] * chips))


def scatter(x):
  return sharding.scatter(x[0], "table_dim", 1)


def gradient_of_gather(x, weights):
  return jax.grad(lambda x: (weights * gather(x)).sum())(x)


@MESHES
def test_scattering_sums_and_is_the_gradient_of_gathering(sizes, chips):
  """Every chip has weights of its own."""
  x, weights = numbers(3, 16), numbers(chips, 3, 16)
  sums = on_eight_devices(run, sizes, scatter, [("table_dim",)], (None, "table_dim"), weights)
  np.testing.assert_allclose(sums, weights.sum(0), atol=1e-6)
  specs = [(None, "table_dim"), ("table_dim",)]
  of_gather = on_eight_devices(
    run, sizes, gradient_of_gather, specs, (None, "table_dim"), x, weights
  )
  np.testing.assert_array_equal(of_gather, sums)


def exchange(x):
  return sharding.exchange(x, "table_dim", cut=0, join=1)


def exchange_back(x):
  return sharding.exchange(exchange(x), "table_dim", cut=1, join=0)


@MESHES
def test_exchanging_cuts_another_axis_and_back(sizes, chips):
  x = numbers(16, 8)
  rows = on_eight_devices(run, sizes, exchange, [(None, "table_dim")], ("table_dim",), x)
  np.testing.assert_array_equal(rows, x)
  columns = on_eight_devices(
    run, sizes, exchange_back, [(None, "table_dim")], (None, "table_dim"), x
  )
  np.testing.assert_array_equal(columns, x)


def part_and_index(x):
  index = np.zeros(1, np.int32) + sharding.index("table_dim")
  return [sharding.part(x, "table_dim", 1), index, index * 0 + sharding.size("table_dim")]


@MESHES
def test_every_chip_knows_its_part(sizes, chips):
  x = numbers(3, 16)
  specs = [(None, "table_dim"), ("table_dim",), ("table_dim",)]
  parts, indices, count = on_eight_devices(run, sizes, part_and_index, [()], specs, x)
  np.testing.assert_array_equal(parts, x)
  np.testing.assert_array_equal(indices, np.arange(chips))
  np.testing.assert_array_equal(count, chips)


def sum_and_highest(x):
  return [sharding.total({"sum": x}, "batch"), sharding.highest(x, "batch")]


def test_sums_and_maxima_are_taken_over_the_axes_of_a_name():
  x = numbers(4, 6)
  sums, top = on_eight_devices(
    run,
    EIGHT,
    sum_and_highest,
    [("batch", "heads")],
    [{"sum": (None, "heads")}, (None, "heads")],
    x,
  )
  np.testing.assert_allclose(sums["sum"], x.sum(0, keepdims=True), atol=1e-6)
  np.testing.assert_array_equal(top, x.max(0, keepdims=True))


def sum_gradients(x):
  specs = {"everywhere": sharding.spec(None), "cut": sharding.spec("table_dim")}
  return sharding.summed_gradients(dict.fromkeys(specs, x[0]), specs)


def test_gradients_are_summed_over_the_chips_that_have_the_same_parameters():
  x = numbers(4, 2)  # a number of each chip's
  names = {"everywhere": (None,), "cut": ("table_dim",)}
  sums = on_eight_devices(run, EIGHT, sum_gradients, [("batch", "heads")], names, x)
  np.testing.assert_allclose(sums["everywhere"], x.sum(keepdims=True)[0], atol=1e-6)
  by_chip = x.reshape(2, 2, 2)  # slice, fsdp, model
  np.testing.assert_allclose(sums["cut"], by_chip.sum(0).reshape(-1), atol=1e-6)


def draw():
  return jax.random.bits(sharding.own_key(jax.random.key(0)), (1, 1))


@pytest.mark.parametrize("sizes", [EIGHT, {"data": 2, "fsdp": (2, 2)}, {"model": 8}], ids=str)
def test_every_chip_draws_its_own(sizes):
  bits = on_eight_devices(run, sizes, draw, [], ("batch", "heads"))
  assert bits.size == np.unique(bits).size == 8


def test_where_nothing_is_cut_nothing_happens():
  x, key = numbers(2, 3), jax.random.key(0)
  for same in (
    sharding.gather(x, "table_dim", 1),
    sharding.scatter(x, "table_dim", 1),
    sharding.exchange(x, "table_dim", 0, 1),
    sharding.total(x, "batch"),
    sharding.highest(x, "batch"),
    sharding.part(x, "table_dim", 1),
    sharding.summed_gradients(x, sharding.spec()),
  ):
    np.testing.assert_array_equal(same, x)
  assert (sharding.size("table_dim"), sharding.chips("table_dim"), sharding.index("table_dim")) == (
    1,
    1,
    0,
  )
  assert sharding.own_key(key) is key
  assert sharding.on_chips(draw, (), ()) is draw
  assert sharding.rows_here(3) == [0, 1, 2]
  assert sharding.joined(x, 0, 2) is x


def in_use(sizes):
  with jax.set_mesh(mesh(**sizes)):
    batch = sharding.joined({"x": numbers(3, 8, 2)}, 1, 8)["x"]
    places = {shard.device: shard.index[1] for shard in batch.addressable_shards}
    return (
      (described(), sharding.rows_here(8)),
      (
        jax.device_get(batch),
        [places[device] for device in sorted(places, key=lambda device: device.id)],
      ),
      sharding.placed(jax.ShapeDtypeStruct((8, 3), "int8"), sharding.spec("batch")).sharding.spec,
    )


def test_the_mesh_in_use():
  told, (batch, rows), spec = on_eight_devices(in_use, EIGHT)
  assert told == ("8 cpu devices (slices 2 x fsdp 2 x model 2)", list(range(8)))
  np.testing.assert_array_equal(batch, numbers(3, 8, 2))
  assert rows == [slice(2 * (chip // 2), 2 * (chip // 2) + 2) for chip in range(8)]
  assert spec == sharding.spec("batch")
  told, *_ = on_eight_devices(in_use, {})
  assert told == ("1 cpu device", list(range(8)))
