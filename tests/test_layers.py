"""Products, RMSNorm and rotary positions against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import RopeScaling
from msjax.models.layers import product, rms_norm, rope_angles, rotate

HEAD, THETA = 16, 10_000.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_has_the_gradients_of_one(dtype):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(2, 300, n)), dtype) for n in (8, 5))
  matrix = jnp.asarray(rng.normal(size=(8, 5)), dtype).astype(jnp.float32)
  out, pull = jax.vjp(product, x, matrix)
  d_x, d_matrix = pull(y)
  assert (out.dtype, d_x.dtype, d_matrix.dtype) == (dtype, dtype, jnp.float32)
  x64, y64, matrix64 = (np.asarray(a, np.float64) for a in (x, y, matrix))
  step = {"float32": 2.0**-24, "bfloat16": 2.0**-9}[dtype]
  np.testing.assert_allclose(np.asarray(out, np.float64), x64 @ matrix64, atol=32 * step)
  np.testing.assert_allclose(np.asarray(d_x, np.float64), y64 @ matrix64.T, atol=32 * step)
  expected = np.einsum("blx,bly->xy", x64, y64)  # summed in float32, and not rounded after
  np.testing.assert_allclose(d_matrix, expected, atol=1e-4)


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


def test_llama3_scaling_is_the_published_rule():
  scaling = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
  )
  cos, sin = rope_angles(np.array([[1]]), HEAD, THETA, scaling)
  ours = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))[0, 0]
  expected, cases = [], set()
  for i in range(0, HEAD, 2):
    frequency = THETA ** (-i / HEAD)
    wavelength = 2 * math.pi / frequency
    if wavelength < 64 / 4.0:
      case, scaled = "high", frequency
    elif wavelength > 64 / 1.0:
      case, scaled = "low", frequency / 8.0
    else:
      smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
      case, scaled = "between", (1 - smooth) * frequency / 8.0 + smooth * frequency
    cases.add(case)
    expected.append(scaled)
  assert cases == {"high", "low", "between"}
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
