"""What the axes of every parameter are called; sharding.py knows what cuts them."""

from typing import Any

import jax

from msjax import sharding

# By the parameter's own name; stacked layers have one more axis before these.
_AXES = {
  "embed": (None, "table_dim"),
  "head": (None, "table_dim"),
  "columns": (None, "vocab"),
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
    names = [name for key in path if (name := _name(key)) in _AXES]
    if not names:
      raise ValueError(f"{jax.tree_util.keystr(path)}: no parameter of this name is known; list it")
    axes = _AXES[names[-1]]
    return sharding.spec(*[None] * (leaf.ndim - len(axes)), *axes)

  return jax.tree_util.tree_map_with_path(of, tree)


def _name(key) -> str | None:
  """What a step of a path is called, be it into a dict or into an object."""
  return getattr(key, "key", getattr(key, "name", None))
