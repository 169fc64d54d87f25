"""What is drawn by default, of models that were trained on chats and on sums."""

import itertools

import jax
import numpy as np
import pytest

from msjax.config import Config, ModelConfig, OptimConfig
from msjax.decoding.policy import TALK, Policy
from msjax.model import Model
from msjax.talk.conversation import Prompt
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.state import Learner

BYTES = ByteTokenizer()
CONFIG = Config(
  streams=("user:input:1", "output:output"),
  model=ModelConfig(dim=64, layers=1, heads=2, kv_heads=2, head_dim=32, mlp_dim=128),
  optim=OptimConfig(learning_rate=1e-2),
)
SAID = ("hello there", "what a day", "i like tea", "see you soon", "oh no", "that is good")
ROWS, STEPS, BEGINS = 64, 150, 0.05  # the odds that who is silent begins to speak


def chats(rng, count):
  """Two who speak when they like, int32 [count, ROWS, 2]."""
  tokens = np.full((count, ROWS, 2), BYTES.silence_id, np.int32)
  for chat, stream in itertools.product(range(count), range(2)):
    row = 0
    while row < ROWS:
      if rng.random() < BEGINS:
        words = BYTES.encode(SAID[rng.integers(len(SAID))])[: ROWS - row]
        tokens[chat, row : row + len(words), stream] = words
        row += len(words)
      row += 1
  return tokens


@pytest.fixture(scope="module")
def model():
  streams = CONFIG.stream_set(BYTES.silence_id)
  learner = Learner(CONFIG, streams, BYTES.vocab_size)
  state = learner.init(jax.random.key(0))
  step = jax.jit(learner.step, donate_argnums=0)
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    tokens = chats(rng, 16)
    batch = {
      "tokens": tokens[None],
      "weights": np.ones_like(tokens[None], np.float32),
      "segments": np.zeros_like(tokens[None, ..., 0]),
    }
    state, scalars = step(state, batch)
  assert scalars["loss"] < 0.6
  return Model(CONFIG, streams, BYTES, state.params)


def answered(model, **policies):
  """What the model says in 8 chats, and in which share of the rows."""
  prompts = [Prompt({"user": SAID[n % len(SAID)]}, rows=ROWS) for n in range(8)]
  found = []
  for _, rows, _ in model.answers(prompts, places=8, **policies):
    silent = [row.tokens["output"] == BYTES.silence_id for row in rows]
    said = "".join(" " if s else row.text["output"] for s, row in zip(silent, rows))
    found.append((said.split("  "), 1 - np.mean(silent)))
  return found


def test_by_default_a_model_of_chats_neither_goes_mute_nor_repeats_itself(model):
  chats_said, shares = zip(*answered(model))
  data = np.mean(chats(np.random.default_rng(1), 50) != BYTES.silence_id)
  assert 0.5 * data < np.mean(shares) < 1.5 * data
  assert sum(share == 0 for share in shares) <= 1
  messages = [m for m in (m.strip() for said in chats_said for m in said) if m]
  assert len({m[0] for m in messages}) >= 4 and len(set(messages)) > 0.5 * len(messages) > 4
  # Drawn at once with the words, silence is cut off last.
  _, cut = zip(*answered(model, policies=Policy(TALK.temperature, top_p=0.9)))
  assert np.mean(cut) < 0.5 * np.mean(shares)
  _, likeliest = zip(*answered(model, policies=Policy()))
  assert np.mean(likeliest) == 0
