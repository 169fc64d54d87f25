"""How arrays lie on many chips: the mesh, which of its axes cuts what, and what chips exchange.

A step is written as what one chip does (`on_chips`): there the arrays are the chip's own parts, and
the functions below say where it needs those of others. Outside of `on_chips`, and on one chip,
every axis has size 1 and they do nothing. This is the only file that names axes of the mesh.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msjax.config import MeshConfig, ModelConfig, TrainConfig
from msjax.errors import InputError

# `fsdp` is two axes of the mesh, one for each physical axis of the slice that it lies on: TPUs
# scatter a sum along one physical axis, but along two at once they sum it whole on every chip.
_FSDP = ("fsdp_x", "fsdp_y")
_MESH_AXES = ("slice", "data", *_FSDP, "model")

# What cuts an axis of an array, by the name that models give it.
_RULES = {
  "batch": ("slice", "data", *_FSDP),
  "cells": ("model",),  # of activations between the parts of a layer
  "heads": ("model",),
  "mlp": ("model",),
  "embed": _FSDP,  # D of the layers' matrices
  "width": (*_FSDP, "model"),  # D of the embedding and the output matrix
  "vocab": ("model",),  # of logits
}


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
  return Mesh(laid_out, _MESH_AXES, axis_types=(AxisType.Auto,) * len(_MESH_AXES))


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
    always = slices if "slice" in _RULES[self.name] else 1  # that many cut it in any case
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
    _Cut("config.model.dim", model.dim, "width", "config.mesh.fsdp x model"),
    _Cut(of_batch, sequences, "batch", "config.mesh.slices x data x fsdp"),
  ):
    cut.check()


def check_sessions(model: ModelConfig, sessions: int) -> None:
  """Checks that a model and so many sessions can be cut as the mesh in use says; see `check`."""
  for cut in (
    *_of_model(model),
    _Cut("config.model.dim", model.dim, "width", "config.mesh.model"),
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


def spec(*names: str | None) -> PartitionSpec:
  """Says how an array is cut whose axes have these names; None for one that is not."""
  return PartitionSpec(*(_RULES.get(name) for name in names))


def placed(shapes: Any, specs: Any) -> Any:
  """Says of a tree of `jax.ShapeDtypeStruct`s how each array lies on the mesh in use, if any."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return shapes
  at = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(at, shapes, specs)


def put(arrays: Any, specs: Any) -> Any:
  """Puts arrays on the mesh in use, if any; those that lie there as specs say stay as they are."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return arrays
  return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, specs)


def rows_here(count: int) -> list[int]:
  """Returns which of `count` sequences the devices of this process hold; all without a mesh."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return list(range(count))
  lies = NamedSharding(mesh, spec("batch"))
  held = lies.addressable_devices_indices_map((count,)).values()
  return sorted({row for (rows,) in held for row in range(count)[rows]})


def joined(rows: Any, axis: int, count: int) -> Any:
  """Makes a batch of what each process has of it.

  Args:
    rows: tree of arrays whose `axis` has the sequences of `rows_here`.
    axis: of sequences.
    count: of sequences in all processes together.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return rows
  lies = NamedSharding(mesh, spec(*[None] * axis, "batch"))
  whole = lambda x: (*x.shape[:axis], count, *x.shape[axis + 1 :])
  make = lambda x: jax.make_array_from_process_local_data(lies, x, whole(x))
  return jax.tree.map(make, rows)


def sizes() -> dict[str, int]:
  """Returns the axes of the mesh in use that are longer than 1, as the config calls them."""
  shape = jax.sharding.get_mesh().shape
  all_sizes = {
    "slices": shape["slice"],
    "data": shape["data"],
    "fsdp": chips("embed"),
    "model": shape["model"],
  }
  return {name: size for name, size in all_sizes.items() if size > 1}


def described() -> str:
  """Names the mesh in use, as in `8 TPU v5 lite devices (fsdp 4 x model 2)`."""
  devices = jax.sharding.get_mesh().devices
  cut = " x ".join(f"{name} {size}" for name, size in sizes().items())
  of_kind = f"{devices.size} {devices.flat[0].device_kind} device{'s' * (devices.size > 1)}"
  return f"{of_kind} ({cut})" if cut else of_kind


def on_chips(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Makes of what one chip does what all chips of the mesh in use do; without a mesh it is `f`."""
  if jax.sharding.get_abstract_mesh().empty:
    return f
  # Pallas calls do not say over which axes their results vary, so nobody can check it.
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def made(make: Callable, specs: Any, **jit: Any) -> jax.stages.Wrapped:
  """Jits what makes arrays that are cut like `specs`, so that each chip makes its own part."""
  if not jax.sharding.get_abstract_mesh().empty:
    jit["out_shardings"] = specs
  return jax.jit(make, **jit)


