"""What can reach which logits, bit for bit; and the whole pass against one written in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.config import Config, ModelConfig, RopeScaling
from msjax.kernels import xla
from msjax.streams import HOLE, SAME_ROW, Stream, Streams
from msjax.training.state import Learner

VOCAB, SILENCE = 20, 3
ROWS, KINDS = 7, ("output", "input", "internal")
TINY = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=64, dtype="float32")


def stream_set(count, **rule):
  specs = (f"s{i}:{KINDS[i % 3]}" for i in range(count))
  return Streams(tuple(map(Stream.parse, specs)), SILENCE, **rule)


def random_params(cfg, streams, seed=0):
  """Parameters of which none is 0 or 1, norms and biases included."""
  shapes = jax.eval_shape(Learner(Config(model=cfg), streams, VOCAB).init, jax.random.key(0)).params
  rng = np.random.default_rng(seed)

  def draw(path, p):
    return jnp.asarray(0.3 * rng.normal(size=p.shape) + path[-1].key.endswith("norm"), p.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_model(cfg, streams):
  learner = Learner(Config(model=cfg), streams, VOCAB)
  return learner.model(random_params(cfg, streams))


# Compiling takes most of the time here, and LLVM's optimisation most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def logits_of(model, tokens, segments=None, positions=None):
  return model.logits(model(tokens, segments, positions), tokens)


# Changing a cell changes no logits that the rule does not let it reach.


@functools.cache
def probe(same_row, skip_silence):
  """A model of three streams, run in several blocks: (streams, tokens, segments -> logits)."""
  streams = stream_set(len(KINDS), same_row=same_row, skip_silence=skip_silence)
  model = random_model(TINY, streams)
  run = jax.jit(lambda tokens, segments: model.logits(model(tokens, segments), tokens))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "QUERY_BLOCK", 8)  # 21 cells: three blocks, the last one not full
    patch.setattr(xla, "KEY_BLOCK", 8)
    run(*(np.zeros((2, ROWS, *rest), np.int32) for rest in ((len(KINDS),), ())))
  return streams, lambda *grid: np.asarray(run(*grid))


@st.composite
def changes(draw):
  """Two sessions [2, R, S], segments [2, R], a cell of the first, what it becomes."""
  cell = st.sampled_from((HOLE, SILENCE)) | st.integers(0, VOCAB - 1)
  count = 2 * ROWS * len(KINDS)
  tokens = np.array(draw(st.lists(cell, min_size=count, max_size=count)), np.int32)
  tokens = tokens.reshape(2, ROWS, len(KINDS))
  starts = st.lists(st.sampled_from((0, 0, 1)), min_size=ROWS, max_size=ROWS)
  segments = np.cumsum([draw(starts), draw(starts)], axis=1).astype(np.int32)
  row, stream = draw(st.integers(0, ROWS - 1)), draw(st.integers(0, len(KINDS) - 1))
  becomes = draw(cell.filter(lambda token: token != tokens[0, row, stream]))
  return tokens, segments, (row, stream), becomes


def sight(streams, tokens, segments):
  """Who sees whom in the first session, [R x S, R x S] by stream id."""
  seen = np.asarray(streams.visibility(tokens, segments).dense())[0]
  place = np.asarray(
    streams.to_attention(np.arange(seen.shape[0]).reshape(1, ROWS, len(KINDS)))
  ).ravel()
  by_id = np.zeros_like(seen)
  by_id[np.ix_(place, place)] = seen
  return by_id


def closure(seen):
  """Who hears of whom through any number of layers."""
  for _ in range(len(seen).bit_length()):
    seen = seen | (seen.astype(int) @ seen.astype(int) > 0)
  return seen


@pytest.mark.parametrize("skip_silence", [False, True])
@pytest.mark.parametrize("same_row", SAME_ROW)
@settings(deadline=None, max_examples=15)
@given(changes())
def test_a_cell_reaches_whom_the_rule_lets_it_reach(same_row, skip_silence, change):
  streams, run = probe(same_row, skip_silence)
  tokens, segments, cell, becomes = change
  changed = tokens.copy()
  changed[(0, *cell)] = becomes
  before, after = run(tokens, segments), run(changed, segments)
  differs = np.any(before.view(np.int32) != after.view(np.int32), axis=-1)
  assert not differs[1].any()  # the other session

  index = cell[0] * len(KINDS) + cell[1]
  seen = sight(streams, tokens, segments) | sight(streams, changed, segments)
  reached = closure(seen)[:, index].reshape(ROWS, -1)
  is_token = (tokens[0] != HOLE) | (changed[0] != HOLE)
  assert not np.any(differs[0] & ~reached)
  assert not np.any(differs[0] & ~is_token)  # logits at holes are 0
  told = seen[:, index].reshape(ROWS, -1) & is_token
  assert differs[0][told].all()  # so that the test can fail
  assert run(tokens, segments).tobytes() == before.tobytes()  # and back


@pytest.mark.parametrize("same_row", SAME_ROW)
def test_other_sessions_and_segments_leave_no_trace(same_row):
  _, run = probe(same_row, False)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (2, ROWS, len(KINDS))).astype(np.int32)
  segments = np.array([[0, 0, 0, 1, 1, 1, 1], [0] * ROWS], np.int32)
  before = run(tokens, segments)
  tokens[1] = rng.integers(HOLE, VOCAB, tokens[1].shape)
  segments[1] = np.arange(ROWS)  # walks other blocks
  tokens[0, :3] = HOLE
  assert run(tokens, segments)[0, 3:].tobytes() == before[0, 3:].tobytes()


def test_logits_at_holes_are_zero():
  _, run = probe("hidden", False)
  tokens = np.full((2, ROWS, len(KINDS)), HOLE, np.int32)
  assert not run(tokens, np.zeros((2, ROWS), np.int32)).any()


# The whole pass in NumPy, float64, dense.


def dense_logits(params, cfg, tokens, see, positions):
  """A decoder of one sequence: tokens and positions [L], see [L, L] -> [L, V]."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * scale

  def turn(x):  # [L, heads, H] as complex pairs (i, i + H / 2)
    half = cfg.head_dim // 2
    frequency = cfg.rope_theta ** (-np.arange(half) / half)
    if cfg.rope_scaling:
      turns = cfg.rope_scaling.original_max_position * frequency / (2 * np.pi)
      low, high = cfg.rope_scaling.low_freq_factor, cfg.rope_scaling.high_freq_factor
      keep = np.clip((turns - low) / (high - low), 0, 1)
      frequency = keep * frequency + (1 - keep) * frequency / cfg.rope_scaling.factor
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * positions[:, None, None] * frequency)
    return np.concatenate([pairs.real, pairs.imag], -1)

  x = p["embed"][tokens] + p["stream_embed"][np.arange(len(tokens)) % len(p["stream_embed"])]
  for i in range(cfg.layers):
    layer = jax.tree.map(lambda w: w[i], p["layers"])  # noqa: B023
    attention, mlp = layer["attention"], layer["mlp"]
    bias = lambda owner, name: owner.get(f"{name}_bias", 0.0)
    h = norm(x, layer["attention_norm"])
    q, k, v = (
      np.einsum("ld,dnh->lnh", h, attention[name]) + bias(attention, name) for name in "qkv"
    )
    if cfg.qk_norm:
      q, k = norm(q, attention["q_norm"]), norm(k, attention["k_norm"])
    q, k = turn(q), turn(k)
    for head in range(cfg.heads):
      shared = head // (cfg.heads // cfg.kv_heads)
      scores = q[:, head] @ k[:, shared].T / np.sqrt(cfg.head_dim)
      weights = np.exp(scores - scores.max(-1, keepdims=True)) * see
      attended = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
      x = x + attended @ attention["out"][head]
    x = x + bias(attention, "out")
    h = norm(x, layer["mlp_norm"])
    gate, up = (h @ mlp[name] + bias(mlp, name) for name in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"] + bias(mlp, "down")
  return norm(x, p["norm"]) @ p.get("head", p["embed"]).T


FAMILIES = {
  "qwen3": {"kv_heads": 2, "qk_norm": True},
  "qwen2.5": {"kv_heads": 1, "qk_norm": False, "qkv_bias": True, "tied_head": False},
  "llama": {
    "kv_heads": 4,
    "qk_norm": False,
    "out_bias": True,
    "mlp_bias": True,
    "tied_head": False,
    "rope_scaling": RopeScaling(original_max_position=16),
  },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stream_is_a_plain_causal_model(family):
  cfg = dataclasses.replace(TINY, heads=4, **FAMILIES[family])
  streams = stream_set(1)
  params = random_params(cfg, streams)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 40, 1))
  ours = logits_of(Learner(Config(model=cfg), streams, VOCAB).model(params), tokens)
  causal = np.tril(np.ones((40, 40)))
  theirs = dense_logits(params, cfg, tokens.ravel(), causal, np.arange(40))
  np.testing.assert_allclose(ours[0, :, 0], theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


def test_streams_are_rows_of_a_dense_model():
  streams = Streams(tuple(Stream(f"s{i}", "output", 1.0) for i in range(3)), SILENCE)
  params = random_params(TINY, streams)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (1, ROWS, 3))
  positions = rng.integers(0, 30, (1, ROWS, 3))  # a layout may choose its own
  ours = logits_of(
    Learner(Config(model=TINY), streams, VOCAB).model(params), tokens, positions=positions
  )
  row = np.repeat(np.arange(ROWS), 3)
  see = (row[:, None] > row) | np.eye(3 * ROWS, dtype=bool)
  theirs = dense_logits(params, TINY, tokens.ravel(), see, positions.ravel())
  np.testing.assert_allclose(ours.reshape(3 * ROWS, -1), theirs, atol=2e-5, rtol=0)


