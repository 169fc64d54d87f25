"""Meshes, and what cannot be cut by them."""

import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from msjax import mesh
from msjax.config import MeshConfig, ModelConfig, TrainConfig
from msjax.errors import InputError
from msjax.kernels.static import devices_of
from msjax.sharding import MESH_AXES


class Device:
  """One that is only laid out."""

  platform = "cpu"


def devices(count):
  return [Device() for _ in range(count)]


def laid_out(config, count):
  """Sizes of the axes for so many devices; fsdp as one."""
  shape = mesh.make_mesh(config, devices(count)).shape
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
    mesh.make_mesh(MeshConfig(model=5), devices(8))


@pytest.mark.parametrize(("model", "count", "better"), [(3, 8, 2), (16, 8, 8), (5, 6, 6)])
def test_decoding_wants_chips_in_equal_groups(model, count, better):
  message = f"config.mesh.model: {model} does not divide {count} devices; {better} would"
  with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
    mesh.decode_mesh(model, devices(count))
  assert mesh.decode_mesh(better, devices(count)).shape["model"] == better


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
  laid = mesh.make_mesh(config, devices_of(topology))
  assert (laid.shape["fsdp_x"], laid.shape["fsdp_y"]) == fsdp
  if laid.size > 8:  # of eight JAX makes a ring
    for line in np.moveaxis(laid.devices, 3, -1).reshape(-1, fsdp[1]):  # along fsdp_y
      places = np.array([device.coords for device in line])
      assert np.sum(np.ptp(places, axis=0) > 0) == 1  # one side


@pytest.mark.tpu_compiler
def test_slices_are_those_of_the_devices():
  two = devices_of("v5e:2x2", 2)
  laid = mesh.make_mesh(MeshConfig(slices=2), two).devices
  for s in range(2):
    assert len({device.slice_index for device in laid[s].flat}) == 1
  for slices in (1, 4):
    with pytest.raises(InputError, match=rf"^config\.mesh\.slices: {slices} .*; expected 2$"):
      mesh.make_mesh(MeshConfig(slices=slices), two)


# What cannot be cut.


def abstract(config):
  shape = config.slices, config.data, 1, config.fsdp, config.model
  return jax.sharding.use_abstract_mesh(AbstractMesh(shape, MESH_AXES))


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
    return complaint(config, mesh.check, m, t)

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
  laid = MeshConfig(data=8 // model, fsdp=1, model=model)
  assert complaint(laid, mesh.check_sessions, config, sessions) == message
