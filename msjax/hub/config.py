"""config.json of Hugging Face and the model config: Qwen3, Qwen2 (Qwen2.5) and Llama."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from msjax.config import ModelConfig, RopeScaling
from msjax.errors import InputError, nearest

FAMILIES = ("qwen3", "qwen2", "llama")  # model_type
_POSITIONS = 40_960  # rows; RoPE knows no end, but transformers wants a number
# In the order of RopeScaling's fields.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def model_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
  """Returns the model that a config.json describes; `where` names the file in errors.

  Raises:
    InputError: another family, or something of it that msjax does not compute.
  """
  fields = _Fields(hf, where)
  family = fields.take("model_type")
  if family not in FAMILIES:
    raise InputError(
      f"{where}: model_type {family!r}; expected one of {', '.join(FAMILIES)}"
      f"{nearest(str(family), FAMILIES)}"
    )
  fields.expect("hidden_act", "silu")
  if fields.take("use_sliding_window", False):
    fields.expect("sliding_window", None)
  dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
  biased = bool(fields.take("attention_bias", False))
  rope = hf.get("rope_parameters") or {}
  return ModelConfig(
    dim=dim,
    layers=fields.whole("num_hidden_layers"),
    heads=heads,
    kv_heads=fields.whole("num_key_value_heads", heads),
    head_dim=fields.whole("head_dim", 128 if family == "qwen3" else dim // heads),
    mlp_dim=fields.whole("intermediate_size"),
    rope_theta=float(rope.get("rope_theta") or fields.take("rope_theta", 10_000.0)),
    rope_scaling=_rope_scaling(rope or hf.get("rope_scaling") or {}, where),
    norm_eps=float(fields.take("rms_norm_eps", 1e-6)),
    qk_norm=family == "qwen3",
    qkv_bias=family == "qwen2" or biased,
    out_bias=family != "qwen2" and biased,
    mlp_bias=family == "llama" and bool(fields.take("mlp_bias", False)),
    tied_head=bool(fields.take("tie_word_embeddings", False)),
  )


def to_hf(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
  """Returns the config.json of a model; rope and dtype under the names of transformers 4 and 5.

  Raises:
    InputError: no family computes this.
  """
  family = next((f for f in FAMILIES if _is_of(f, model)), None)
  if family is None:
    raise InputError(
      f"config.model: qk_norm={model.qk_norm}, qkv_bias={model.qkv_bias}, "
      f"out_bias={model.out_bias}, mlp_bias={model.mlp_bias}: none of {', '.join(FAMILIES)}"
    )
  name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[family]
  rope: dict[str, Any] = {"rope_type": "default"}
  if model.rope_scaling is not None:
    rope = {"rope_type": "llama3"}
    rope |= dict(zip(_LLAMA3, dataclasses.astuple(model.rope_scaling)))
  old = {"rope_scaling": rope} if model.rope_scaling is not None else {}
  return {
    "architectures": [f"{name}ForCausalLM"],
    "model_type": family,
    "hidden_act": "silu",
    "hidden_size": model.dim,
    "intermediate_size": model.mlp_dim,
    "num_hidden_layers": model.layers,
    "num_attention_heads": model.heads,
    "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_dim,
    "rms_norm_eps": model.norm_eps,
    "attention_bias": family != "qwen2" and model.qkv_bias,
    "mlp_bias": model.mlp_bias,
    "tie_word_embeddings": model.tied_head,
    "vocab_size": vocab_size,
    "max_position_embeddings": _POSITIONS,
    "rope_theta": model.rope_theta,
    "rope_parameters": {"rope_theta": model.rope_theta, **rope},
    **old,
  }


def _is_of(family: str, model: ModelConfig) -> bool:
  """Whether a family's classes compute this model."""
  has_head_dim = family != "qwen2" or model.head_dim * model.heads == model.dim
  biases = model.qkv_bias, model.out_bias, model.mlp_bias
  allowed = {
    "qwen3": {(False, False, False), (True, True, False)},
    "qwen2": {(True, False, False)},
    "llama": {(q, q, m) for q in (False, True) for m in (False, True)},
  }
  return model.qk_norm == (family == "qwen3") and has_head_dim and biases in allowed[family]


class _Fields:
  """Fields of a config.json."""

  def __init__(self, hf: Mapping[str, Any], where: str):
    self.hf, self.where = hf, where

  def take(self, name: str, *default):
    """Returns a field; without a default it has to be there."""
    if name not in self.hf and not default:
      raise InputError(f"{self.where}: {name} is missing; expected the config.json of a checkpoint")
    return self.hf.get(name, *default)

  def whole(self, name: str, default: int | None = None) -> int:
    """Returns a whole number; `default` where it is absent or null and there is one."""
    value = self.take(name) if default is None else self.hf.get(name)
    value = default if value is None and default is not None else value
    if not isinstance(value, int):
      raise InputError(f"{self.where}: {name} {value!r}; expected a whole number")
    return value

  def expect(self, name: str, only: Any) -> None:
    """Checks that a field, if it is there, has the one value that msjax computes."""
    if self.hf.get(name, only) != only:
      raise InputError(f"{self.where}: {name} {self.hf[name]!r}; msjax computes {only!r} only")


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    raise InputError(f"{where}: rope_type {kind!r}; expected default or llama3")
  for name in _LLAMA3:
    if not isinstance(rope.get(name), int | float):
      raise InputError(f"{where}: rope_type llama3: {name} {rope.get(name)!r}; expected a number")
  *factors, length = (rope[name] for name in _LLAMA3)
  return RopeScaling(*map(float, factors), int(length))
