"""Feeding rows one by one against one pass over the whole grid."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msjax.config import Config, ModelConfig
from msjax.decoding import prepared as prepared_lib
from msjax.decoding.prepared import Stacked, Unrolled
from msjax.kernels import tpu_decode
from msjax.streams import HOLE, Stream, Streams
from msjax.training.state import Learner

VOCAB, SILENCE, ROWS = 20, 3, 6
KINDS = ("output", "input", "internal")
TINY = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, dtype="float32")
# Compiling takes most of the time here, and LLVM's optimisation most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def small_key_blocks(monkeypatch):
  """So that a few rows fill several."""
  monkeypatch.setattr(prepared_lib, "KEY_BLOCK", 4)


def random_model(count, cfg=TINY, **rule):
  """A model of so many streams, every weight random."""
  specs = (f"s{i}:{KINDS[i % 3]}" for i in range(count))
  learner = Learner(
    Config(model=cfg), Streams(tuple(map(Stream.parse, specs)), SILENCE, **rule), VOCAB
  )
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  draw = lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype)
  return learner.model(jax.tree.map(draw, shapes))


@jit
def whole_pass(model, tokens, positions=None):
  return model.logits(model(tokens, positions=positions), tokens)


@jit
def feed(model, cache, tokens, positions=None, count=None):
  hidden, cache = prepared_lib.feed(model, cache, tokens, count, positions)
  return model.logits(hidden, tokens), cache


def feed_all(prepared, cache, tokens, positions=None, each=1):
  """Feeds [B, R, S], `each` rows at a time; returns logits [B, R, S, V] and the cache."""
  logits = []
  for r in range(0, tokens.shape[1], each):
    rows = slice(r, r + each)
    at = None if positions is None else positions[:, rows]
    found, cache = feed(prepared, cache, tokens[:, rows], at)
    logits.append(found)
  return np.concatenate(logits, axis=1), cache


def random_tokens(sessions, count, seed=0):
  """[B, R, S] with holes and silence."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (sessions, ROWS, count)).astype(np.int32)
  tokens[rng.random(tokens.shape) < 0.3] = SILENCE
  tokens[rng.random(tokens.shape) < 0.15] = HOLE
  return tokens


def ragged(tokens, *starts):
  """Sessions that begin at these rows: holes before; positions from there, with jumps."""
  row, start = np.arange(ROWS)[:, None], np.array(starts)[:, None, None]
  jumps = np.random.default_rng(0).integers(0, 3, tokens.shape)  # RoPE would not feel a shift
  return np.where(row < start, HOLE, tokens), np.maximum(row - start, 0) + jumps


@pytest.mark.parametrize(
  ("count", "same_row", "skip_silence"),
  [
    (1, "hidden", False),
    (1, "visible", True),
    (2, "hidden", True),
    (2, "inputs", False),
    (3, "hidden", False),
    (3, "inputs", True),
    (3, "ordered", False),
    (3, "ordered", True),
    (3, "visible", False),
    (10, "hidden", False),
    (10, "inputs", False),
    (10, "visible", True),
  ],
)
def test_rows_are_those_of_a_whole_pass(count, same_row, skip_silence):
  model = random_model(count, same_row=same_row, skip_silence=skip_silence)
  tokens, positions = ragged(random_tokens(3, count), 0, 2, 4)
  prepared = Unrolled.of(model)
  cache = prepared.room(3, ROWS)
  ours, cache = feed_all(prepared, cache, tokens, positions)  # to the last cell there is room for
  np.testing.assert_allclose(ours, whole_pass(model, tokens, positions), atol=1e-4, rtol=0)
  np.testing.assert_array_equal(cache.row, ROWS)
  assert ROWS * count <= cache.capacity < ROWS * count + 4


MODEL = random_model(3, same_row="inputs")
UNROLLED = Unrolled.of(MODEL)


