"""The pieces of a layer: matrix products, angles of rotary positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from msjax import sharding
from msjax.config import RopeScaling


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(cut: int, x: jax.Array, matrices: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """[..., D] x [D, F] for each of some matrices, in x's dtype.

  Matrices are cast first; where `fsdp` cuts their axis `cut`, they are then fetched together, and
  their gradients are summed over chips in x's dtype, otherwise in their own. What is fetched is
  named "weights" for remat policies, so that nobody keeps what can be had again.

  The matrix's gradient is written x^T g. JAX's own (g^T x)^T makes XLA on CPU transpose g together
  with all that g is computed from, which takes as long as the product.
  """
  return _products(x, _fetched(cut, x.dtype, matrices), matrices)


def _fetched(cut, dtype, matrices):
  """Matrices for x; one side by side where they come from other chips, for that is one exchange."""
  cast = [matrix.astype(dtype) for matrix in matrices]
  if sharding.size("layer_dim") > 1:
    cast = [sharding.gather(jnp.concatenate(cast, axis=1), "layer_dim", cut)]
  return [checkpoint_name(matrix, "weights") for matrix in cast]


def _products(x, fetched, matrices):
  if len(fetched) == len(matrices):
    return tuple(x @ matrix for matrix in fetched)
  return tuple(_split(x @ fetched[0], matrices))


def _products_saving(cut, x, matrices):
  fetched = _fetched(cut, x.dtype, matrices)
  return _products(x, fetched, matrices), (x, fetched, matrices)


def _products_gradients(cut, saved, g):
  x, fetched, matrices = saved
  flat = lambda a: a.reshape(-1, a.shape[-1])
  if len(fetched) < len(matrices):
    g = [jnp.concatenate(g, axis=-1)]
  d_x = sum(part @ matrix.T for part, matrix in zip(g, fetched))
  if sharding.size("layer_dim") > 1:
    gradients = _split(_scattered(cut, flat(x), flat(g[0])), matrices)
  else:
    summed = functools.partial(jnp.matmul, preferred_element_type=matrices[0].dtype)
    gradients = [summed(flat(x).T, flat(part)) for part in g]
  return d_x, tuple(gradient.astype(matrices[0].dtype) for gradient in gradients)


def _scattered(cut, x, g):
  """Scatters x^T g along its axis `cut`, made the first axis: along the last one parts may be
  narrower than a register, and then libtpu sums the whole on every chip."""
  if cut == 0:
    return sharding.scatter(x.T @ g, "layer_dim", 0)
  return sharding.scatter(g.T @ x, "layer_dim", 0).T


def _split(x, matrices):
  """Cuts the last axis of x into as many columns as each matrix has."""
  ends = np.cumsum([matrix.shape[1] for matrix in matrices])[:-1]
  return jnp.split(x, ends, axis=-1)


products.defvjp(_products_saving, _products_gradients)


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
