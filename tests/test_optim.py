"""Learning rates step by step, and AdamW's groups against the formulas."""

import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.config import OptimConfig
from msjax.training.optim import optimizer, schedule

PEAK = 2.0


def rates(steps, **fields):
  rate = schedule(OptimConfig(**fields), steps, PEAK)
  return np.array([float(rate(np.int32(step))) for step in range(steps)])


@pytest.mark.parametrize(
  ("steps", "fields", "expected"),
  [
    pytest.param(4, {}, [1, 1, 1, 1], id="constant"),
    pytest.param(6, {"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1], id="warm-up"),
    pytest.param(3, {"warmup_steps": 1}, [1, 1, 1], id="warm-up of one step"),
    pytest.param(6, {"cooldown_steps": 4}, [1, 1, 1, 0.75, 0.5, 0.25], id="cooldown"),
    pytest.param(7, {"warmup_steps": 2, "cooldown_steps": 2}, [0.5, 1, 1, 1, 1, 1, 0.5], id="both"),
    pytest.param(
      4, {"warmup_steps": 2, "cooldown_steps": 2}, [0.5, 1, 1, 0.5], id="nothing between"
    ),
    pytest.param(3, {"cooldown_steps": 3}, [1, 2 / 3, 1 / 3], id="all cooldown"),
    pytest.param(
      6,
      {"schedule": "cosine", "warmup_steps": 2},
      [0.5, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3))],
      id="cosine",
    ),
    pytest.param(
      2, {"schedule": "cosine", "final_fraction": 0.5}, [1, 0.75], id="cosine to a fraction"
    ),
  ],
)
def test_rates(steps, fields, expected):
  np.testing.assert_allclose(rates(steps, **fields), PEAK * np.array(expected), rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_every_step_counts(warmup, between, cooldown, cosine):
  steps = max(warmup + between + cooldown, 1)
  fields = {"schedule": "cosine"} if cosine else {"cooldown_steps": cooldown}
  by_step = rates(steps, warmup_steps=warmup, **fields)
  assert np.all(by_step > 0)
  assert by_step.max() == PEAK
  top = by_step.argmax()
  assert np.all(np.diff(by_step[: top + 1]) >= 0)  # up, then down
  assert np.all(np.diff(by_step[top:]) <= 0)


PARAMS = {
  "embed": np.full((3, 2), 2.0, np.float32),
  "stream_embed": np.full((2, 2), 3.0, np.float32),
  "layers": {
    "attention_norm": np.full((1, 2), 4.0, np.float32),
    "attention": {"q": np.full((1, 2, 2), 5.0, np.float32), "q_bias": np.ones((1, 2), np.float32)},
  },
}


def trained(config, *gradients):
  """Parameters after a step with each of these gradients."""
  tx = optimizer(config, steps=10)
  step = jax.jit(lambda g, state, params: tx.update(g, state, params))
  params, state = PARAMS, tx.init(PARAMS)
  for g in gradients:
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def gradients(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: np.float32(scale * rng.normal(size=p.shape)), PARAMS)


def adam(params, *steps, rate, b1=0.9, b2=0.95, eps=1e-8):
  """Kingma and Ba's algorithm 1."""
  m = v = 0.0
  for t, g in enumerate(steps, start=1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    params = params - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
  return params


def test_groups_have_their_own_rates():
  config = OptimConfig(learning_rate=0.1, stream_learning_rate=0.3, clip_norm=0.0)
  steps = [gradients(seed) for seed in range(3)]
  ours = trained(config, *steps)
  for name, rate in (("embed", 0.1), ("stream_embed", 0.3)):
    expected = adam(PARAMS[name], *(g[name] for g in steps), rate=rate)
    np.testing.assert_allclose(ours[name], expected, rtol=1e-5)


def test_streams_take_the_common_rate_by_default():
  ours = trained(OptimConfig(learning_rate=0.1), gradients(0))
  np.testing.assert_allclose(np.abs(ours["stream_embed"] - 3.0), 0.1, rtol=1e-4)


def test_matrices_decay_and_nothing_else():
  zero = jax.tree.map(np.zeros_like, PARAMS)
  ours = trained(OptimConfig(learning_rate=0.1, weight_decay=0.5), zero)
  decayed = jax.tree.map(lambda p, q: float(np.max(p / q)), ours, PARAMS)
  assert decayed == {
    "embed": pytest.approx(0.95),
    "stream_embed": 1.0,
    "layers": {"attention_norm": 1.0, "attention": {"q": pytest.approx(0.95), "q_bias": 1.0}},
  }


def test_clipping_bounds_the_norm_of_all_gradients_together():
  length = lambda tree: math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(tree)))
  large, small = gradients(0, scale=50.0), gradients(1, scale=0.01)
  norm = length(large)
  clipped = jax.tree.map(lambda g: g / norm, large)
  ours = trained(OptimConfig(clip_norm=1.0), large, small)
  theirs = trained(OptimConfig(clip_norm=0.0), clipped, small)
  unclipped = trained(OptimConfig(clip_norm=0.0), large, small)
  difference = lambda a, b: length(jax.tree.map(np.subtract, a, b))
  assert difference(ours, theirs) < 1e-6
  assert difference(ours, unclipped) > 1e-4
