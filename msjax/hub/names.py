"""Hugging Face's names and layouts for the parameters of msjax: one table.

Hugging Face keeps a matrix as [out, in] and one tensor a layer; msjax keeps [in, out], heads on
axes of their own, and stacks the layers.
"""

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from msjax.errors import InputError
from msjax.training.state import Params

STREAM_EMBEDDING = "model.channel_embedding.weight"  # as the official release calls it

_OUTER = {
  "embed": "model.embed_tokens.weight",
  "stream_embed": STREAM_EMBEDDING,
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
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
  """Yields every tensor of a model with these parameters (arrays or their shapes), in their order;
  the layers of a parameter follow one another."""
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = tuple(key.key for key in keys)
    if path[0] != "layers":
      yield Tensor(_OUTER[path[-1]], leaf.shape, path, None, leaf.shape)
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


def read_params(weights: Mapping[str, np.ndarray], like: Params) -> Params:
  """Returns float32 parameters shaped as `like`; holds one tensor of `weights` at a time.

  Raises:
    InputError: a tensor is missing or has another shape.
  """
  params = jax.tree.map(lambda x: np.empty(x.shape, np.float32), like)
  for tensor in tensors(like):
    found = weights.get(tensor.name)
    if found is None:
      raise InputError(f"{weights}: {tensor.name} is missing; expected shape {tensor.shape}")
    if found.shape != tensor.shape:
      raise InputError(f"{weights}: {tensor.name}: shape {found.shape}; expected {tensor.shape}")
    part_of(params, tensor)[...] = tensor.to_msjax(found)
  return params


def part_of(params: Params, tensor: Tensor) -> np.ndarray:
  """Returns the parameter that a tensor holds, or its layer: a view of NumPy's arrays."""
  leaf = functools.reduce(operator.getitem, tensor.path, params)
  return leaf[...] if tensor.layer is None else leaf[tensor.layer]
