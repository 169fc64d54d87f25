"""Draws against the distribution they are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.decoding.sampling import sample

LOGITS = np.array([1.0, 0.0, -1.0, 2.0, -1e9], np.float32)
DRAWS = 4000
draw = jax.jit(sample)


def draws(temperature, streams=2, seed=0):
  logits = np.broadcast_to(LOGITS, (DRAWS, streams, LOGITS.size))
  keys = jax.random.split(jax.random.key(seed), DRAWS)
  return np.asarray(draw(logits, jnp.float32(temperature), keys))


def chi_square(counts, expected):
  return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_they_should(temperature):
  tokens = draws(temperature)
  p = np.exp(LOGITS[:4] / temperature)
  p /= p.sum()
  for s in range(2):
    counts = np.bincount(tokens[:, s], minlength=LOGITS.size)
    assert counts[4] == 0
    assert chi_square(counts[:4], DRAWS * p) < 20  # 3 degrees of freedom


def test_streams_are_drawn_apart():
  first, second = draws(1.0).T
  together = np.bincount(4 * first + second, minlength=16).reshape(4, 4)
  expected = together.sum(1, keepdims=True) * together.sum(0) / DRAWS
  assert chi_square(together, expected) < 35  # 9 degrees of freedom


def test_temperature_zero_takes_the_likeliest():
  logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
  logits[0, 0] = [1, 7, 7, 0, 7]  # the first of equals
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = draw(logits, jnp.float32(0), keys)
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  np.testing.assert_array_equal(draw(logits, jnp.float32(1e-4), keys)[1:], tokens[1:])


def test_a_session_depends_on_its_key_alone():
  logits = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 4)
  tokens = draw(logits, jnp.float32(1), keys)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_array_equal(draw(logits[order], jnp.float32(1), keys[order]), tokens[order])
  alone = [draw(logits[[b]], jnp.float32(1), keys[b : b + 1])[0] for b in range(4)]
  np.testing.assert_array_equal(alone, tokens)


def test_keys_make_the_difference():
  np.testing.assert_array_equal(draws(1.0, seed=1), draws(1.0, seed=1))
  assert np.any(draws(1.0, seed=1) != draws(1.0, seed=2))
