"""config.json of Hugging Face and the model config: Qwen3, Qwen2 (Qwen2.5) and Llama."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from msjax.config import ModelConfig, RopeScaling, check_model
from msjax.errors import InputError, nearest

FAMILIES = ("qwen3", "qwen2", "llama")  # model_type
# Of other models: fields that msjax computes with one value only.
_ONLY = {
  "hidden_act": "silu",
  "partial_rotary_factor": 1.0,
  "role_gating_enabled": False,
  "channel_embedding_method": "additive",
}
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
  for name, only in _ONLY.items():
    fields.expect(name, only)
  if fields.take("quantization_config", None):
    raise InputError(
      f"{where}: quantization_config: tensors are quantised; expected a checkpoint in bfloat16"
    )
  if fields.flag("use_sliding_window"):
    fields.expect("sliding_window", None)
  dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
  biased = fields.flag("attention_bias")
  rope = {**fields.group("rope_scaling"), **fields.group("rope_parameters")}  # of 4.x and of 5.x
  theta = _Fields(rope if "rope_theta" in rope else hf, where).number("rope_theta", 10_000.0)
  model = ModelConfig(
    vocab_size=fields.whole("vocab_size"),
    dim=dim,
    layers=fields.whole("num_hidden_layers"),
    heads=heads,
    kv_heads=fields.whole("num_key_value_heads", heads),
    head_dim=fields.whole("head_dim", 128 if family == "qwen3" else dim // heads),
    mlp_dim=fields.whole("intermediate_size"),
    rope_theta=theta,
    rope_scaling=_rope_scaling(rope, where),
    norm_eps=fields.number("rms_norm_eps", 1e-6),
    qk_norm=family == "qwen3",
    qkv_bias=family == "qwen2" or biased,
    out_bias=family != "qwen2" and biased,
    mlp_bias=family == "llama" and fields.flag("mlp_bias"),
    tied_head=fields.flag("tie_word_embeddings"),
  )
  try:
    check_model(model)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None
  return model


def to_hf(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
  """Returns the config.json of a model; rope and dtype under the names of transformers 4 and 5.

  Raises:
    InputError: no family computes this.
  """
  family = next((f for f in FAMILIES if _is_of(f, model)), None)
  if family is None:
    raise InputError(
      f"config.model: qk_norm={model.qk_norm}, qkv_bias={model.qkv_bias}, "
      f"out_bias={model.out_bias}, mlp_bias={model.mlp_bias}, head_dim={model.head_dim} with "
      f"{model.heads} heads of {model.dim}: none of {', '.join(FAMILIES)}"
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
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise InputError(f"{self.where}: {name} {value!r}; expected a whole number, 1 or more")
    return value

  def number(self, name: str, default: float) -> float:
    """Returns a number; `default` where it is absent."""
    value = self.hf.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise InputError(f"{self.where}: {name} {value!r}; expected a number")
    return float(value)

  def flag(self, name: str) -> bool:
    """Returns true or false; false where it is absent or null."""
    value = self.hf.get(name)
    if not isinstance(value, bool | None):
      raise InputError(f"{self.where}: {name} {value!r}; expected true or false")
    return bool(value)

  def group(self, name: str) -> Mapping[str, Any]:
    """Returns an object; an empty one where it is absent or null."""
    value = self.hf.get(name) or {}
    if not isinstance(value, Mapping):
      raise InputError(f"{self.where}: {name} {value!r}; expected an object")
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
