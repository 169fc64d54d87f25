"""Hugging Face's names and layouts for the parameters of msjax: one table.

Hugging Face keeps a matrix as [out, in] and one tensor a layer; msjax keeps [in, out], heads on
axes of their own, and stacks the layers.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from msjax.errors import InputError
from msjax.training.state import Params

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STREAM_EMBEDDING = "model.channel_embedding.weight"  # as the official release calls it

_OUTER = {
  "embed": EMBEDDING,
  "stream_embed": STREAM_EMBEDDING,
  "norm": "model.norm.weight",
  "head": HEAD,
}
_LAYER = {
  "attention_norm": "input_layernorm.weight",
  "mlp_norm": "post_attention_layernorm.weight",
  "q_norm": "self_attn.q_norm.weight",
  "k_norm": "self_attn.k_norm.weight",
  **{name: f"self_attn.{name}_proj.weight" for name in "qkv"},
  **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
  "out": "self_attn.o_proj.weight",
  "out_bias": "self_attn.o_proj.bias",
  **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
  **{f"{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
}


class Tensor(NamedTuple):
  """A tensor of Hugging Face, and the part of a parameter that it holds.

  Attributes:
    name: as in `model.layers.3.mlp.up_proj.weight`.
    shape: there.
    path: of the parameter, as in ("layers", "mlp", "up").
    layer: index on the parameter's first axis; None where it has none of layers.
    part: shape of the parameter, without layers.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  layer: int | None
  part: tuple[int, ...]

  def to_msjax(self, tensor: np.ndarray) -> np.ndarray:
    """Returns the parameter, or its layer; a view where that is possible."""
    return (tensor.T if self._is_matrix else tensor).reshape(self.part)

  def to_hf(self, part: np.ndarray) -> np.ndarray:
    """Returns the tensor; a view where that is possible."""
    return part.reshape(self.shape[::-1]).T if self._is_matrix else part.reshape(self.shape)

  @property
  def _is_matrix(self) -> bool:
    return self.layer is not None and len(self.shape) == 2


def tensors(params: Params) -> Iterator[Tensor]:
  """Yields every tensor of a model with these parameters (whatever has a shape), in their order;
  the layers of a parameter follow one another."""
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tuple(key.key for key in keys)
    if path[0] != "layers":
      yield Tensor(_OUTER[path[-1]], tuple(leaf.shape), path, None, tuple(leaf.shape))
      continue
    layers, *part = leaf.shape
    shape = _layer_shape(path[-1], tuple(part))
    for i in range(layers):
      yield Tensor(f"model.layers.{i}.{_LAYER[path[-1]]}", shape, path, i, tuple(part))


def _layer_shape(name: str, part: tuple[int, ...]) -> tuple[int, ...]:
  """The shape at Hugging Face of a layer's parameter."""
  if not _LAYER[name].endswith("proj.weight"):
    return (math.prod(part),)
  inputs = math.prod(part[:-1]) if name == "out" else part[0]
  return math.prod(part) // inputs, inputs


def check(shapes: Mapping[str, tuple[int, ...]], like: Params, where: str) -> tuple[str, ...]:
  """Checks a checkpoint before any of it is read; returns the tensors that nothing takes.

  Args:
    shapes: of its tensors, by name.
    like: parameters, or their shapes.
    where: names the checkpoint in errors.

  Raises:
    InputError: a tensor is missing, has another shape, or belongs to another model of the family.
  """
  unused = dict.fromkeys(sorted(shapes))
  for tensor in tensors(like):
    if tensor.name not in shapes:
      raise InputError(f"{where}: {tensor.name} is missing; expected shape {tensor.shape}")
    if shapes[tensor.name] != tensor.shape:
      raise InputError(
        f"{where}: {tensor.name}: shape {shapes[tensor.name]}; expected {tensor.shape}"
      )
    del unused[tensor.name]
  for name in unused:
    if _is_known(name) and name != HEAD:  # a tied head may be there twice
      raise InputError(f"{where}: {name} is there, but config.json describes a model without")
  return tuple(unused)


def _is_known(name: str) -> bool:
  """Whether a tensor has a place in some model of these families."""
  layer, _, rest = name.removeprefix("model.layers.").partition(".")
  return name in _OUTER.values() or (layer.isdigit() and rest in _LAYER.values())


def read_params(weights: Mapping[str, np.ndarray], like: Params) -> Params:
  """Reads float32 parameters straight into their shards.

  Holds one tensor of `weights` at a time beside the parameters themselves, and reads none that no
  device of this process has a part of.

  Args:
    weights: tensors by their names at Hugging Face.
    like: `jax.ShapeDtypeStruct`s with shardings; `check` says whether the tensors fit them.
  """
  parts = itertools.groupby(tensors(like), key=lambda tensor: tensor.path)
  leaves = [_read(weights, leaf, list(p)) for leaf, (_, p) in zip(jax.tree.leaves(like), parts)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read(weights, leaf: jax.ShapeDtypeStruct, parts: list[Tensor]) -> jax.Array:
  """One parameter, all its layers."""
  bounds = {
    device: tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
  }
  shards = {b: _aligned(tuple(stop - start for start, stop in b)) for b in bounds.values()}
  for tensor in parts:
    places = [place for b, shard in shards.items() if (place := _place(b, shard, tensor))]
    if places:
      _fill(places, tensor.to_msjax(weights[tensor.name]))
  arrays = [jax.device_put(shards[b], device) for device, b in bounds.items()]
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _place(bounds, shard: np.ndarray, tensor: Tensor) -> tuple[np.ndarray, tuple] | None:
  """Where in a shard a tensor goes, and which part of it; None if none does."""
  index = tuple(slice(start, stop) for start, stop in bounds)
  if tensor.layer is None:
    return shard, index
  first, end = bounds[0]
  return (shard[tensor.layer - first], index[1:]) if first <= tensor.layer < end else None


def _fill(places: list[tuple[np.ndarray, tuple]], found: np.ndarray) -> None:
  """Copies the parts of a tensor to their places."""
  for shard, index in places:
    shard[...] = found[index]


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """An array where the CPU backend likes it, which then takes it without a copy."""
  count = math.prod(shape) * 4
  raw = np.empty(count + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + count].view(np.float32).reshape(shape)


def part_of(params: Params, tensor: Tensor) -> np.ndarray:
  """Reads the parameter that a tensor holds, or its layer."""
  leaf = functools.reduce(operator.getitem, tensor.path, params)
  return np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
