"""Meshes, what does not fit on them, and what chips exchange."""

import itertools
import re

import jax
import numpy as np
import pytest
from eight_devices import mesh, on_eight_devices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from msjax import sharding
from msjax.config import MeshConfig, ModelConfig, TrainConfig
from msjax.errors import InputError
from msjax.kernels.static import devices_of

# Meshes.


class Device:
  """One that is only laid out."""

  platform = "cpu"


def devices(count):
  return [Device() for _ in range(count)]


def laid_out(config, count):
  """Sizes of the axes for so many devices; fsdp as one."""
  shape = sharding.make_mesh(config, devices(count)).shape
  fsdp = shape["fsdp_x"] * shape["fsdp_y"]
  return MeshConfig(shape["slice"], shape["data"], fsdp, shape["model"])


@pytest.mark.parametrize(
  ("given", "count", "made"),
  [
    (MeshConfig(), 1, MeshConfig(1, 1, 1, 1)),
    (MeshConfig(), 8, MeshConfig(1, 1, 8, 1)),
    (MeshConfig(model=2), 8, MeshConfig(1, 1, 4, 2)),
    (MeshConfig(data=2, model=2), 8, MeshConfig(1, 2, 2, 2)),
    (MeshConfig(slices=2, model=2), 8, MeshConfig(2, 1, 2, 2)),
    (MeshConfig(data=8), 8, MeshConfig(1, 8, 1, 1)),
    (MeshConfig(fsdp=1, model=8), 8, MeshConfig(1, 1, 1, 8)),
  ],
)
def test_fsdp_takes_the_chips_that_the_others_leave(given, count, made):
  assert laid_out(given, count) == made


some = st.integers(1, 12)


@settings(deadline=None)
@given(st.integers(1, 48), st.builds(MeshConfig, some, some, st.integers(0, 12), some))
def test_a_mesh_that_does_not_make_up_the_devices_names_one_that_does(count, config):
  try:
    made = laid_out(config, count)
  except InputError as error:
    message = str(error)
  else:
    assert made.slices * made.data * made.fsdp * made.model == count
    fsdp = config.fsdp or made.fsdp
    assert made == MeshConfig(config.slices, config.data, fsdp, config.model)
    return
  assert "\n" not in message
  if found := re.fullmatch(
    r"config\.mesh\.slices: (\d+) does not divide (\d+) devices; (\d+) would", message
  ):
    slices, there, better = map(int, found.groups())
    assert (slices, there) == (config.slices, count)
    laid_out(MeshConfig(better), count)
    return
  found = re.fullmatch(
    r"config\.mesh: data (\d+) x fsdp (\d+|the rest) x model (\d+) does not make up (\d+) devices"
    r"( of a slice)?; data (\d+) x fsdp (\d+) x model (\d+) would",
    message,
  )
  data, fsdp, model, there, of_a_slice, *better = found.groups()
  asked = config.data, str(config.fsdp or "the rest"), config.model
  assert (int(data), fsdp, int(model)) == asked
  assert int(there) * config.slices == count
  assert bool(of_a_slice) == (config.slices > 1)
  better = MeshConfig(config.slices, *map(int, better))
  assert laid_out(better, count) == better


def test_a_mesh_near_what_was_asked_for_is_named():
  with pytest.raises(InputError, match=r"data 1 x fsdp the rest x model 5 .* data 1 x fsdp 2 x mo"):
    sharding.make_mesh(MeshConfig(model=5), devices(8))


@pytest.mark.parametrize(("model", "count", "better"), [(3, 8, 2), (16, 8, 8), (5, 6, 6)])
def test_decoding_wants_chips_in_equal_groups(model, count, better):
  message = f"config.mesh.model: {model} does not divide {count} devices; {better} would"
  with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
    sharding.decode_mesh(model, devices(count))
  assert sharding.decode_mesh(better, devices(count)).shape["model"] == better


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
  ("topology", "config", "fsdp"),
  [
    ("v5e:8x8", MeshConfig(), (8, 8)),
    ("v5e:2x4", MeshConfig(), (2, 4)),
    ("v5e:4x4", MeshConfig(model=4), (1, 4)),
    ("v5e:2x4", MeshConfig(model=2), (1, 4)),
    ("v5p:2x2x2", MeshConfig(), (4, 2)),
  ],
)
def test_fsdp_lies_along_the_sides_of_a_slice(topology, config, fsdp):
  laid = sharding.make_mesh(config, devices_of(topology))
  assert (laid.shape["fsdp_x"], laid.shape["fsdp_y"]) == fsdp
  if laid.size > 8:  # of eight JAX makes a ring
    for line in np.moveaxis(laid.devices, 3, -1).reshape(-1, fsdp[1]):  # along fsdp_y
      places = np.array([device.coords for device in line])
      assert np.sum(np.ptp(places, axis=0) > 0) == 1  # one side


