"""Weighted cross-entropy against a large vocabulary, a chunk of cells at a time.

The logits of all cells at once would be float32 [L, V]. Here the gradients towards the hidden
states and the output matrix are made in the same pass that makes the loss, chunk by chunk, so
nothing of that size is held and no product is computed twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msjax.config import LossConfig

_CHUNK_LOGITS = 2**23  # logits held at once, 32 MiB in float32,
_CHUNK_CELLS = 128  # or those of so many cells, for a product of fewer is slow


class Penalties(NamedTuple):
  """What is added to plain cross-entropy; static."""

  z_loss: float = 0.0
  label_smoothing: float = 0.0

  @classmethod
  def of(cls, config: LossConfig) -> "Penalties":
    """Takes the two fields of the config."""
    return cls(config.z_loss, config.label_smoothing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
  penalties: Penalties,
  hidden: jax.Array,
  matrix: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sum of weighted losses of cells, and the plain cross-entropy of each.

  The loss of a cell is cross-entropy against its label, smoothed by mixing in the uniform
  distribution, plus z_loss x logsumexp(logits)^2. Only the sum has a gradient, and only towards
  `hidden` and `matrix`.

  Args:
    penalties: label smoothing and z-loss.
    hidden: [T, D], normed.
    matrix: [V, D].
    labels: int32 [T], -1 for none.
    weights: float32 [T], 0 where there is no label.

  Returns:
    The weighted sum, float32 []; the cross-entropy, float32 [T], 0 where there is no label.
  """

  def chunk(_, cells):
    loss, entropy, _ = _chunk_loss(penalties, matrix, *cells)
    return None, (loss, entropy)

  _, (loss, entropy) = jax.lax.scan(chunk, None, _chunks(matrix, hidden, labels, weights))
  return loss.sum(), entropy.reshape(-1)[: labels.size]


def _chunks(matrix, hidden, labels, weights):
  """Cuts cells into [n, c, ...] with padding that carries no label and no weight."""
  T = labels.size
  n = -(-T // max(_CHUNK_LOGITS // matrix.shape[0], _CHUNK_CELLS))
  c = -(-T // n)
  pad = lambda x, value: jnp.pad(
    x, [(0, n * c - T)] + [(0, 0)] * (x.ndim - 1), constant_values=value
  ).reshape(n, c, *x.shape[1:])
  return pad(hidden, 0), pad(labels, -1), pad(weights, 0)


def _chunk_loss(penalties, matrix, hidden, labels, weights):
  """Returns a chunk's weighted loss, its cross-entropy [c], and d loss / d logits as a function."""
  logits = jnp.einsum(
    "td,vd->tv", hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
  top = logits.max(-1, keepdims=True)
  exp = jnp.exp(logits - top)
  total = exp.sum(-1, keepdims=True)
  log_sum = (top + jnp.log(total))[:, 0]
  is_label = labels[:, None] == jnp.arange(matrix.shape[0])
  entropy = jnp.where(labels >= 0, log_sum - jnp.where(is_label, logits, 0).sum(-1), 0.0)

  smooth = penalties.label_smoothing
  loss = entropy + penalties.z_loss * log_sum**2
  if smooth:
    loss += smooth * (log_sum - logits.mean(-1) - entropy)

  def d_logits():
    pull = (weights * (1 + 2 * penalties.z_loss * log_sum))[:, None] / total
    target = weights[:, None] * (is_label * (1 - smooth) + smooth / matrix.shape[0])
    return exp * pull - target

  return (weights * loss).sum(), entropy, d_logits


def _with_gradients(penalties, hidden, matrix, labels, weights):
  def chunk(d_matrix, cells):
    loss, entropy, d_logits = _chunk_loss(penalties, matrix, *cells)
    d = d_logits().astype(hidden.dtype)
    d_hidden = jnp.einsum("tv,vd->td", d, matrix.astype(d.dtype))
    part = jnp.einsum("tv,td->vd", d, cells[0], preferred_element_type=jnp.float32)
    return d_matrix + part, (loss, entropy, d_hidden)

  cells = _chunks(matrix, hidden, labels, weights)
  d_matrix = jnp.zeros(matrix.shape, jnp.float32)
  d_matrix, (loss, entropy, d_hidden) = jax.lax.scan(chunk, d_matrix, cells)
  T = labels.size
  d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[:T]
  out = loss.sum(), entropy.reshape(-1)[:T]
  return out, (d_hidden, d_matrix.astype(matrix.dtype))


def _scale_gradients(penalties, gradients, cotangents):
  d_sum, _ = cotangents
  d_hidden, d_matrix = gradients
  scaled = lambda gradient: (d_sum * gradient).astype(gradient.dtype)
  return scaled(d_hidden), scaled(d_matrix), None, None


cross_entropy.defvjp(_with_gradients, _scale_gradients)
