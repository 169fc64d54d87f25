"""A tiny model of random weights, and engines for tests of sessions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import Config, ModelConfig
from msjax.decoding import prepared
from msjax.decoding.engine import Engine
from msjax.decoding.policy import Policy
from msjax.decoding.prepared import Unrolled
from msjax.streams import Stream, Streams
from msjax.training.state import Learner

VOCAB, SILENCE, ROWS = 20, 3, 12
TINY = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=64, dtype="float32")
STREAMS = Streams(
  tuple(map(Stream.parse, ("output:output", "user:input", "think:internal"))), SILENCE
)


@pytest.fixture(autouse=True)
def small_key_blocks(monkeypatch):
  """So that a few rows fill several."""
  monkeypatch.setattr(prepared, "KEY_BLOCK", 4)


@functools.cache
def model():
  """Every weight random."""
  learner = Learner(Config(model=TINY), STREAMS, VOCAB)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  draw = lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype)
  return learner.model(jax.tree.map(draw, shapes))


@functools.cache
def unrolled():
  return Unrolled.of(model())


PLACES, AT_ONCE = 3, 4
HOT = Policy(1.0, top_k=7, top_p=0.9)


def engine(**options):
  return Engine(unrolled(), PLACES, **{"rows": 8, "rows_at_once": AT_ONCE, **options})


def prompt(number):
  rng = np.random.default_rng(number)
  return rng.integers(0, VOCAB, (5 * number % 13, 3)).astype(np.int32)


def run(engine, **options):
  """Until all have ended."""
  while engine.sessions:
    engine.step(**options)
