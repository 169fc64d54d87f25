"""The decode kernel against dense attention in float64, what it fetches, and what it compiles to.

Nothing here runs on a TPU: the kernel is interpreted, and compiled for TPUs ahead of time.
"""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from msjax.kernels import static
from msjax.kernels.tpu_decode import attention, key_block, plan, refusal, write_rows
from msjax.streams import HOLE, SAME_ROW, Stream, Streams, Visibility

SILENCE, WORD = 0, 1
# Compiling takes most of the time here, and LLVM's optimisation most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def visibility_of(S, M, rows, same_row="hidden", skip_silence=False, seed=0):
  """Who sees whom when sessions of so many earlier rows, a fourth holes, a fourth silent, feed one.

  Cells of rows to come are marked as words: an old cache may have been there.
  """
  rng = np.random.default_rng(seed)
  kinds = rng.permutation(["input", "output"] * S)[:S]
  streams = Streams(
    tuple(Stream(str(i), str(kind), 1.0) for i, kind in enumerate(kinds)),
    SILENCE,
    same_row,
    skip_silence,
  )
  rows = np.asarray(rows, np.int32)
  tokens = rng.choice([HOLE, SILENCE, WORD, WORD], (len(rows), M // S, S)).astype(np.int32)
  ok = np.ones((len(rows), M), bool)
  ok[:, : M // S * S] = streams.key_ok(tokens)
  own = tokens[np.arange(len(rows)), rows]
  return streams.visibility_in_cache(own[:, None], jnp.asarray(rows), jnp.asarray(ok))


def cached(visibility):
  """Cells that the kernel may read in the cache, bool [B, M]."""
  at = np.asarray(visibility.itself).min(1)
  ok = np.asarray(visibility.key_ok)
  return ok & (np.arange(ok.shape[1]) < at[:, None])


def case(visibility, K, G, H, dtype=jnp.float32, layers=1, seed=0):
  """Arguments of `attention`; in the cache NaN wherever nothing may be read, the row as well."""
  rng = np.random.default_rng(seed)
  (B, M), S = visibility.key_ok.shape, visibility.itself.shape[1]
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  cache = lambda: np.where(cached(visibility)[..., None], normal(layers, B, M, K * H), np.nan)
  arrays = normal(B, S, K * G, H), normal(B, S, K, H), normal(B, S, K, H), cache(), cache()
  return *(jnp.asarray(x, dtype) for x in arrays), jnp.int32(layers - 1), visibility


def dense(q, k_new, v_new, k_cache, v_cache, layer, visibility):
  """The same in float64, as a textbook has it, with the row written into a clean cache."""
  q, k_new, v_new = (np.asarray(x, np.float64) for x in (q, k_new, v_new))
  B, _, N, H = q.shape
  K = k_new.shape[2]
  itself, readable = np.asarray(visibility.itself), cached(visibility)[..., None]

  def keys(cache, new):
    x = np.where(readable, np.asarray(cache[layer], np.float64), 0).reshape(B, -1, K, H)
    x[np.arange(B)[:, None], itself] = new
    return np.repeat(x, N // K, axis=2)

  scores = np.einsum("bsnh,bmnh->bnsm", q, keys(k_cache, k_new)) / np.sqrt(H)
  scores = np.where(np.asarray(visibility.dense())[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum("bnsm,bmnh->bsnh", p, keys(v_cache, v_new))


# Exactness.

interpreted = jit(functools.partial(attention, interpret=True))


def assert_exact(arguments):
  out = interpreted(*arguments)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, dense(*arguments), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
  ("S", "K", "G", "H", "M"),
  [
    pytest.param(1, 1, 1, 128, 128, id="one stream, one head"),
    pytest.param(10, 2, 2, 128, 384, id="groups of two"),
    pytest.param(7, 2, 3, 64, 256, id="two heads in a panel, groups of three"),
    pytest.param(3, 4, 1, 64, 256, id="two panels of two heads"),
    pytest.param(16, 1, 8, 128, 256, id="groups of eight"),
    pytest.param(13, 2, 4, 64, 128, id="one panel of eight heads"),
  ],
)
def test_is_dense_attention(monkeypatch, S, K, G, H, M):
  monkeypatch.setattr("msjax.kernels.tpu_decode.KEY_BLOCK", 128)

  @hypothesis.settings(max_examples=20, deadline=None)
  @hypothesis.given(
    rows=st.lists(st.integers(0, M // S - 1), min_size=3, max_size=3),
    same_row=st.sampled_from(SAME_ROW),
    skip_silence=st.booleans(),
    seed=st.integers(0, 9),
  )
  @hypothesis.example([0, M // S - 1, 0], "hidden", False, 0)
  @hypothesis.example([0, 0, 0], "visible", True, 0)
  def check(rows, same_row, skip_silence, seed):
    visibility = visibility_of(S, M, rows, same_row, skip_silence, seed)
    assert_exact(case(visibility, K, G, H, seed=seed))

  check()


def test_bfloat16_is_float32_with_rounded_weights_and_outputs():
  arguments = case(visibility_of(10, 256, [0, 3, 24]), 2, 2, 128, jnp.bfloat16)
  out = interpreted(*arguments)
  assert out.dtype == jnp.bfloat16
  exact = dense(*arguments)
  # 2^-9 of a number is lost in rounding it; weights are rounded once, outputs once
  np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2**-8 * np.abs(exact).max())


def test_is_stable_for_large_scores():
  q, *rest = case(visibility_of(3, 128, [5, 9]), 1, 1, 128, layers=3)
  arguments = 300 * q, *rest  # scores in the thousands: exp of them would overflow
  np.testing.assert_allclose(interpreted(*arguments), dense(*arguments), atol=1e-3)


@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_float32_products_are_of_float32(dtype, exact):
  """A TPU multiplies bfloat16 unless told otherwise, which interpretation does not show."""
  program = str(jax.make_jaxpr(attention)(*case(visibility_of(3, 128, [5, 9]), 1, 1, 128, dtype)))
  assert ("Precision.HIGHEST" in program) == exact
  assert not exact or program.count("dot_general[") == program.count("precision=(Precision.HIGHEST")


def test_reads_the_layer_that_is_asked_for():
  *arrays, _, visibility = case(visibility_of(3, 128, [5, 9]), 1, 1, 128, layers=3)
  first, last = (interpreted(*arrays, jnp.int32(i), visibility) for i in (0, 2))
  np.testing.assert_allclose(first, dense(*arrays, 0, visibility), atol=5e-6)
  np.testing.assert_allclose(last, dense(*arrays, 2, visibility), atol=5e-6)
  assert np.abs(first - last).max() > 0.01


def test_a_cache_that_holds_the_row_gives_the_same():
  *arrays, layer, visibility = case(visibility_of(3, 128, [5, 9], "visible"), 1, 1, 128, layers=3)
  before = interpreted(*arrays, layer, visibility)
  q, k_new, v_new, k_cache, v_cache = arrays
  at = visibility.itself.min(1)
  in_all = lambda x: jnp.stack([x[:, :, 0]] * 3)
  written = (write_rows(c, in_all(n), at) for c, n in ((k_cache, k_new), (v_cache, v_new)))
  after = interpreted(q, k_new, v_new, *written, layer, visibility)
  np.testing.assert_array_equal(before, after)


def test_a_plan_serves_as_the_visibility_it_was_made_of():
  *arguments, visibility = case(visibility_of(3, 128, [5, 9]), 1, 1, 128, layers=3)
  planned = interpreted(*arguments, plan(visibility, arguments[3]))
  np.testing.assert_array_equal(planned, interpreted(*arguments, visibility))


# The plan.


def cache_shape(B, M, lanes=512, dtype=jnp.bfloat16, layers=1):
  return jax.ShapeDtypeStruct((layers, B, M, lanes), dtype)


def steps_of(work):
  """Of both halves, one after another: session, source, block, todo; idle steps too."""
  lists = np.stack(work[:4], -1)[:, : int(work.steps)]
  return lists.reshape(-1, 4)


planned = jax.jit(plan)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  ends=st.lists(st.integers(0, 900), min_size=5, max_size=5), seed=st.integers(0, 99)
)
@hypothesis.example([0, 0, 0, 0, 0], 0)
@hypothesis.example([900, 0, 0, 0, 0], 0)
@hypothesis.example([0, 0, 0, 0, 900], 0)
def test_the_plan_has_each_seen_block_once(ends, seed):
  B, M, keys = 5, 1024, 512
  rng = np.random.default_rng(seed)
  ok = rng.random((B, M)) < rng.choice([0.0, 0.003, 1.0], (B, M // 256)).repeat(256, 1)
  at = np.array(ends, np.int32)[:, None] + np.arange(3, dtype=np.int32)
  visibility = Visibility(np.zeros_like(at), at, at, ok)
  cache = jnp.zeros(cache_shape(B, M, 2048).shape, jnp.bfloat16)
  assert key_block(cache) == keys
  work = planned(visibility, cache)
  steps = steps_of(work)
  session, source, block, todo = steps.T
  first, last, seen, masked = (todo >> bit & 1 == 1 for bit in range(4))

  readable = cached(visibility).reshape(B, -1, keys)
  np.testing.assert_array_equal(np.asarray(work.key_ok)[:, 0] == -1, cached(visibility))
  assert sorted(zip(source[seen], block[seen])) == list(zip(*readable.any(2).nonzero()))
  np.testing.assert_array_equal(source[seen], session[seen])
  np.testing.assert_array_equal(masked[seen], ~readable.all(2)[source, block][seen])
  assert not (masked & ~seen).any()
  # every session starts and ends once, in this order, and no other comes between
  busy = todo > 0
  assert sorted(session[first]) == sorted(session[last]) == list(range(B))
  assert (np.flatnonzero(first) <= np.flatnonzero(last)).all()
  assert (session[first] == session[last]).all()
  assert (np.diff(session[busy]) >= 0).all()
  # the halves are of whole sessions, as equal as these allow
  half = len(steps) // 2
  counts = np.bincount(session[busy], minlength=B)
  assert half == min(max(sum(counts[:i]), sum(counts[i:])) for i in range(1, B))
  assert not set(session[:half]) & set(session[half:])
  # a step that needs no block stays with the one in memory
  moved = (np.diff(source) != 0) | (np.diff(block) != 0)
  assert seen[1:][moved].all()


def tiled(shape, dtype):
  """Bytes of an array's last two axes in TPU memory, in tiles of 8 (or 16) x 128."""
  size = jnp.dtype(dtype).itemsize
  rows = -(-shape[0] // (32 // size)) * (32 // size) if shape[0] > 1 else 1
  return rows * -(-shape[1] // 128) * 128 * size


def bytes_moved(work, cache, S, N, H):
  """What the grid copies between HBM and VMEM: a block whenever its index is not that before."""
  keys, lanes = key_block(cache), cache.shape[3]
  steps = steps_of(work)
  changes = lambda *columns: 1 + (np.diff(steps[:, columns], axis=0) != 0).any(1).sum()
  a_block = 2 * tiled((keys, lanes), cache.dtype) + tiled((1, keys), jnp.int32)
  a_session = 2 * tiled((S, N * H), cache.dtype) + 2 * tiled((max(S, 8), lanes), cache.dtype)
  a_session += tiled(work.row_ok.shape[1:], jnp.int32)
  return changes(1, 2) * a_block + changes(0) * a_session


def test_bytes_are_those_of_cached_keys_queries_and_outputs():
  B, S, N, K, H, cells = 16, 10, 8, 4, 128, 5120
  M = cells + 128
  at = np.full((B, 1), cells, np.int32) + np.arange(S, dtype=np.int32)
  visibility = Visibility(np.zeros_like(at), at, at, np.ones((B, M), bool))
  cache = cache_shape(B, M, K * H)
  work = jax.jit(lambda v: plan(v, cache))(visibility)
  needed = 2 * B * (2 * cells * K * H + 2 * S * N * H)
  moved = bytes_moved(work, cache, S, N, H)
  assert 0.9 * needed < moved <= 1.02 * needed
  assert not (steps_of(work)[:, 3] & 8).any()  # full blocks need no mask


def test_empty_sessions_fetch_nothing():
  B, S, M = 8, 4, 4096
  at = np.array([0, 0, 2048, 0, 0, 1024, 0, 0], np.int32)[:, None] + np.arange(S, dtype=np.int32)
  visibility = Visibility(np.zeros_like(at), at, at, np.ones((B, M), bool))
  steps = steps_of(jax.jit(lambda v: plan(v, cache_shape(B, M)))(visibility))
  fetched = {(int(s), int(b)) for s, b in steps[:, 1:3]}
  # the sessions before the first full one: there must be some block
  assert fetched == {(0, 0), (2, 0), (2, 1), (5, 0)}


@pytest.mark.parametrize(
  ("M", "lanes", "dtype", "keys"),
  [
    (8192, 512, jnp.bfloat16, 1024),
    (8192, 128, jnp.bfloat16, 1024),
    (8192, 2048, jnp.float32, 256),
    (8192, 1536, jnp.bfloat16, 512),
    (640, 512, jnp.bfloat16, 640),
    (8192, 1 << 16, jnp.bfloat16, 128),
  ],
)
def test_key_block(M, lanes, dtype, keys):
  assert key_block(cache_shape(1, M, lanes, dtype)) == keys


# Writing.


@pytest.mark.parametrize("at", [[0, 5, 117], [40, 40, 40]], ids=["ragged", "in lockstep"])
def test_write_rows(at):
  rng = np.random.default_rng(0)
  cache, new = rng.normal(size=(2, 3, 128, 64)), rng.normal(size=(2, 3, 11, 64))
  expected = cache.copy()
  for b, i in enumerate(at):
    expected[:, b, i : i + 11] = new[:, b]
  out = jax.jit(write_rows)(*map(jnp.asarray, (cache, new)), jnp.array(at, jnp.int32))
  np.testing.assert_array_equal(out, expected.astype(np.float32))


# Refusals.


def shapes(S=4, K=2, G=2, H=128, M=256, B=2, dtype=jnp.bfloat16):
  """Arguments of `refusal` that are none."""
  x = jax.ShapeDtypeStruct
  new, cache = x((B, S, K, H), dtype), x((3, B, M, K * H), dtype)
  row = x((B, S), jnp.int32)
  visibility = Visibility(row, row, row, x((B, M), bool))
  return {
    "q": x((B, S, K * G, H), dtype),
    "k_new": new,
    "v_new": new,
    "k_cache": cache,
    "v_cache": cache,
    "visibility": visibility,
  }


def test_what_runs_is_not_refused():
  for kwargs in ({}, {"H": 64}, {"dtype": jnp.float32}, {"S": 16, "G": 8}, {"M": 384}):
    arguments = shapes(**kwargs)
    assert refusal(**arguments) is None
    arguments["visibility"] = jax.eval_shape(plan, arguments["visibility"], arguments["k_cache"])
    assert refusal(**arguments) is None


@pytest.mark.parametrize(
  ("kwargs", "changed", "sentence"),
  [
    ({"H": 96}, {}, "q: shape (2, 4, 4, 96); this kernel takes [B, S, N, H] with H 64 or 128"),
    ({"H": 64, "K": 1}, {}, "k_new: 1 heads of 64; this kernel takes an even number of them"),
    ({"M": 200}, {}, "k_cache: 200 cells a session; this kernel takes multiples of 128"),
    ({"dtype": jnp.float16}, {}, "q: dtype float16; this kernel takes bfloat16 and float32"),
    (
      {"B": 200, "M": 131072},
      {},
      "k_cache: 25600 blocks of keys a layer; this kernel takes up to 24576",
    ),
    (
      {"S": 16, "G": 40},
      {},
      "q: shape (2, 16, 80, 128); 640 rows in one product, this kernel takes up to 512",
    ),
    ({}, {"q": (2, 4, 5, 128)}, "k_new: 2 heads; expected a divisor of the 5 heads of q"),
    (
      {},
      {"k_new": (2, 5, 2, 128)},
      "k_new: shape (2, 5, 2, 128); expected (2, 4, K, 128), as q is (2, 4, 4, 128)",
    ),
    ({}, {"v_new": (2, 4, 1, 128)}, "v_new: shape (2, 4, 1, 128); expected (2, 4, 2, 128)"),
    (
      {},
      {"k_cache": (2, 256, 256)},
      "k_cache: shape (2, 256, 256); expected (layers, 2, M, 256)",
    ),
    (
      {},
      {"v_cache": (3, 2, 128, 256)},
      "v_cache: shape (3, 2, 128, 256); expected (3, 2, 256, 256)",
    ),
    ({}, {"k_new": jnp.float32}, "k_new: dtype float32; expected bfloat16, as q is"),
  ],
)
def test_refusals_name_argument_shape_and_what_is_supported(kwargs, changed, sentence):
  arguments = shapes(**kwargs)
  for name, new in changed.items():
    old = arguments[name]
    shape, dtype = (new, old.dtype) if isinstance(new, tuple) else (old.shape, new)
    arguments[name] = jax.ShapeDtypeStruct(shape, dtype)
  assert refusal(**arguments) == sentence
  with pytest.raises(ValueError, match=re.escape(sentence)):
    jax.eval_shape(attention, layer=jax.ShapeDtypeStruct((), jnp.int32), **arguments)


def test_refuses_a_visibility_of_another_cache():
  arguments = shapes()
  arguments["visibility"] = shapes(M=384)["visibility"]
  assert refusal(**arguments) == "visibility.key_ok: shape (2, 384); expected (2, 256)"
  arguments["visibility"] = jax.eval_shape(
    plan, shapes(M=384)["visibility"], shapes(M=384)["k_cache"]
  )
  assert refusal(**arguments) == "visibility.key_ok: shape (2, 1, 384); expected (2, 1, 256)"


# What the TPU compiler makes of it.


def over_layers(q, k_new, v_new, k_cache, v_cache, visibility):
  """As a model decodes: a scan over layers, the stacked cache closed over."""
  work = plan(visibility, k_cache)

  def layer(x, i):
    return attention(x, k_new, v_new, k_cache, v_cache, i, work), None

  return jax.lax.scan(layer, q, jnp.arange(k_cache.shape[0]))[0]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
  "kwargs",
  [
    pytest.param({"S": 10, "K": 4, "B": 16, "M": 5248}, id="four heads of 128"),
    pytest.param({"S": 7, "K": 4, "G": 3, "H": 64, "M": 1280}, id="four heads of 64"),
    pytest.param({"S": 1, "K": 1, "G": 3, "M": 1280, "dtype": jnp.float32}, id="float32"),
  ],
)
def test_compiles_and_reads_the_cache_in_place(topology, kwargs):
  arguments = shapes(**kwargs)
  program = static.compile_for(over_layers, arguments.values(), topology)
  cache = arguments["k_cache"]
  a_layer = cache.size // cache.shape[0] * cache.dtype.itemsize
  memory = program.memory_analysis()
  assert memory.argument_size_in_bytes > 2 * 3 * a_layer
  assert memory.temp_size_in_bytes < max(4e6, 0.05 * a_layer)
  # the kernel itself takes the cache of all layers
  (call,) = re.findall(r".*custom_call_target=\"tpu_custom_call\".*", program.as_text())
  stacked = "[" + ",".join(map(str, cache.shape)) + "]"
  assert call.count(stacked) == 2


@pytest.mark.tpu_compiler
def test_writes_in_place():
  cache = cache_shape(16, 5248, layers=4)
  new, at = cache_shape(16, 10, layers=4), jax.ShapeDtypeStruct((16,), jnp.int32)
  program = static.compile_for(write_rows, (cache, new, at), "v5e:2x2", donate_argnums=0)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == cache.size * cache.dtype.itemsize
  assert memory.temp_size_in_bytes < 1e6
  assert " scatter(" not in program.as_text()
  assert program.as_text().count(" while(") == 1  # of two turns with eight sessions each
