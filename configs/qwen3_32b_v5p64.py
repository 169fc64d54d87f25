"""Qwen3-32B with the paper's ten streams on a v5p-64 slice.

It starts from `runs/qwen3-32b`, made by `python -m msjax.import_hf --from=Qwen/Qwen3-32B
--streams=user --to=runs/qwen3-32b`, and reads grids of ten streams (docs/data.md).

  machine   v5p-64 (v5p:2x4x4), 32 chips
  memory    33.3 of 95.7 GiB a chip: 11.5 stay, 21.8 for a step
  tokens    163,840 a step: 32 sequences of 512 rows x 10 streams
  time      3.6 s a step in XLA's operations, as the compiler estimates them; attention
            and what chips wait for each other come on top
  result    not trained yet
  compile   python -m msjax.compile --config=configs/qwen3_32b_v5p64.py --topology=v5p:2x4x4
  command   python -m msjax.train --config=configs/qwen3_32b_v5p64.py
            on every machine of the slice: docs/pods.md
"""

from msjax.config import Config, DataConfig, OptimConfig, TrainConfig
from msjax.models.presets import preset

THOUGHTS = "analytical skeptical intuitive between curious void instinct synthesis"


def get_config():
  config = Config(
    workdir="runs/qwen3_32b_v5p64",
    init_from="runs/qwen3-32b",
    streams=("user:input", "output:output", *(f"{name}:internal" for name in THOUGHTS.split())),
    model=preset("qwen3-32b"),
    data=DataConfig(
      train="data/train.jsonl",
      valid="data/valid.jsonl",
      tokenizer="runs/qwen3-32b/tokenizer.json",
      rows=512,
      pack=True,
    ),
    optim=OptimConfig(
      learning_rate=1e-5,
      stream_learning_rate=1e-3,
      schedule="cosine",
      warmup_steps=50,
      final_fraction=0.1,
      weight_decay=0.1,
    ),
    train=TrainConfig(steps=1000, batch=32, log_every=10, save_every=100, eval_every=200),
  )
  config.model.remat = "qkv"
  return config
