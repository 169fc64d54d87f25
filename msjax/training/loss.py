"""Weighted cross-entropy against a large vocabulary, whose logits are never held all at once.

The logits of all cells would be float32 [T, V]. They are made a part at a time, and with them, in
the same pass, the gradients towards hidden states and output matrix. Where each chip has the matrix
at hand, that part is some cells: no product is computed twice. Where the matrix is spread over
chips (`fsdp`), it is a piece of the vocabulary, which is fetched, used for all cells and dropped: a
first pass finds each cell's sum, a second one the gradients.

Letters: T cells of the chip's sequences, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msjax import sharding
from msjax.config import LossConfig
from msjax.kernels.lanes import LANES

_CHUNK_LOGITS = 2**23  # logits held at once of some cells, 32 MiB in float32,
_CHUNK_CELLS = 128  # or those of so many cells, for a product of fewer is slow
_PIECE_LOGITS = 2**26  # logits held at once of a piece of the vocabulary
_NEVER = -1e30  # logit of a row that is no token


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
  `hidden` and `matrix`. On chips that share the vocabulary (`model`) each has the whole sum, and
  the gradient towards `hidden` of its own share alone.

  Args:
    penalties: label smoothing and z-loss.
    hidden: [T, D], normed.
    matrix: [V, D], the chip's part of D where it is cut.
    labels: int32 [T], -1 for none.
    weights: float32 [T], 0 where there is no label.

  Returns:
    The weighted sum, float32 []; the cross-entropy, float32 [T], 0 where there is no label.
  """
  return _walk(penalties, hidden, matrix, labels, weights, differentiate=False)[0]


def _with_gradients(penalties, hidden, matrix, labels, weights):
  return _walk(penalties, hidden, matrix, labels, weights, differentiate=True)


def _scale_gradients(penalties, gradients, cotangents):
  d_sum, _ = cotangents
  scaled = lambda gradient: (d_sum * gradient).astype(gradient.dtype)
  return *map(scaled, gradients), None, None


cross_entropy.defvjp(_with_gradients, _scale_gradients)


def _walk(penalties, hidden, matrix, labels, weights, differentiate):
  """The loss and cross-entropies; gradients towards hidden states and matrix, or None."""
  share = _Share.of(hidden, matrix)
  by_parts = _by_pieces if sharding.size("layer_dim") > 1 else _by_cells
  out, gradients = by_parts(penalties, share, hidden, labels, weights, differentiate)
  if differentiate:
    d_hidden, d_rows = gradients
    gradients = d_hidden.astype(hidden.dtype), share.gradient(d_rows, matrix)
  return out, gradients


def _by_cells(penalties, share, hidden, labels, weights, differentiate):
  """Some cells after others, each against all rows of the share."""

  def chunk(d_rows, cells):
    hidden, labels, weights = cells
    logits = share.logits(0, share.rows, hidden)
    sums = _Sums.of(share, 0, logits, labels).over_chips()
    out = _loss(penalties, share, sums, labels, weights)
    if not differentiate:
      return None, (out, None)
    d = _d_logits(penalties, share, 0, logits, sums, labels, weights).astype(hidden.dtype)
    d_hidden = jnp.einsum("tv,vd->td", d, share.rows)
    part = jnp.einsum("tv,td->vd", d, hidden, preferred_element_type=jnp.float32)
    return d_rows + part, (out, d_hidden)

  T, start = len(labels), jnp.zeros(share.rows.shape, jnp.float32) if differentiate else None
  cells = _chunks(share, hidden, labels, weights)
  d_rows, ((loss, entropy), d_hidden) = jax.lax.scan(chunk, start, cells)
  whole = lambda x: x.reshape(-1, *x.shape[2:])[:T]
  return (loss.sum(), whole(entropy)), differentiate and (whole(d_hidden), d_rows)


