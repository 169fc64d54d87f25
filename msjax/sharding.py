"""How arrays lie on the chips of a mesh, and what these exchange.

A step is written as what one chip does (`on_chips`): there the arrays are the chip's own parts, and
the functions below say where it needs those of others. Outside of `on_chips`, and on one chip,
every axis has size 1 and they do nothing. Beside mesh.py no other file names axes of the mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

# `fsdp` is two axes of the mesh, one for each physical axis of the slice that it lies on: TPUs
# scatter a sum along one physical axis, but along two at once they sum it whole on every chip.
_FSDP = ("fsdp_x", "fsdp_y")
MESH_AXES = ("slice", "data", *_FSDP, "model")

# What cuts an axis of an array, by the name that models give it.
_RULES = {
  "batch": ("slice", "data", *_FSDP),
  "cells": ("model",),  # of activations between the parts of a layer
  "heads": ("model",),
  "mlp": ("model",),
  "layer_dim": _FSDP,  # D of the layers' matrices
  "table_dim": (*_FSDP, "model"),  # D of the embedding and the output matrix
  "vocab": ("model",),  # of logits
}


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


def empty(make: Callable[[], Any], specs: Any) -> Any:
  """Makes arrays of constants that are cut like `specs`; without a mesh nothing is compiled."""
  mesh = jax.sharding.get_abstract_mesh()
  return make() if mesh.empty else made(make, specs)()


def cut_by(name: str) -> tuple[str, ...]:
  """Which axes of the mesh cut the axis `name`."""
  return _RULES[name]


def chips(name: str) -> int:
  """Into how many parts the mesh in use cuts the axis `name`."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(axis, 1) for axis in cut_by(name))


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
  return tuple(a for a in cut_by(name) if a in mesh.manual_axes and mesh.shape[a] > 1)


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
  axes = tuple(a for a in MESH_AXES if a in _axes("batch") + _axes("heads"))
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
