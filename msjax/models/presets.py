"""Published models as configs: what the config.json of each checkpoint says, in one table."""

import json

from msjax.config import ModelConfig, RopeScaling
from msjax.errors import InputError, nearest

# Columns are fields of ModelConfig; rows are the base models, whose shapes the instruct ones have.
_TABLE = """
name          dim layers heads kv_heads head_dim mlp_dim vocab_size tied_head rope_theta norm_eps
qwen3-0.6b   1024     28    16        8      128    3072     151936      true        1e6     1e-6
qwen3-1.7b   2048     28    16        8      128    6144     151936      true        1e6     1e-6
qwen3-4b     2560     36    32        8      128    9728     151936      true        1e6     1e-6
qwen3-8b     4096     36    32        8      128   12288     151936     false        1e6     1e-6
qwen3-14b    5120     40    40        8      128   17408     151936     false        1e6     1e-6
qwen3-32b    5120     64    64        8      128   25600     151936     false        1e6     1e-6
qwen2.5-0.5b  896     24    14        2       64    4864     151936      true        1e6     1e-6
qwen2.5-1.5b 1536     28    12        2      128    8960     151936      true        1e6     1e-6
qwen2.5-3b   2048     36    16        2      128   11008     151936      true        1e6     1e-6
qwen2.5-7b   3584     28    28        4      128   18944     152064     false        1e6     1e-6
qwen2.5-14b  5120     48    40        8      128   13824     152064     false        1e6     1e-5
qwen2.5-32b  5120     64    40        8      128   27648     152064     false        1e6     1e-5
llama3-8b    4096     32    32        8      128   14336     128256     false        5e5     1e-5
llama3-70b   8192     80    64        8      128   28672     128256     false        5e5     1e-5
llama3.1-8b  4096     32    32        8      128   14336     128256     false        5e5     1e-5
llama3.1-70b 8192     80    64        8      128   28672     128256     false        5e5     1e-5
llama3.2-1b  2048     16    32        8       64    8192     128256      true        5e5     1e-5
llama3.2-3b  3072     28    24        8      128    8192     128256      true        5e5     1e-5
smollm2-135m  576     30     9        3       64    1536      49152      true        1e5     1e-5
smollm2-360m  960     32    15        5       64    2560      49152      true        1e5     1e-5
smollm2-1.7b 2048     24    32       32       64    8192      49152      true      1.3e5     1e-5
"""
_ROPE_FACTORS = {"llama3.1": 8.0, "llama3.2": 32.0}  # RopeScaling.factor; no others scale
_COLUMNS, *_ROWS = (line.split() for line in _TABLE.strip().splitlines())
_SIZES = {name: dict(zip(_COLUMNS[1:], map(json.loads, cells))) for name, *cells in _ROWS}

PRESETS = tuple(_SIZES)


def preset(name: str) -> ModelConfig:
  """Returns a published model's config, one's own to change.

  `vocab_size` is that of the checkpoint's embedding, for use with the checkpoint's tokenizer.json;
  set it to 0 for another tokenizer.

  Raises:
    InputError: no preset has this name.
  """
  if name not in PRESETS:
    raise InputError(
      f"preset {name!r}: no such model; expected one of {', '.join(PRESETS)}"
      f"{nearest(name, PRESETS)}"
    )
  family = name.split("-")[0]
  factor = _ROPE_FACTORS.get(family)
  return ModelConfig(
    **_SIZES[name],
    qk_norm=family == "qwen3",
    qkv_bias=family == "qwen2.5",
    rope_scaling=RopeScaling(factor) if factor else None,
  )
