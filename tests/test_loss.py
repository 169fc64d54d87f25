"""Chunked cross-entropy against Optax on all logits at once."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import mesh, on_eight_devices

from msjax import sharding
from msjax.training import loss
from msjax.training.loss import Penalties, cross_entropy

T, D, V = 23, 8, 31
PLAIN, ALL = Penalties(), Penalties(z_loss=0.1, label_smoothing=0.2)


def random_cells(seed=0):
  """hidden, matrix, labels and weights; some cells without a label, some with weight 0."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, V, T).astype(np.int32)
  labels[rng.random(T) < 0.3] = -1
  weights = np.where(labels < 0, 0, rng.choice([0, 0.1, 1, 3], T)).astype(np.float32)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return normal(T, D), normal(V, D), labels, weights


def plain(penalties, hidden, matrix, labels, weights):
  """The weighted sum by Optax, and the cross-entropy of each cell."""
  logits = hidden @ matrix.T
  target = jax.nn.one_hot(labels, len(matrix))
  entropy = optax.softmax_cross_entropy(logits, target)
  smooth = optax.softmax_cross_entropy(
    logits, optax.smooth_labels(target, penalties.label_smoothing)
  )
  each = smooth + penalties.z_loss * jax.nn.logsumexp(logits, -1) ** 2
  return (weights * each).sum(), jnp.where(labels >= 0, entropy, 0)


def with_gradients(function, penalties, hidden, matrix, labels, weights):
  """((sum, entropies), gradients towards hidden and matrix), the sum scaled to feel a factor."""

  def scaled(hidden, matrix):
    total, entropy = function(penalties, hidden, matrix, labels, weights)
    return 0.5 * total, (total, entropy)

  (_, out), gradients = jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, matrix)
  return out, gradients


@pytest.mark.parametrize(
  "penalties",
  [PLAIN, Penalties(z_loss=0.1), Penalties(label_smoothing=0.2), ALL],
  ids=["plain", "z-loss", "smoothing", "both"],
)
def test_is_cross_entropy(penalties):
  cells = random_cells()
  ours, theirs = (with_gradients(f, penalties, *cells) for f in (cross_entropy, plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, theirs)
  without_gradients = jax.jit(cross_entropy, static_argnums=0)(penalties, *cells)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), without_gradients, ours[0])


@pytest.mark.parametrize("cells_at_once", [1, 7, T - 1, T])
def test_chunks_change_nothing(monkeypatch, cells_at_once):
  cells = random_cells()
  whole = with_gradients(cross_entropy, ALL, *cells)
  monkeypatch.setattr(loss, "_CHUNK_LOGITS", cells_at_once * V)
  cut = with_gradients(cross_entropy, ALL, *cells)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), cut, whole)


def test_cells_without_weight_are_without_gradient():
  hidden, matrix, labels, _ = random_cells()
  (total, entropy), gradients = with_gradients(
    cross_entropy, ALL, hidden, matrix, labels, np.zeros(T, np.float32)
  )
  assert total == 0
  assert not any(g.any() for g in gradients)
  assert np.isfinite(entropy).all()
  assert np.all((entropy > 0) == (labels >= 0))  # told of every labelled cell all the same


def test_large_logits_stay_finite():
  hidden, matrix, labels, weights = random_cells()
  out, gradients = with_gradients(cross_entropy, ALL, 1e3 * hidden, matrix, labels, weights)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize("matrix_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_keeps_a_float32_loss(matrix_dtype):
  hidden, matrix, labels, weights = random_cells()
  half, matrix = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(matrix, matrix_dtype)
  ours = with_gradients(cross_entropy, ALL, half, matrix, labels, weights)
  rounded = np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32)
  theirs = with_gradients(plain, ALL, np.asarray(half, np.float32), rounded, labels, weights)
  (total, entropy), (d_hidden, d_matrix) = ours
  assert (total.dtype, entropy.dtype) == (jnp.float32, jnp.float32)
  assert (d_hidden.dtype, d_matrix.dtype) == (jnp.bfloat16, matrix_dtype)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("backward", [False, True])
def test_all_logits_are_never_held(monkeypatch, backward):
  cells, dim, vocab = 4096, 16, 8192
  monkeypatch.setattr(loss, "_CHUNK_LOGITS", 2**18)
  shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
  total = lambda *args: cross_entropy(ALL, *args)[0]
  run = jax.jit(jax.grad(total, (0, 1)) if backward else total)
  compiled = run.lower(
    shape(cells, dim), shape(vocab, dim), shape(cells, dtype=jnp.int32), shape(cells)
  ).compile()
  held = compiled.memory_analysis().temp_size_in_bytes
  assert held < 4 * cells * vocab / 8


# On chips that share the matrix.


def on_chips(sizes, piece_logits, *cells):
  """As `with_gradients` of the cells of all chips; without gradients; numbers of pieces."""
  counts, pieces = [], loss._Share.pieces

  def counted(share):
    counts.append(len(pieces(share)))
    return pieces(share)

  def on_chip(*cells):
    (total, entropy), (d_hidden, d_matrix) = with_gradients(cross_entropy, ALL, *cells)
    d_matrix = sharding.summed_gradients(d_matrix, of_matrix)
    d_hidden = sharding.total(d_hidden, "vocab")  # each chip has that of its own share
    return (sharding.total(total, "batch"), entropy), (d_hidden, d_matrix)

  of_cells, of_matrix = sharding.spec("batch"), sharding.spec(None, "table_dim")
  in_specs = of_cells, of_matrix, of_cells, of_cells
  with (
    jax.set_mesh(mesh(**sizes)),
    mock.patch.object(loss, "_PIECE_LOGITS", piece_logits),
    mock.patch.object(loss._Share, "pieces", counted),
  ):
    out_specs = (sharding.spec(), of_cells), (of_cells, of_matrix)
    out = jax.jit(sharding.on_chips(on_chip, in_specs, out_specs))(*cells)
    alone = sharding.on_chips(lambda *cells: cross_entropy(ALL, *cells)[1], in_specs, of_cells)
    return jax.device_get((*out, jax.jit(alone)(*cells))), set(counts)


@pytest.mark.parametrize(
  ("sizes", "vocab", "pieces"),
  [
    ({"fsdp": 8}, 37, {1}),
    ({"fsdp": 8}, 300, {3}),  # of 128 tokens, the last one of 44
    ({"fsdp": (2, 2), "model": 2}, 601, {3}),  # the last one of the last chip has none
    ({"fsdp": 2, "model": 4}, 130, {1}),  # two chips have none
    ({"fsdp": 1, "model": 8}, 37, set()),
    ({"data": 4, "model": 2}, 37, set()),
  ],
  ids=str,
)
def test_chips_that_share_the_matrix_find_the_same(sizes, vocab, pieces):
  cells, dim = 24, 16
  rng = np.random.default_rng(0)
  labels = rng.integers(-1, vocab, cells).astype(np.int32)
  weights = np.where(labels < 0, 0, rng.random(cells)).astype(np.float32)
  hidden, matrix = (rng.normal(size=(n, dim)).astype(np.float32) for n in (cells, vocab))
  all_cells = hidden, matrix, labels, weights
  (*ours, entropy), counts = on_eight_devices(on_chips, sizes, vocab, *all_cells)
  theirs = with_gradients(plain, ALL, *all_cells)
  assert counts == pieces
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), tuple(ours), theirs
  )
  np.testing.assert_allclose(entropy, ours[0][1], rtol=1e-6)
