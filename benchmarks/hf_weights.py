"""Weights of a Hugging Face decoder as msjax parameters, for benchmarks and oracle tests."""

from collections.abc import Mapping

import jax
import numpy as np

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


def params_from_hf(weights: Mapping[str, np.ndarray], like: Params) -> Params:
  """Returns msjax parameters shaped as `like` (arrays or their shapes), filled from `weights`.

  Hugging Face keeps a matrix as [out, in] and one entry a layer; msjax keeps [in, out], heads on
  axes of their own, and stacks the layers.
  """

  def leaf(path, x):
    name = path[-1].key
    if len(path) == 1:
      return np.asarray(weights[_OUTER[name]])
    layers = [weights[f"model.layers.{i}.{_LAYER[name]}"] for i in range(x.shape[0])]
    return np.stack([np.asarray(w).T.reshape(x.shape[1:]) for w in layers])

  return jax.tree_util.tree_map_with_path(leaf, like)
