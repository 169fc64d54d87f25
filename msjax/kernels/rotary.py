"""RMSNorm and rotary positions in plain XLA; tpu_rotary.py has both as one kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates [B, L, heads, H] by its positions; pairs are (i, i + H / 2), as in Hugging Face."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


class Turn(NamedTuple):
  """What befalls queries and keys between their product and attention: norm, then rotation.

  Attributes:
    cos: float32 [B, L, H / 2], of the angles.
    sin: float32 [B, L, H / 2].
    eps: of the norm.
  """

  cos: jax.Array
  sin: jax.Array
  eps: float

  def __call__(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Turns [B, L, heads, H]; `scale` [H] is the norm's, None for no norm."""
    if scale is not None:
      x = rms_norm(x, scale, self.eps)
    return rotate(x, self.cos, self.sin)
