"""Qwen3-8B with the paper's ten streams on a v5p-16 slice.

It starts from `runs/qwen3-8b`, made by `python -m msjax.import_hf --from=Qwen/Qwen3-8B
--streams=user --to=runs/qwen3-8b`, and reads grids of ten streams (docs/data.md).

  machine   v5p-16 (v5p:2x2x2), 8 chips
  memory    31.8 of 95.7 GiB a chip: 11.4 stay, 20.3 for a step
  tokens    40,960 a step: 8 sequences of 512 rows x 10 streams
  time      0.84 s a step in XLA's operations, as the compiler estimates them; attention
            and what chips wait for each other come on top
  result    not trained yet
  compile   python -m msjax.compile --config=configs/qwen3_8b_v5p16.py --topology=v5p:2x2x2
  command   python -m msjax.train --config=configs/qwen3_8b_v5p16.py
            on every machine of the slice: docs/pods.md
"""

from msjax.config import Config, DataConfig, OptimConfig, TrainConfig
from msjax.models.presets import preset

THOUGHTS = "analytical skeptical intuitive between curious void instinct synthesis"


def get_config():
  config = Config(
    workdir="runs/qwen3_8b_v5p16",
    init_from="runs/qwen3-8b",
    streams=("user:input", "output:output", *(f"{name}:internal" for name in THOUGHTS.split())),
    model=preset("qwen3-8b"),
    data=DataConfig(
      train="data/train.jsonl",
      valid="data/valid.jsonl",
      tokenizer="runs/qwen3-8b/tokenizer.json",
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
    train=TrainConfig(steps=1000, batch=8, log_every=10, save_every=100, eval_every=200),
  )
  config.model.remat = "dots"
  return config
