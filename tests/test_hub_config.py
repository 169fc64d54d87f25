"""config.json as transformers writes it, and fields that msjax does not compute."""

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from msjax.config import Config, ModelConfig, RopeScaling
from msjax.errors import InputError
from msjax.hub.config import model_config

SIZES = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5e5,
}
SAME = {
  "dim": 32,
  "mlp_dim": 48,
  "layers": 3,
  "heads": 4,
  "kv_heads": 2,
  "norm_eps": 1e-5,
  "rope_theta": 5e5,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
  ("written", "fields"),
  [
    (
      Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
      {"head_dim": 16, "qk_norm": True, "tied_head": True},
    ),
    (Qwen2Config(**SIZES), {"head_dim": 8, "qkv_bias": True}),
    (LlamaConfig(**SIZES), {"head_dim": 8}),
    (
      LlamaConfig(**SIZES, head_dim=6, attention_bias=True, mlp_bias=True),
      {"head_dim": 6, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    (
      LlamaConfig(**SIZES, rope_scaling=LLAMA3),
      {"head_dim": 8, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
    ),
  ],
  ids=["qwen3", "qwen2", "llama", "biased", "scaled"],
)
def test_what_transformers_writes_is_read(written, fields):
  expected = ModelConfig(**SAME, **{"qk_norm": False, "tied_head": False, **fields})
  expected.vocab_size = written.vocab_size
  found = model_config(written.to_dict(), "config.json")
  assert found == expected
  config = Config(model=found)
  config.data.train = "train.jsonl"
  config.validate()


def test_rope_is_read_as_transformers_4_wrote_it():
  new = LlamaConfig(**SIZES, rope_scaling=LLAMA3).to_dict()
  old = {k: v for k, v in new.items() if k != "rope_parameters"}
  old |= {"rope_theta": 5e5, "rope_scaling": LLAMA3}
  assert model_config(old, "config.json") == model_config(new, "config.json")
  plain = {**old, "rope_scaling": None}
  assert model_config(plain, "config.json").rope_scaling is None
  assert model_config(plain, "config.json").rope_theta == 5e5


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'; expected one of .*; did you mean 'qw"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'; msjax computes 'silu' only"),
    ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64; msjax computes None"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'; expected"),
    ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_type llama3: factor None"),
    ({"hidden_size": "32"}, "hidden_size '32'; expected a whole number"),
    ({"hidden_size": None}, "hidden_size None; expected a whole number"),
  ],
)
def test_what_is_not_computed_is_told(changes, told):
  written = {**Qwen3Config(**SIZES).to_dict(), **changes}
  with pytest.raises(InputError, match=f"^folder/config.json: {told}"):
    model_config(written, "folder/config.json")


def test_a_field_that_is_missing_is_told():
  written = LlamaConfig(**SIZES).to_dict()
  del written["num_hidden_layers"]
  with pytest.raises(InputError, match=r"num_hidden_layers is missing; expected the config.json"):
    model_config(written, "config.json")


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"role_gating_enabled": True}, "role_gating_enabled True; msjax computes False only"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; msjax computes 1.0 only"),
    ({"channel_embedding_method": "none"}, "channel_embedding_method 'none'; msjax computes"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'; expected true or false"),
    ({"num_hidden_layers": True}, "num_hidden_layers True; expected a whole number, 1 or more"),
    ({"num_attention_heads": 0}, "num_attention_heads 0; expected a whole number, 1 or more"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps 'x'; expected a number"),
    ({"rms_norm_eps": None}, "rms_norm_eps None; expected a number"),
    ({"rope_parameters": [1]}, r"rope_parameters \[1\]; expected an object"),
    ({"vocab_size": "abc"}, "vocab_size 'abc'; expected a whole number"),
    ({"num_key_value_heads": 3}, "config.json: config.model.kv_heads: 3 is not allowed; expected"),
    ({"head_dim": 33}, "config.json: config.model.head_dim: 33 is not allowed; expected even"),
  ],
)
def test_what_would_come_in_as_another_model_is_told(change, told):
  written = {**LlamaConfig(**SIZES).to_dict(), **change}
  with pytest.raises(InputError, match=told):
    model_config(written, "config.json")


def test_rope_fields_of_both_versions_are_read_together():
  both = {**LlamaConfig(**SIZES).to_dict(), "rope_parameters": {"rope_theta": 7e5}}
  found = model_config({**both, "rope_scaling": LLAMA3}, "config.json")
  assert (found.rope_theta, found.rope_scaling) == (7e5, RopeScaling(8.0, 1.0, 4.0, 64))
