"""Solving while reading: running arithmetic, answered one row after the question ends.

  machine   2 CPU cores
  time      a minute of training, the baseline included
  result    accuracy 1.00 on 500 held-out questions of 10 operations, the answer 1 row after `=`
            (12 in the chat baseline that the same command trains)
  command   python -m msjax.train --config=configs/quickstart.py

With --config.same_row=hidden, the paper's rule, the answer comes after 2 rows.
"""

from msjax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config():
  return Config(
    workdir="runs/quickstart",
    streams=("user:input", "think:internal", "output:output"),
    same_row="inputs",
    model=ModelConfig(dim=64, layers=2, heads=2, kv_heads=2, head_dim=32, mlp_dim=192),
    data=DataConfig(source="arithmetic", rows=18, min_ops=2, max_ops=10, end_token=False),
    loss=LossConfig(silence_weight=0.1),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, cooldown_steps=100),
    train=TrainConfig(steps=700, batch=32, eval_every=200, eval_batches=8, save_every=200),
    report="arithmetic",
    baseline={
      "streams": ("chat:output",),
      "data.chat": True,
      "data.rows": 24,
      # A favour to the chat: where the thoughts start varies with the length of the question, and
      # it needs far more steps to learn that than the streams do, for which the lag is constant.
      "data.min_ops": 10,
    },
  )
