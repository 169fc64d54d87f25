"""The pieces of a layer: matrix product, angles of rotary positions."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from msjax.config import RopeScaling


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """[..., D] x [D, F] -> [..., F] in x's dtype; named "product" for remat policies.

  The matrix's gradient is written x^T g. JAX's own (g^T x)^T makes XLA on CPU transpose g together
  with all that g is computed from, which takes as long as the product.
  """
  return checkpoint_name(_product(x, matrix), "product")


@jax.custom_vjp
def _product(x, matrix):
  return x @ matrix.astype(x.dtype)


def _product_saving(x, matrix):
  return _product(x, matrix), (x, matrix)


def _product_gradients(saved, g):
  x, matrix = saved
  flat = lambda a: a.reshape(-1, a.shape[-1])
  d_matrix = jnp.matmul(flat(x).T, flat(g), preferred_element_type=matrix.dtype)
  return g @ matrix.T.astype(g.dtype), d_matrix


_product.defvjp(_product_saving, _product_gradients)


def rope_angles(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of rotary embedding (Su et al. 2021, arXiv 2104.09864).

  Args:
    positions: int32 [B, L].
    head_dim: H, even.
    theta: base of the frequencies.
    scaling: Llama 3's stretch of low frequencies, or None.

  Returns:
    Two float32 arrays [B, L, H / 2].
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling is not None:
    frequency = _llama3_frequencies(frequency, scaling)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def _llama3_frequencies(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
  """Divides low frequencies by `factor`, keeps high ones, blends between (Llama 3.1)."""
  turns = scaling.original_max_position * frequency / (2 * math.pi)
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = jnp.clip(keep, 0.0, 1.0)
  return frequency * (keep + (1 - keep) / scaling.factor)
