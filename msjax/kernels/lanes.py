"""What the TPU kernels share: width of registers, products, a stand-in for minus infinity."""

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
NEVER = -1e30  # in place of -inf: 2 ** (NEVER - top) is 0, and never NaN
VMEM_LIMIT = 56 * 2**20  # bytes; a core has 128 MiB on v5e and v6e, 64 MiB on v5p

# What a product sums over.
COLUMNS_COLUMNS = (((1,), (1,)), ((), ()))  # [m, h] x [n, h] -> [m, n]
COLUMNS_ROWS = (((1,), (0,)), ((), ()))  # [m, n] x [n, h] -> [m, h]
ROWS_ROWS = (((0,), (0,)), ((), ()))  # [n, m] x [n, h] -> [m, h]


def product(x: jax.Array, y: jax.Array, over) -> jax.Array:
  """Returns a product in float32, of float32 in float32: the default is one pass in bfloat16."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, over, precision=precision, preferred_element_type=jnp.float32)


def as_column(row: jax.Array) -> jax.Array:
  """[1, n], 32 bits -> [n, 128], the same in all lanes."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T