@pytest.mark.tpu_compiler
def test_slices_are_those_of_the_devices():
  two = devices_of("v5e:2x2", 2)
  laid = sharding.make_mesh(MeshConfig(slices=2), two).devices
  for s in range(2):
    assert len({device.slice_index for device in laid[s].flat}) == 1
  for slices in (1, 4):
    with pytest.raises(InputError, match=rf"^config\.mesh\.slices: {slices} .*; expected 2$"):
      sharding.make_mesh(MeshConfig(slices=slices), two)


# What cannot be cut.


def abstract(config):
  shape = config.slices, config.data, 1, config.fsdp, config.model
  return jax.sharding.use_abstract_mesh(AbstractMesh(shape, sharding._MESH_AXES))


def complaint(config, check, *args):
  with abstract(config):
    try:
      check(*args)
    except InputError as error:
      return str(error)
  return None


# By field: how it is set, what cuts it, and what else it has to fit.
CUT = {
  "config.model.kv_heads": ("config.mesh.model", lambda m: m.model),
  "config.model.mlp_dim": ("config.mesh.model", lambda m: m.model),
  "config.model.dim": ("config.mesh.fsdp x model", lambda m: m.fsdp * m.model),
  "config.train.batch / config.train.micro_batches": (
    "config.mesh.slices x data x fsdp",
    lambda m: m.slices * m.data * m.fsdp,
  ),
}
few = st.sampled_from([1, 2, 3, 4, 6, 8])


