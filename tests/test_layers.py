"""Products and angles against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import RopeScaling
from msjax.models.layers import products, rope_angles

HEAD, THETA = 16, 10_000.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_has_the_gradients_of_one(dtype):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(2, 300, n)), dtype) for n in (8, 5))
  matrix = jnp.asarray(rng.normal(size=(8, 5)), dtype).astype(jnp.float32)
  out, pull = jax.vjp(lambda x, matrix: products(0, x, (matrix,))[0], x, matrix)
  d_x, d_matrix = pull(y)
  assert (out.dtype, d_x.dtype, d_matrix.dtype) == (dtype, dtype, jnp.float32)
  x64, y64, matrix64 = (np.asarray(a, np.float64) for a in (x, y, matrix))
  step = {"float32": 2.0**-24, "bfloat16": 2.0**-9}[dtype]
  np.testing.assert_allclose(np.asarray(out, np.float64), x64 @ matrix64, atol=32 * step)
  np.testing.assert_allclose(np.asarray(d_x, np.float64), y64 @ matrix64.T, atol=32 * step)
  expected = np.einsum("blx,bly->xy", x64, y64)  # summed in float32, and not rounded after
  np.testing.assert_allclose(d_matrix, expected, atol=1e-4)


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
