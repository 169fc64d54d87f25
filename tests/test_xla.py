"""Blocked attention against dense attention in float64, forward, backward and under dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import NAMES, dense, jit

from msjax.decoding.prepared import KEY_BLOCK
from msjax.kernels import xla
from msjax.kernels.xla import Dropout
from msjax.streams import Stream, Streams, Visibility

HEAD, RATE = 8, 0.3


def attention(q, k, v, *args, **kwargs):
  """Attention to keys as dense attention takes them, [B, K, M, H]."""
  return xla.attention(q, jnp.swapaxes(k, 2, 3), v, *args, **kwargs)


def random_visibility(rng, B, L, M):
  """Any intervals in the middle of the keys, own keys anywhere: more than streams ever ask for."""
  ends = np.sort(rng.integers(M // 4, M - M // 4 + 1, (2, B, L)), axis=0).astype(np.int32)
  return Visibility(
    start=ends[0],
    end=ends[1],
    itself=rng.integers(0, M, (B, L)).astype(np.int32),
    key_ok=rng.random((B, M)) < 0.7,
  )


def random_case(N, K, L, M, seed=0):
  """q, k, v, a cotangent and who sees whom."""
  rng = np.random.default_rng(seed)
  B = 2
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = normal(B, N, L, HEAD), normal(B, K, M, HEAD), normal(B, K, M, HEAD)
  return (q, k, v), normal(B, N, L, HEAD), random_visibility(rng, B, L, M)


def blocked(q, k, v, visibility, d_out, dropout_key=None):
  """The same of the kernel."""

  @jit
  def both(q, k, v, key):
    out, pull = jax.vjp(lambda *x: attention(*x, visibility, dropout(key)), q, k, v)
    return out, *pull(d_out.astype(out.dtype))

  return both(q, k, v, dropout_key)


def dropout(key):
  return None if key is None else Dropout(RATE, key)


@pytest.fixture
def blocks(monkeypatch):
  """Sets the block sizes."""

  def of(queries, keys):
    monkeypatch.setattr(xla, "QUERY_BLOCK", queries)
    monkeypatch.setattr(xla, "KEY_BLOCK", keys)

  return of


@pytest.mark.parametrize(
  ("heads", "length", "keys", "sizes"),
  [
    pytest.param((2, 2), 16, 16, (256, 256), id="one block"),
    pytest.param((4, 2), 24, 24, (8, 6), id="blocks that divide"),
    pytest.param((4, 1), 23, 23, (8, 5), id="blocks that do not divide"),
    pytest.param((6, 2), 3, 29, (256, 8), id="a row against a cache"),
    pytest.param((2, 1), 29, 5, (4, 256), id="more queries than keys"),
    pytest.param((1, 1), 1, 1, (8, 8), id="one cell"),
  ],
)
def test_is_dense_attention(blocks, heads, length, keys, sizes):
  blocks(*sizes)
  arrays, d_out, visibility = random_case(*heads, length, keys)
  ours = blocked(*arrays, visibility, d_out)
  theirs = dense(*arrays, visibility, d_out)
  for name, a, b in zip(NAMES, ours, theirs):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(("sessions", "queries"), [(1, 10), (3, 2), (3, 10), (3, 80)])
@pytest.mark.parametrize("key_block", [128, KEY_BLOCK])
def test_no_bit_depends_on_the_room_of_a_cache(optimized, sessions, queries, key_block):
  """So that no session feels how long others are; as the sums are compiled for use."""
  rng, fed = np.random.default_rng(0), 100
  q = rng.normal(size=(sessions, 4, queries, 64)).astype(np.float32)
  k, v = rng.normal(size=(2, sessions, 2, fed, 64)).astype(np.float32)
  found = set()
  for cells in (key_block * blocks for blocks in (1, 2, 3, 8, 16)):
    room = lambda x: np.pad(x, [(0, 0), (0, 0), (0, cells - fed), (0, 0)])  # noqa: B023
    own = np.tile(np.arange(fed - queries, fed, dtype=np.int32), (sessions, 1))
    key_ok = np.tile(np.arange(cells) < fed, (sessions, 1))
    visibility = Visibility(np.zeros_like(own), np.full_like(own, fed - queries), own, key_ok)
    attend = jax.jit(functools.partial(xla.attention, key_block=key_block))  # as when in use
    keys = np.ascontiguousarray(room(k).swapaxes(2, 3))
    found.add(np.asarray(attend(q, keys, room(v), visibility)).tobytes())
  assert len(found) == 1


@pytest.fixture
def optimized():
  """Compiles as elsewhere than in tests (see conftest.py)."""
  jax.config.update("jax_disable_most_optimizations", False)


def test_is_stable_for_large_scores(blocks):
  blocks(8, 8)
  (q, k, v), d_out, visibility = random_case(2, 2, 24, 24)
  q = 300 * q  # scores in the hundreds: exp of them would overflow
  ours = blocked(q, k, v, visibility, d_out)
  for a, b in zip(ours, dense(q, k, v, visibility, d_out)):
    np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max(), rtol=0)


def test_bfloat16_stays_near_float32(blocks):
  blocks(8, 8)
  arrays, d_out, visibility = random_case(4, 2, 20, 20)
  half = [x.astype(jnp.bfloat16) for x in map(jnp.asarray, arrays)]
  ours = blocked(*half, visibility, jnp.asarray(d_out))
  for a, b in zip(ours, dense(*half, visibility, d_out)):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.04 * np.abs(b).max(), rtol=0)


def test_what_nobody_sees_is_not_read(blocks):
  """Blocks of the future, of other segments and of an empty cache cost no products: 0 x NaN would
  show."""
  blocks(8, 8)
  (q, k, v), d_out, _ = random_case(2, 2, 16, 48)
  row = np.arange(16) // 8
  starts = np.where(row == 0, 8, 24)
  visibility = Visibility(*(np.tile(x, (2, 1)) for x in (starts, starts + 8, starts + 3)), None)
  visibility = visibility._replace(key_ok=np.ones((2, 48), bool))
  seen = np.zeros(48, bool)
  seen[8:16] = seen[24:32] = True
  k, v = (np.where(seen[:, None], x, np.nan) for x in (k, v))
  out, d_q, d_k, d_v = blocked(q, k, v, visibility, d_out)
  assert np.isfinite(out).all()
  assert np.isfinite(d_q).all()
  assert not np.any(d_k[:, :, ~seen])
  assert not np.any(d_v[:, :, ~seen])


# Dropout.


def kept_factors(heads, length, visibility, key):
  """What dropout multiplies each probability with, [B, N, L, M], made visible.

  With q = 0 all that is seen weighs the same, and with v the unit matrix weights come out.
  """
  N, K = heads
  M = visibility.key_ok.shape[1]
  q = np.zeros((2, N, length, M), np.float32)
  v = np.tile(np.eye(M, dtype=np.float32), (2, K, 1, 1))
  run = jit(lambda q, k, v, key: attention(q, k, v, visibility, Dropout(RATE, key)))
  out = run(q, np.zeros_like(v), v, key)
  return np.asarray(out) * np.asarray(visibility.dense()).sum(-1)[:, None, :, None]


@pytest.mark.parametrize("sizes", [(256, 256), (8, 12)], ids=["one block", "several blocks"])
def test_dropout_is_differentiated_as_it_was_applied(blocks, sizes):
  blocks(*sizes)
  heads, L = (4, 2), 32
  arrays, d_out, visibility = random_case(*heads, L, L)
  key = jax.random.key(7)
  kept = kept_factors(heads, L, visibility, key)
  ours = blocked(*arrays, visibility, d_out, key)
  for name, a, b in zip(NAMES, ours, dense(*arrays, visibility, d_out, kept)):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=0, err_msg=name)


def test_dropout_keeps_the_expected_value(blocks):
  blocks(16, 16)
  L = 48
  everything = np.zeros((2, L), np.int32), np.full((2, L), L, np.int32)
  visibility = Visibility(*everything, everything[0], np.ones((2, L), bool))
  kept = kept_factors((2, 1), L, visibility, jax.random.key(0))
  np.testing.assert_allclose(np.unique(kept.round(4)), [0, round(1 / (1 - RATE), 4)])
  # 9,216 draws: their mean is 1 with a standard deviation of 0.007
  assert abs(kept.mean() - 1) < 0.03
  blocks_of = kept.reshape(2, 2, 3, 16, 3, 16).transpose(0, 1, 2, 4, 3, 5).reshape(-1, 256)
  assert len(np.unique(blocks_of, axis=0)) == 36  # sessions, heads and blocks draw apart


def test_dropout_depends_on_the_key_alone(blocks):
  blocks(8, 8)
  (q, k, v), _, visibility = random_case(2, 2, 24, 24)
  run = jit(lambda key: attention(q, k, v, visibility, Dropout(RATE, key)))
  first, again, other = (np.asarray(run(jax.random.key(i))) for i in (1, 1, 2))
  assert first.tobytes() == again.tobytes()
  assert np.abs(first - other).max() > 0.01


# Memory.


@functools.cache
def gradient_bytes(length):
  """Scratch memory of one gradient over a grid of ten streams, by XLA's own account."""
  streams = Streams(tuple(Stream(str(i), "internal", 1.0) for i in range(10)), 0)

  def loss(q, k, v, tokens):
    return attention(q, k, v, streams.visibility(tokens)).sum()

  x = jax.ShapeDtypeStruct((1, 1, length, HEAD), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, length // 10, 10), jnp.int32)
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, tokens).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
  short, long = gradient_bytes(4000), gradient_bytes(16000)
  assert long < 4.5 * short
  assert long < 0.05 * (4 * 16000**2)  # of one [L, L] in float32