def test_sessions_may_be_at_different_rows():
  tokens = random_tokens(2, 3)
  expected = np.asarray(whole_pass(MODEL, tokens))
  caches = [
    feed_all(UNROLLED, UNROLLED.room(1, ROWS), tokens[[b], :fed])[1] for b, fed in enumerate((2, 5))
  ]
  cache = jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
  np.testing.assert_array_equal(cache.row, [2, 5])
  next_rows = np.stack([tokens[0, 2:3], tokens[1, 5:6]])
  logits, cache = feed(UNROLLED, cache, next_rows)
  np.testing.assert_allclose(logits[:, 0], [expected[0, 2], expected[1, 5]], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(cache.row, [3, 6])


@pytest.mark.parametrize("of", [Unrolled.of, Stacked.of])
def test_many_rows_at_once_are_those_one_by_one(of):
  prepared, tokens = of(MODEL), random_tokens(2, 3)
  ours, cache = feed_all(prepared, prepared.room(2, ROWS), tokens, each=4)
  np.testing.assert_allclose(ours, whole_pass(MODEL, tokens), atol=1e-4, rtol=0)
  np.testing.assert_array_equal(cache.row, ROWS)


@pytest.mark.parametrize("of", [Unrolled.of, Stacked.of])
def test_rows_that_do_not_count_leave_nothing_behind(of):
  prepared, tokens = of(MODEL), random_tokens(2, 3)
  count = np.array([1, 3])
  _, cache = feed(prepared, prepared.room(2, ROWS + 2), tokens[:, :4], count=count)
  np.testing.assert_array_equal(cache.row, count)
  rest = np.stack([tokens[0, 1:4], tokens[1, 3:6]])
  ours, _ = feed(prepared, cache, rest)
  expected = whole_pass(MODEL, tokens)
  np.testing.assert_allclose(ours, [expected[0, 1:4], expected[1, 3:6]], atol=1e-4, rtol=0)


def test_a_cache_grows_on_the_way():
  tokens = random_tokens(2, 3)
  first, cache = feed_all(UNROLLED, UNROLLED.room(2, 2), tokens[:, :2])
  cache = cache.grown(cache.capacity).grown(cache.capacity)
  assert cache.capacity >= ROWS * 3
  rest, _ = feed_all(UNROLLED, cache, tokens[:, 2:])
  ours = np.concatenate([first, rest], axis=1)
  np.testing.assert_allclose(ours, whole_pass(MODEL, tokens), atol=1e-4, rtol=0)


def test_what_another_session_left_behind_is_not_seen():
  _, used = feed_all(UNROLLED, UNROLLED.room(2, ROWS), random_tokens(2, 3, seed=1))
  used = dataclasses.replace(used, row=jnp.zeros_like(used.row))
  tokens = random_tokens(2, 3)
  ours, _ = feed_all(UNROLLED, used, tokens)
  fresh, _ = feed_all(UNROLLED, UNROLLED.room(2, ROWS), tokens)
  assert ours.tobytes() == fresh.tobytes()


def test_keys_and_values_are_kept_in_the_dtype_of_activations():
  model = random_model(2, dataclasses.replace(TINY, dtype="bfloat16"))
  prepared = Unrolled.of(model)
  cache = prepared.room(1, ROWS)
  _, after = jax.eval_shape(feed, prepared, cache, np.zeros((1, 1, 2), np.int32))
  assert {x.dtype for x in (*after.k, *after.v)} == {jnp.dtype(jnp.bfloat16)}
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


def test_unrolling_leaves_the_model_whole():
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(MODEL)))
  unrolled = UNROLLED
  assert len(unrolled.layers) == TINY.layers
  assert not hasattr(unrolled.trunk, "layers")
  for i, block in enumerate(unrolled.blocks):
    of_layer = jax.tree.map(lambda stacked: stacked[i], MODEL.layers)  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, block, of_layer)
  np.testing.assert_array_equal(unrolled.unembed, MODEL.output_matrix)
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(MODEL)), before)


def test_matrices_are_cast_once_and_norms_are_not():
  model = random_model(2, dataclasses.replace(TINY, dtype="bfloat16", tied_head=False))
  unrolled = Unrolled.of(model)
  assert (
    unrolled.unembed.dtype == unrolled.layers[0].by_output.attention.q[...].dtype == jnp.bfloat16
  )
  assert unrolled.layers[0].by_output.mlp_norm[...].dtype == jnp.float32
  tokens = random_tokens(2, 2)
  logits, _ = feed_all(unrolled, unrolled.room(2, ROWS), tokens)
  np.testing.assert_allclose(logits, whole_pass(model, tokens), atol=0.1, rtol=0.05)


def test_room_is_made_in_whole_key_blocks():
  assert UNROLLED.room(1, 1).capacity == prepared_lib.KEY_BLOCK
  assert UNROLLED.room(1, prepared_lib.KEY_BLOCK).capacity == 3 * prepared_lib.KEY_BLOCK


# The scan over layers with the decode kernel.

WIDE = dataclasses.replace(TINY, head_dim=64, heads=4, kv_heads=2)


@pytest.fixture
def interpreted(monkeypatch):
  """Runs the decode kernel on the CPU."""
  kernel = functools.partial(tpu_decode.attention, interpret=True)
  monkeypatch.setattr(tpu_decode, "attention", kernel)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
  ("count", "same_row", "skip_silence"), [(3, "hidden", False), (10, "inputs", True)]
)
def test_stacked_rows_are_those_of_a_whole_pass(count, same_row, skip_silence):
  model = random_model(count, WIDE, same_row=same_row, skip_silence=skip_silence)
  tokens, positions = ragged(random_tokens(3, count), 0, 2, 4)
  prepared = Stacked.of(model)
  ours, cache = feed_all(prepared, prepared.room(3, ROWS), tokens, positions)
  np.testing.assert_allclose(ours, whole_pass(model, tokens, positions), atol=1e-4, rtol=0)
  np.testing.assert_array_equal(cache.row, ROWS)
  assert cache.k.shape == (WIDE.layers, 3, 128, 2 * 64)


@pytest.mark.usefixtures("interpreted")
def test_a_stacked_cache_holds_what_an_unrolled_one_does():
  model = random_model(3, WIDE)
  tokens = random_tokens(2, 3)
  caches = [
    feed_all(prepared, prepared.room(2, ROWS), tokens)[1]
    for prepared in (Stacked.of(model), Unrolled.of(model))
  ]
  cells = ROWS * 3
  stacked, unrolled = ((cache.k, cache.v) for cache in caches)
  unrolled = [k.swapaxes(2, 3) for k in unrolled[0]], unrolled[1]
  for ours, theirs in zip(stacked, unrolled):
    by_head = ours.reshape(WIDE.layers, 2, -1, 2, 64).swapaxes(2, 3)
    np.testing.assert_allclose(
      by_head[:, :, :, :cells], np.stack(theirs)[:, :, :, :cells], atol=1e-5
    )
    assert not by_head[:, :, :, cells:].any()


def test_stacking_casts_matrices_and_no_norms():
  model = random_model(2, dataclasses.replace(WIDE, dtype="bfloat16", tied_head=False))
  stacked = Stacked.of(model)
  assert stacked.unembed.dtype == stacked.layers.attention.q[...].dtype == jnp.bfloat16
  assert stacked.layers.mlp_norm[...].dtype == jnp.float32
  assert not hasattr(stacked.trunk, "layers")
  assert stacked.room(1, 1).k.dtype == jnp.bfloat16