def _chunks(share, *cells):
  """Cuts [T, ...] into [n, t, ...], with padding that has no weight."""
  T = len(cells[0])
  n = -(-T // max(_CHUNK_LOGITS // len(share.rows), _CHUNK_CELLS))
  t = -(-T // n)
  pad = lambda x: jnp.pad(x, [(0, n * t - T)] + [(0, 0)] * (x.ndim - 1))
  return tuple(pad(x).reshape(n, t, *x.shape[1:]) for x in cells)


def _by_pieces(penalties, share, hidden, labels, weights, differentiate):
  """All cells against one piece of the vocabulary after another."""

  def add(sums, i):
    logits = share.logits(i, share.fetch(i), hidden)
    return sums.plus(_Sums.of(share, i, logits, labels)), None

  sums, _ = jax.lax.scan(add, _Sums.nothing(len(labels)), share.pieces())
  sums = sums.over_chips()
  out = _loss(penalties, share, sums, labels, weights)
  if not differentiate:
    return out, None

  def gradients(d_hidden, i):
    rows = share.fetch(i)
    logits = share.logits(i, rows, hidden)
    d = _d_logits(penalties, share, i, logits, sums, labels, weights).astype(hidden.dtype)
    d_hidden += jnp.einsum("tv,vd->td", d, rows, preferred_element_type=jnp.float32)
    # Scattered along the first axis, as a product's gradient is: see layers.py.
    return d_hidden, sharding.scatter(jnp.einsum("tv,td->dv", d, hidden), "layer_dim", 0)

  start = jnp.zeros(hidden.shape, jnp.float32)
  d_hidden, d_rows = jax.lax.scan(gradients, start, share.pieces())
  return out, (d_hidden, d_rows.swapaxes(1, 2).reshape(share.rows.shape))


class _Share(NamedTuple):
  """A chip's part of the output matrix: the rows of some tokens.

  Attributes:
    rows: [tokens, D], D as it is cut; in the dtype of activations, with zeros up to whole pieces.
    first: id of the first row's token.
    vocabulary: V.
    piece: rows of a piece; all of them where D is not cut.
  """

  rows: jax.Array
  first: jax.Array | int
  vocabulary: int
  piece: int

  @classmethod
  def of(cls, hidden: jax.Array, matrix: jax.Array) -> "_Share":
    """Deals the vocabulary out among the chips that share it."""
    V, chips = len(matrix), sharding.size("vocab")
    tokens = piece = -(-V // chips)
    if sharding.size("layer_dim") > 1:
      pieces = -(-tokens * len(hidden) // _PIECE_LOGITS)
      piece = -(-tokens // (pieces * LANES)) * LANES
      tokens = -(-tokens // piece) * piece
    rows = jnp.pad(matrix.astype(hidden.dtype), ((0, tokens * chips - V), (0, 0)))
    rows = sharding.exchange(rows, "vocab", cut=0, join=1)
    return cls(rows, sharding.index("vocab") * tokens, V, piece)

  def gradient(self, d_rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Turns a gradient towards `rows` into one towards the matrix that they were made of."""
    return sharding.exchange(d_rows, "vocab", cut=1, join=0)[: len(matrix)].astype(matrix.dtype)

  def pieces(self) -> jax.Array:
    """Indices of the pieces."""
    return jnp.arange(len(self.rows) // self.piece)

  def fetch(self, i: jax.Array) -> jax.Array:
    """Rows of piece i, [piece, D] with D whole."""
    rows = jax.lax.dynamic_slice_in_dim(self.rows, i * self.piece, self.piece)
    return sharding.gather(rows, "layer_dim", 1)

  def ids(self, i: jax.Array | int) -> jax.Array:
    """Tokens of the rows of piece i."""
    return self.first + i * self.piece + jnp.arange(self.piece)

  def logits(self, i: jax.Array | int, rows: jax.Array, hidden: jax.Array) -> jax.Array:
    """Logits of cells [t, D] for the rows of piece i, float32 [t, piece]."""
    logits = jnp.einsum("td,vd->tv", hidden, rows, preferred_element_type=jnp.float32)
    return jnp.where(self.ids(i) < self.vocabulary, logits, _NEVER)


class _Sums(NamedTuple):
  """Sums over some of the vocabulary, for each cell: float32 [t].

  Attributes:
    top: the highest logit.
    exp: of exp(logit - top).
    label: the label's logit.
    all: of all logits.
  """

  top: jax.Array
  exp: jax.Array
  label: jax.Array
  all: jax.Array

  @classmethod
  def nothing(cls, cells: int) -> "_Sums":
    """Over no token."""
    return cls(jnp.full(cells, _NEVER), *jnp.zeros((3, cells)))

  @classmethod
  def of(cls, share: _Share, i: jax.Array | int, logits: jax.Array, labels: jax.Array) -> "_Sums":
    """Over the rows of piece i."""
    ids, top = share.ids(i), logits.max(-1)
    exp = jnp.exp(logits - top[:, None]).sum(-1)
    label = jnp.where(labels[:, None] == ids, logits, 0).sum(-1)
    return cls(top, exp, label, jnp.where(ids < share.vocabulary, logits, 0).sum(-1))

  @property
  def log(self) -> jax.Array:
    """Log of the sum of exp(logit)."""
    return self.top + jnp.log(self.exp)

  def plus(self, other: "_Sums") -> "_Sums":
    """Adds the sums over other tokens."""
    top = jnp.maximum(self.top, other.top)
    exp = self.exp * jnp.exp(self.top - top) + other.exp * jnp.exp(other.top - top)
    return _Sums(top, exp, self.label + other.label, self.all + other.all)

  def over_chips(self) -> "_Sums":
    """Adds those of the chips that share the vocabulary."""
    top = sharding.highest(self.top, "vocab")
    rest = self.exp * jnp.exp(self.top - top), self.label, self.all
    return _Sums(top, *sharding.total(rest, "vocab"))


def _loss(penalties, share, sums, labels, weights):
  """The weighted sum and the cross-entropies of cells."""
  entropy = jnp.where(labels >= 0, sums.log - sums.label, 0.0)
  loss = entropy + penalties.z_loss * sums.log**2
  if penalties.label_smoothing:
    loss += penalties.label_smoothing * (sums.log - sums.all / share.vocabulary - entropy)
  return (weights * loss).sum(), entropy


def _d_logits(penalties, share, i, logits, sums, labels, weights):
  """Gradient towards the logits of piece i."""
  smooth, ids = penalties.label_smoothing, share.ids(i)
  pull = weights * (1 + 2 * penalties.z_loss * sums.log)
  target = (labels[:, None] == ids) * (1 - smooth)
  if smooth:
    target += smooth / share.vocabulary * (ids < share.vocabulary)
  return jnp.exp(logits - sums.log[:, None]) * pull[:, None] - weights[:, None] * target
