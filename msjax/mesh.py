"""Which devices make up a mesh, and whether a model and a batch can be cut by it."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from msjax.config import MeshConfig, ModelConfig, TrainConfig
from msjax.errors import InputError
from msjax.sharding import MESH_AXES, chips, cut_by


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays devices out as a mesh; axes of one device stand for what is not cut.

  Args:
    config: sizes; `fsdp` 0 takes all devices that the others leave.
    devices: all that there are by default.

  Raises:
    InputError: the sizes do not make up the devices, or `slices` is not how many they are of.
  """
  devices = jax.devices() if devices is None else devices
  _check_slices(config.slices, devices)
  of_slice, rest = divmod(len(devices), config.slices)
  if rest:
    raise InputError(
      f"config.mesh.slices: {config.slices} does not divide {len(devices)} devices; "
      f"{_nearest_divisor(config.slices, len(devices))} would"
    )
  fixed = config.data * config.model
  fsdp = config.fsdp or max(of_slice // fixed, 1)
  if fixed * fsdp != of_slice:
    sizes = f"data {config.data} x fsdp {config.fsdp or 'the rest'} x model {config.model}"
    model = _nearest_divisor(config.model, of_slice)
    data = _nearest_divisor(config.data, of_slice // model)
    raise InputError(
      f"config.mesh: {sizes} does not make up {of_slice} devices"
      f"{' of a slice' if config.slices > 1 else ''}; data {data} x fsdp "
      f"{of_slice // model // data} x model {model} would"
    )
  shape = (config.data, *_physical(fsdp, devices), config.model)
  laid_out = _laid_out(config.slices, shape, devices)
  return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def decode_mesh(model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays devices out for decoding: `model` of them share a model, the rest serve other sessions.

  Args:
    model: a divisor of the number of devices.
    devices: all that there are by default.

  Raises:
    InputError: `model` is no such divisor.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) % model:
    raise InputError(
      f"config.mesh.model: {model} does not divide {len(devices)} devices; "
      f"{_nearest_divisor(model, len(devices))} would"
    )
  return make_mesh(MeshConfig(data=len(devices) // model, fsdp=1, model=model), devices)


def _check_slices(slices: int, devices: Sequence[jax.Device]) -> None:
  """Checks that no axis but `slice` crosses the slow network between slices of TPUs."""
  if devices[0].platform != "tpu":
    return  # simulated ones are of as many slices as one likes
  there = len({getattr(device, "slice_index", 0) for device in devices})
  if slices != there:
    raise InputError(
      f"config.mesh.slices: {slices} is not how many slices the devices are of; expected {there}"
    )


def _physical(fsdp: int, devices: Sequence[jax.Device]) -> tuple[int, int]:
  """Cuts `fsdp` in two: the longest side of the slice that goes into it, and what is left."""
  places = [device.coords for device in devices if hasattr(device, "coords")]
  sides = [len(set(side)) for side in zip(*places)]
  y = max((side for side in sides if fsdp % side == 0), default=fsdp)
  return fsdp // y, y


def _laid_out(slices: int, shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices as [slice, data, fsdp_x, fsdp_y, model], neighbours on the wires side by side."""
  if devices[0].platform != "tpu":
    return np.array(devices).reshape(slices, *shape)
  if slices == 1:
    flat = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return flat[None]
  return mesh_utils.create_hybrid_device_mesh(
    (1, *shape), (slices, *(1 for _ in shape)), devices, allow_split_physical_axes=True
  )


class _Cut(NamedTuple):
  """What the mesh in use is to cut.

  Attributes:
    field: what users call it.
    value: of the field.
    name: of the axis.
    axes: what users call the axes of the mesh that cut it.
    divides: what the value has to divide besides; 0 for nothing.
  """

  field: str
  value: int
  name: str
  axes: str
  divides: int = 0

  def check(self) -> None:
    """Checks that the chips get equal parts."""
    if self.value % chips(self.name):
      raise InputError(
        f"{self.field}: {self.value} cannot be dealt out to {chips(self.name)} chips "
        f"({self.axes}); expected {', or '.join(self._alternatives())}"
      )

  def _alternatives(self) -> Iterator[str]:
    """The nearest value for this mesh; the nearest number of chips, of those that there are."""
    parts, mesh = chips(self.name), jax.sharding.get_abstract_mesh()
    multiples = range(parts, self.value + parts + 1, parts)
    if values := [n for n in multiples if self.divides % n == 0]:
      yield str(min(values, key=lambda n: abs(n - self.value)))
    slices = mesh.shape["slice"]
    always = slices if "slice" in cut_by(self.name) else 1  # that many cut it in any case
    if self.value % always == 0:
      common = math.gcd(self.value // always, mesh.size // slices)
      fewer = always * _nearest_divisor(parts // always, common)
      yield f"{fewer} chip{'s' * (fewer > 1)}"


def check(model: ModelConfig, train: TrainConfig) -> None:
  """Checks that a model and a batch can be cut as the mesh in use says.

  Raises:
    InputError: they cannot; it names the nearest that could.
  """
  sequences = train.batch // train.micro_batches
  of_batch = "config.train.batch / config.train.micro_batches"
  for cut in (
    *_of_model(model),
    _Cut("config.model.dim", model.dim, "table_dim", "config.mesh.fsdp x model"),
    _Cut(of_batch, sequences, "batch", "config.mesh.slices x data x fsdp"),
  ):
    cut.check()


def check_sessions(model: ModelConfig, sessions: int) -> None:
  """Checks that a model and so many sessions can be cut as the mesh in use says; see `check`."""
  for cut in (
    *_of_model(model),
    _Cut("config.model.dim", model.dim, "table_dim", "config.mesh.model"),
    _Cut("sessions", sessions, "batch", "devices / config.mesh.model"),
  ):
    cut.check()


def _of_model(model: ModelConfig) -> tuple[_Cut, ...]:
  by = "config.mesh.model"
  return (
    _Cut("config.model.kv_heads", model.kv_heads, "heads", by, divides=model.heads),
    _Cut("config.model.mlp_dim", model.mlp_dim, "mlp", by),
  )


def _nearest_divisor(wanted: int, n: int) -> int:
  return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


def sizes() -> dict[str, int]:
  """Returns the axes of the mesh in use that are longer than 1, as the config calls them."""
  shape = jax.sharding.get_mesh().shape
  all_sizes = {
    "slices": shape["slice"],
    "data": shape["data"],
    "fsdp": chips("layer_dim"),
    "model": shape["model"],
  }
  return {name: size for name, size in all_sizes.items() if size > 1}


def described() -> str:
  """Names the mesh in use, as in `8 TPU v5 lite devices (fsdp 4 x model 2)`."""
  devices = jax.sharding.get_mesh().devices
  cut = " x ".join(f"{name} {size}" for name, size in sizes().items())
  of_kind = f"{devices.size} {devices.flat[0].device_kind} device{'s' * (devices.size > 1)}"
  return f"{of_kind} ({cut})" if cut else of_kind
