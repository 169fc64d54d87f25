"""A tiny model of bytes with random weights, for tests of conversations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from msjax.config import Config, ModelConfig
from msjax.model import Model
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.state import Learner

BYTES = ByteTokenizer()
CONFIG = Config(
  streams=("user:input", "output:output"),
  model=ModelConfig(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8, dtype="float32"),
)


@functools.cache
def talker():
  """The model."""
  streams = CONFIG.stream_set(BYTES.silence_id)
  learner = Learner(CONFIG, streams, BYTES.vocab_size)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  draw = lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype)
  return Model(CONFIG, streams, BYTES, jax.tree.map(draw, shapes))
