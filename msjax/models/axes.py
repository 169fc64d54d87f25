"""What the axes of every parameter are called; sharding.py knows what cuts them."""

import dataclasses
from typing import Any

import jax

from msjax import sharding

# By the parameter's own name; stacked layers have one more axis before these.
_AXES = {
  "embed": (None, "table_dim"),
  "head": (None, "table_dim"),
  "unembed": ("vocab", None),
  "stream_embed": (None, None),
  "q": ("layer_dim", "heads", None),
  "k": ("layer_dim", "heads", None),
  "v": ("layer_dim", "heads", None),
  "out": ("heads", None, "layer_dim"),
  "q_bias": ("heads", None),
  "k_bias": ("heads", None),
  "v_bias": ("heads", None),
  "gate": ("layer_dim", "mlp"),
  "up": ("layer_dim", "mlp"),
  "down": ("mlp", "layer_dim"),
  "gate_bias": ("mlp",),
  "up_bias": ("mlp",),
  **dict.fromkeys(
    ("norm", "attention_norm", "mlp_norm", "q_norm", "k_norm", "out_bias", "down_bias"), (None,)
  ),
}
_MATRICES = "q", "k", "v", "out", "gate", "up", "down"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByOutput:
  """A layer whose matrices lie as rows, [outputs, inputs]; heads lie side by side.

  On CPU a product of some rows with them is a dot product for each, of which XLA copies nothing
  first: with ten rows it takes two thirds of the time.
  """

  by_output: Any

  @classmethod
  def of(cls, block: Any) -> "ByOutput":
    """Turns the matrices of a layer."""

    def rows(name, x):
      return x.reshape(-1, x.shape[-1]).T if name == "out" else x.reshape(len(x), -1).T

    return cls(_with_matrices(block, rows))

  def block(self, head_dim: int) -> Any:
    """The layer as all others know it; nothing is moved for it where products follow."""

    def matrix(name, x):
      shapes = {**dict.fromkeys("qkv", (len(x.T), -1, head_dim)), "out": (-1, head_dim, len(x))}
      return x.T.reshape(shapes.get(name, x.T.shape))

    return _with_matrices(self.by_output, matrix)


def _with_matrices(layer, make):
  """Puts `make(name, array)` in the place of each matrix."""

  def of(path, x):
    name = _parameter(path)
    return make(name, x) if name in _MATRICES else x

  return jax.tree_util.tree_map_with_path(of, layer)


def specs(tree: Any) -> Any:
  """How parameters are cut, and whatever else is called after them, such as an optimizer's state.

  Args:
    tree: of arrays, or of shapes.

  Returns:
    The same tree of `PartitionSpec`s.
  """

  def of(path, leaf):
    if not leaf.ndim:  # of no parameter: a count
      return sharding.spec()
    axes = _AXES[name := _parameter(path)]
    if name in _MATRICES and "by_output" in map(_name, path):
      axes = tuple(axis for axis in reversed(axes) if axis)
    return sharding.spec(*[None] * (leaf.ndim - len(axes)), *axes)

  return jax.tree_util.tree_map_with_path(of, tree)


def _parameter(path) -> str:
  """Which one is meant by a path."""
  names = [name for key in path if (name := _name(key)) in _AXES]
  if not names:
    raise ValueError(f"{jax.tree_util.keystr(path)}: no parameter of this name is known; list it")
  return names[-1]


def _name(key) -> str | None:
  """What a step of a path is called, be it into a dict or into an object."""
  return getattr(key, "key", getattr(key, "name", None))