def meshes_of(slices, count):
  """All with slices of so many devices."""
  divisors = [d for d in range(1, count + 1) if count % d == 0]
  return [
    MeshConfig(slices, data, count // model // data, model)
    for data, model in itertools.product(divisors, divisors)
    if count % (model * data) == 0
  ]


@settings(deadline=None)
@given(
  config=st.builds(MeshConfig, st.sampled_from([1, 2, 3]), few, few, few),
  field=st.sampled_from(sorted(CUT)),
  value=st.integers(1, 64),
  groups=st.integers(1, 4),
)
def test_what_cannot_be_dealt_out_names_what_could(config, field, value, groups):
  axes, parts_of = CUT[field]

  def told(config, value):
    fits = 2**12 * 3**5  # whatever the mesh
    m = ModelConfig(dim=fits, heads=fits, kv_heads=fits, mlp_dim=fits)
    t = TrainConfig(batch=2 * fits, micro_batches=2)
    if field == "config.model.kv_heads":
      m.kv_heads, m.heads = value, heads
    elif field.startswith("config.model"):
      setattr(m, field.rpartition(".")[2], value)
    else:
      t.batch = 2 * value
    return complaint(config, sharding.check, m, t)

  heads = groups * value
  parts = parts_of(config)
  message = told(config, value)
  assert (message is None) == (value % parts == 0)
  assume(message)
  start = f"{field}: {value} cannot be dealt out to {parts} chips ({axes}); expected "
  assert message.startswith(start)
  numbers = re.fullmatch(r"(?:(\d+))?(?:, or )?(?:(\d+) chips?)?", message.removeprefix(start))
  better, chips = (number and int(number) for number in numbers.groups())
  assert better or chips
  if better:
    assert told(config, better) is None
    if field == "config.model.kv_heads":
      assert heads % better == 0
    else:  # no multiple is nearer
      assert abs(better - value) == min(value % parts if value > parts else parts, -value % parts)
  if chips:
    meshes = meshes_of(config.slices, config.data * config.fsdp * config.model)
    others = [other for other in meshes if parts_of(other) == chips]
    assert any(told(other, value) is None for other in others)


@pytest.mark.parametrize(
  ("sessions", "model", "message"),
  [
    (
      3,
      4,
      "sessions: 3 cannot be dealt out to 2 chips (devices / config.mesh.model); expected "
      "2, or 1 chip",
    ),
    (
      2,
      8,
      "config.model.kv_heads: 4 cannot be dealt out to 8 chips (config.mesh.model); expected "
      "8, or 4 chips",
    ),
    (2, 4, None),
  ],
)
def test_sessions_are_dealt_out_too(sessions, model, message):
  config = ModelConfig(dim=16, heads=8, kv_heads=4, mlp_dim=16)
  mesh = MeshConfig(data=8 // model, fsdp=1, model=model)
  assert complaint(mesh, sharding.check_sessions, config, sessions) == message


# What chips exchange, against NumPy. An axis that is cut lies in the order of the chips.

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
  return sharding.gather(x, "width", 1)[None]


@MESHES
def test_gathering_joins_the_parts_on_every_chip(sizes, chips):
  x = numbers(3, 16)
  whole = on_eight_devices(run, sizes, gather, [(None, "width")], ("width",), x)
  np.testing.assert_array_equal(whole, np.stack([x] * chips))


def scatter(x):
  return sharding.scatter(x[0], "width", 1)


def gradient_of_gather(x, weights):
  return jax.grad(lambda x: (weights * gather(x)).sum())(x)


@MESHES
def test_scattering_sums_and_is_the_gradient_of_gathering(sizes, chips):
  """Every chip has weights of its own."""
  x, weights = numbers(3, 16), numbers(chips, 3, 16)
  sums = on_eight_devices(run, sizes, scatter, [("width",)], (None, "width"), weights)
  np.testing.assert_allclose(sums, weights.sum(0), atol=1e-6)
  specs = [(None, "width"), ("width",)]
  of_gather = on_eight_devices(run, sizes, gradient_of_gather, specs, (None, "width"), x, weights)
  np.testing.assert_array_equal(of_gather, sums)


def exchange(x):
  return sharding.exchange(x, "width", cut=0, join=1)


def exchange_back(x):
  return sharding.exchange(exchange(x), "width", cut=1, join=0)


@MESHES
def test_exchanging_cuts_another_axis_and_back(sizes, chips):
  x = numbers(16, 8)
  rows = on_eight_devices(run, sizes, exchange, [(None, "width")], ("width",), x)
  np.testing.assert_array_equal(rows, x)
  columns = on_eight_devices(run, sizes, exchange_back, [(None, "width")], (None, "width"), x)
  np.testing.assert_array_equal(columns, x)


def part_and_index(x):
  index = np.zeros(1, np.int32) + sharding.index("width")
  return [sharding.part(x, "width", 1), index, index * 0 + sharding.size("width")]


@MESHES
def test_every_chip_knows_its_part(sizes, chips):
  x = numbers(3, 16)
  specs = [(None, "width"), ("width",), ("width",)]
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
  specs = {"everywhere": sharding.spec(None), "cut": sharding.spec("width")}
  return sharding.summed_gradients(dict.fromkeys(specs, x[0]), specs)


def test_gradients_are_summed_over_the_chips_that_have_the_same_parameters():
  x = numbers(4, 2)  # a number of each chip's
  names = {"everywhere": (None,), "cut": ("width",)}
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
    sharding.gather(x, "width", 1),
    sharding.scatter(x, "width", 1),
    sharding.exchange(x, "width", 0, 1),
    sharding.total(x, "batch"),
    sharding.highest(x, "batch"),
    sharding.part(x, "width", 1),
    sharding.summed_gradients(x, sharding.spec()),
  ):
    np.testing.assert_array_equal(same, x)
  assert (sharding.size("width"), sharding.chips("width"), sharding.index("width")) == (1, 1, 0)
  assert sharding.own_key(key) is key
  assert sharding.on_chips(draw, (), ()) is draw
  assert sharding.rows_here(3) == [0, 1, 2]
  assert sharding.joined(x, 0, 2) is x


def in_use(sizes):
  with jax.set_mesh(mesh(**sizes)):
    batch = sharding.joined({"x": numbers(3, 8, 2)}, 1, 8)["x"]
    places = {shard.device: shard.index[1] for shard in batch.addressable_shards}
    return (
      (sharding.described(), sharding.sizes(), sharding.rows_here(8)),
      (
        jax.device_get(batch),
        [places[device] for device in sorted(places, key=lambda device: device.id)],
      ),
      sharding.placed(jax.ShapeDtypeStruct((8, 3), "int8"), sharding.spec("batch")).sharding.spec,
    )


def test_the_mesh_in_use():
  told, (batch, rows), spec = on_eight_devices(in_use, EIGHT)
  sizes = {"slices": 2, "fsdp": 2, "model": 2}
  assert told == ("8 cpu devices (slices 2 x fsdp 2 x model 2)", sizes, list(range(8)))
  np.testing.assert_array_equal(batch, numbers(3, 8, 2))
  assert rows == [slice(2 * (chip // 2), 2 * (chip // 2) + 2) for chip in range(8)]
  assert spec == sharding.spec("batch")
  told, *_ = on_eight_devices(in_use, {})
  assert told == ("1 cpu device", {}, list(range(8)))