def test_packed_examples_are_those_alone():
  model = random_model(TINY, stream_set(3, same_row="inputs"))
  alone = np.random.default_rng(0).integers(HOLE, VOCAB, (2, 4, 3)).astype(np.int32)
  packed = logits_of(model, alone.reshape(1, 8, 3), np.array([[1] * 4 + [2] * 4]))
  np.testing.assert_allclose(packed.reshape(2, 4, 3, -1), logits_of(model, alone), atol=1e-5)


# Options.


def test_dropout_acts_only_with_a_key():
  model = random_model(dataclasses.replace(TINY, attention_dropout=0.5), stream_set(3))
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, ROWS, 3))
  run = jit(lambda model, key: model.logits(model(tokens, dropout_key=key), tokens))
  a, again, other = (np.asarray(run(model, jax.random.key(i))) for i in (1, 1, 2))
  off = np.asarray(logits_of(random_model(TINY, stream_set(3)), tokens))
  assert a.tobytes() == again.tobytes()
  assert np.abs(a - other).max() > 0.01
  assert np.abs(a - off).max() > 0.01


def test_layers_drop_apart(monkeypatch):
  keys, attention = [], xla.attention

  def spied(*args):
    jax.debug.callback(lambda key: keys.append(key.tobytes()), jax.random.key_data(args[-1].key))
    return attention(*args)

  monkeypatch.setattr(xla, "attention", spied)
  model = random_model(dataclasses.replace(TINY, attention_dropout=0.5), stream_set(1))
  tokens = np.zeros((1, 2, 1), np.int32)
  jit(lambda model, key: model(tokens, dropout_key=key))(model, jax.random.key(0))
  jax.effects_barrier()
  assert len(set(keys)) == TINY.layers


def test_bfloat16_is_of_activations_alone():
  streams = stream_set(3)
  half = random_model(dataclasses.replace(TINY, dtype="bfloat16"), streams)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, ROWS, 3))
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half, nnx.Param)))
  assert jax.eval_shape(lambda model: model(tokens), half).dtype == jnp.bfloat16
  ours, exact = logits_of(half, tokens), logits_of(random_model(TINY, streams), tokens)
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, exact, atol=0.1 * np.abs(exact).max())


def test_a_tied_head_is_the_embedding():
  streams = stream_set(1)
  tied, untied = (
    random_model(dataclasses.replace(TINY, tied_head=tied), streams) for tied in (True, False)
  )
  assert tied.head is None
  np.testing.assert_array_equal(tied.output_matrix, tied.embed[...])
  np.testing.assert_array_equal(untied.output_matrix, untied.head[...])