def chips(name: str) -> int:
  """Into how many parts the mesh in use cuts the axis `name`."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(axis, 1) for axis in _RULES[name])


def size(name: str) -> int:
  """Into how many parts the axis `name` is cut where this is called."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in _axes(name))


def index(name: str) -> jax.Array | int:
  """Which of these parts this chip has."""
  axes = _axes(name)
  return jax.lax.axis_index(axes) if axes else 0


def _axes(name: str) -> tuple[str, ...]:
  """Axes of the mesh that cut `name`, on a chip; none elsewhere, and none of size 1."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in _RULES[name] if a in mesh.manual_axes and mesh.shape[a] > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, name: str, axis: int) -> jax.Array:
  """Joins the parts along an axis that `name` cuts. Its gradient is scattered: see `scatter`."""
  axes = _axes(name)
  return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def scatter(x: jax.Array, name: str, axis: int) -> jax.Array:
  """Sums over the chips that `name` lies on, and leaves each its part of an axis.

  One axis of the mesh after another: over two physical axes at once libtpu 0.0.52 would sum the
  whole array on every chip and then cut it.
  """
  for mesh_axis in _axes(name):
    x = jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=axis, tiled=True)
  return x


gather.defvjp(
  lambda x, name, axis: (gather(x, name, axis), None),
  lambda name, axis, _, g: (scatter(g, name, axis),),
)


def exchange(x: jax.Array, name: str, cut: int, join: int) -> jax.Array:
  """Cuts an axis among the chips that `name` lies on and joins another in return."""
  axes = _axes(name)
  return jax.lax.all_to_all(x, axes, cut, join, tiled=True) if axes else x


def part(x: jax.Array, name: str, axis: int) -> jax.Array:
  """This chip's part of an axis that `name` cuts, of an array that chips have whole."""
  length = x.shape[axis] // size(name)
  return jax.lax.dynamic_slice_in_dim(x, index(name) * length, length, axis)


def own_key(key: jax.Array) -> jax.Array:
  """Makes of a PRNG key that all chips have one of this chip's own."""
  axes = tuple(a for a in _MESH_AXES if a in _axes("batch") + _axes("heads"))
  return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


def total(x: Any, name: str) -> Any:
  """Sums a tree over the chips that `name` lies on; not to be differentiated."""
  axes = _axes(name)
  return jax.lax.psum(x, axes) if axes else x


def highest(x: jax.Array, name: str) -> jax.Array:
  """Takes the maximum over the chips that `name` lies on; not to be differentiated."""
  axes = _axes(name)
  return jax.lax.pmax(x, axes) if axes else x


def summed_gradients(gradients: Any, specs: Any) -> Any:
  """Sums what every chip has worked out for its own cells, where parameters lie on more chips."""

  def over_the_rest(gradient, of_parameter):
    cut = jax.tree.leaves(tuple(of_parameter))
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in mesh.manual_axes if a not in cut and mesh.shape[a] > 1)
    return jax.lax.psum(gradient, axes) if axes else gradient

  return jax.tree.map(over_the_rest, gradients, specs)


class Residual(NamedTuple):
  """How activations [B, L, D] lie between the parts of a layer on chips that share it.

  Attributes:
    whole: makes of the residual what a part reads: all cells.
    part: makes of what a chip's heads or MLP neurons add up to what is added to the residual.
  """

  whole: Callable[[jax.Array], jax.Array]
  part: Callable[[jax.Array], jax.Array]


# Each chip has some of the cells: what is saved for the backward pass is cut too.
CELLS_CUT = Residual(
  whole=lambda x: gather(x, "cells", 1),
  part=lambda x: scatter(x, "cells", 1),
)
# Every chip has all cells.
CELLS_WHOLE = Residual(whole=lambda x: x, part=lambda x: total(x, "cells"))
