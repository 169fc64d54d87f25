"""RMSNorm and rotary positions against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from msjax.kernels.rotary import rms_norm, rotate
from msjax.models.layers import rope_angles

HEAD, THETA = 16, 10_000.0


def test_rms_norm_is_its_formula():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
  ours = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.1)
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_rms_norm_of_bfloat16_rounds_once():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)), jnp.bfloat16)
  y = rms_norm(x, jnp.ones(256), 1e-6)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
  half_a_step = 1.01 * 2.0**-8
  np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=half_a_step)


def test_a_position_turns_every_pair_by_its_angle():
  x = np.random.default_rng(0).normal(size=(1, 4, 2, HEAD)).astype(np.float32)
  positions = np.array([[0, 1, 7, 500]])
  ours = np.asarray(rotate(jnp.asarray(x), *rope_angles(positions, HEAD, THETA, None)))
  half = HEAD // 2
  for i in range(half):  # pairs (i, i + H / 2) are complex numbers
    angle = positions[0] * THETA ** (-2 * i / HEAD)
    turned = (x[0, ..., i] + 1j * x[0, ..., i + half]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(ours[0, ..., i], turned.real, atol=1e-4)
    np.testing.assert_allclose(ours[0, ..., i + half], turned.imag, atol=1e-4)


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, HEAD)).astype(np.float32)
  score = lambda i, j: float(
    (
      rotate(q, *rope_angles(np.array([[i]]), HEAD, THETA, None))
      * rotate(k, *rope_angles(np.array([[j]]), HEAD, THETA, None))
    ).sum()
  )
  assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
  assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_bfloat16_stays_bfloat16():
  angles = rope_angles(np.array([[3]]), HEAD, THETA, None)
  assert rotate(jnp.ones((1, 1, 1, HEAD), jnp.bfloat16), *angles).dtype == jnp.bfloat16
