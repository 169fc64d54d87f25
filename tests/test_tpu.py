"""The TPU kernels against dense attention in float64, interpreted on the CPU."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import GRIDS, NAMES, Grid, cells, dense, differentiated, jit

from msjax.kernels import tpu, tpu_backward, tpu_forward
from msjax.kernels.tpu import attention, plan, refusal
from msjax.streams import Visibility

B = 2
BYTES_A_QUERY = 128 * 28  # in VMEM, of one float32 head in the backward pass


def case(N, K, H, L, dtype=jnp.float32, seed=0):
  """q, k and v; a cotangent, such that gradients are not the larger for groups."""
  rng = np.random.default_rng(seed)
  normal = lambda heads: rng.normal(size=(B, heads, L, H))
  arrays = normal(N), normal(K), normal(K), normal(N) / math.sqrt(N / K)
  *arrays, d_out = (jnp.asarray(x, dtype) for x in arrays)
  return arrays, d_out


def compiled():
  """Returns a function of output and gradients, with blocks and parts of the sizes that are set."""
  return with_sizes(
    tpu.LARGEST_BLOCK, tpu_forward.TALL, tpu_forward.RESIDENT, tpu_backward.RESIDENT
  )


@functools.cache
def with_sizes(*_):
  return jit(differentiated(functools.partial(attention, interpret=True)))


@pytest.fixture
def small(monkeypatch):
  """Makes blocks so small that there are many; other sizes can be set."""
  set_to = lambda module, **sizes: [monkeypatch.setattr(module, *item) for item in sizes.items()]
  set_to(tpu, LARGEST_BLOCK=128)
  return set_to


def assert_exact(ours, theirs, atol=(5e-6, 1e-5, 1e-5, 1e-5)):
  for name, a, b, allowed in zip(NAMES, ours, theirs, atol):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=allowed, rtol=0, err_msg=name)


# Exactness.


@pytest.mark.parametrize(
  ("shape", "sizes", "cut"),
  [
    # N, K, H, L; sizes that are set; blocks of how many queries, parts of the backward pass
    pytest.param((1, 1, 128, 300), {}, (128, 1), id="one head, L not of whole blocks"),
    pytest.param((3, 1, 32, 384), {"streamed": True}, (128, 1), id="padded heads, streamed"),
    pytest.param((2, 1, 128, 384), {"fit": 2}, (128, 2), id="uneven parts"),
    pytest.param((4, 2, 64, 500), {"streamed": True, "fit": 1}, (128, 4), id="a part a block"),
    pytest.param((4, 2, 64, 500), {"largest": 256}, (256, 1), id="blocks of two panels"),
    pytest.param((8, 1, 64, 300), {"tall": 256}, (128, 1), id="groups of eight in four stacks"),
    pytest.param(
      (3, 1, 64, 500), {"largest": 256, "streamed": True}, (256, 1), id="three stacks, streamed"
    ),
    pytest.param((1, 1, 160, 500), {"largest": 512}, (512, 1), id="one block, heads of 160"),
  ],
)
def test_is_dense_attention(small, shape, sizes, cut):
  N, K, _, L = shape
  small(tpu, LARGEST_BLOCK=sizes.get("largest", 128))
  small(tpu_forward, TALL=sizes.get("tall", 512))
  if sizes.get("streamed"):
    small(tpu_forward, RESIDENT=0)
  if "fit" in sizes:
    small(tpu_backward, RESIDENT=sizes["fit"] * 128 * N // K * BYTES_A_QUERY)
  arrays, d_out = case(*shape)
  run = compiled()

  @hypothesis.settings(max_examples=4, deadline=None)
  @hypothesis.given(GRIDS)
  @hypothesis.example(Grid(10))
  @hypothesis.example(Grid(7, "visible", segment=20, holes=0.2))
  @hypothesis.example(Grid(3, "ordered", skip_silence=True, segment=20, silent=0.3))
  @hypothesis.example(Grid(16, "inputs", skip_silence=True, silent=1.0))
  def check(grid):
    visibility = grid.visibility(B, L)
    assert_exact(run(*arrays, visibility, d_out), dense(*arrays, visibility, d_out))

  assert cut == sizes_of(*arrays[:2])
  check()


def sizes_of(q, k):
  """Block size, and parts of the backward pass."""
  made = jax.eval_shape(lambda *x: plan(*x), q, k, cells(q.shape[0], q.shape[2]))
  parts = len(jax.tree.leaves(made.backward)[0])
  return made.keys.shape[2] // made.forward.causal.shape[1], parts


def test_is_stable_for_large_scores(small):
  (q, *kv), d_out = case(2, 1, 64, 384)
  arrays, visibility = (300 * q, *kv), Grid(3, segment=20).visibility(B, 384)
  ours = compiled()(*arrays, visibility, d_out)
  for name, a, b in zip(NAMES, ours, dense(*arrays, visibility, d_out)):
    # scores in the thousands: float32 knows them to 1e-4, and exp makes that a share of weights
    np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max(), rtol=0, err_msg=name)


def test_large_scores_that_are_not_seen_do_not_matter(small):
  (q, k, v), d_out = case(2, 1, 64, 384)
  visibility = Grid(1).visibility(B, 384)
  k = k.at[:, :, :128].multiply(1000.0)
  visibility = visibility._replace(key_ok=np.tile(np.arange(384) >= 128, (B, 1)))
  ours = compiled()(q, k, v, visibility, d_out)
  theirs = dense(q, k, v, visibility, d_out)
  # what comes from the large keys' own queries is as large as they are
  assert_exact([x[:, :, 128:] for x in ours], [x[:, :, 128:] for x in theirs])


def test_a_plan_serves_as_the_visibility_it_was_made_of(small):
  arrays, d_out = case(2, 1, 64, 384)
  visibility = Grid(7, segment=4, holes=0.2).visibility(B, 384)
  made = jit(plan)(*arrays[:2], visibility)
  for a, b in zip(*(compiled()(*arrays, x, d_out) for x in (visibility, made))):
    np.testing.assert_array_equal(a, b)


def test_products_of_float32_are_in_float32(small):
  """A TPU multiplies in bfloat16 unless told otherwise, which interpretation does not show."""
  visibility = Grid(3).visibility(B, 256)
  for dtype, exact in ((jnp.float32, True), (jnp.bfloat16, False)):
    arrays, d_out = case(2, 1, 64, 256, dtype)
    program = str(jax.make_jaxpr(differentiated(attention))(*arrays, visibility, d_out))
    products = program.count("dot_general[")
    assert products >= 2 * 4 + 5 * 3  # with keys of the own block, of partial and whole ones
    assert program.count("precision=(Precision.HIGHEST") == exact * products
    assert program.count("preferred_element_type=float32") == products


# Rounding.


def rounded(q, k, v, visibility, d_out):
  """Dense attention and its gradients in bfloat16, summed in float32.

  It rounds operands of products and results, as every such kernel has to; scores are in base 2.
  """
  half, wide = lambda x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float32)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  group = q.shape[1] // k.shape[1]
  k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
  in_base_2 = math.log2(math.e) / math.sqrt(q.shape[-1])
  q = half(wide(q) * in_base_2)
  s = jnp.where(visibility.dense()[:, None], product("bnqh,bnkh->bnqk", q, k), -jnp.inf)
  p = jax.nn.softmax(s * math.log(2), axis=-1)
  out = half(product("bnqk,bnkh->bnqh", half(p), v))
  delta = (wide(out) * wide(d_out)).sum(-1, keepdims=True)
  d_s = half(p * (product("bnqh,bnkh->bnqk", d_out, v) - delta))
  over_group = lambda x: x.reshape(B, -1, group, *x.shape[2:]).sum(2)
  d_q = half(product("bnqk,bnkh->bnqh", d_s, k) * math.log(2))
  d_q = half(wide(d_q) * in_base_2)
  d_k = half(over_group(product("bnqk,bnqh->bnkh", d_s, q)) * math.log(2))
  d_v = half(over_group(product("bnqk,bnqh->bnkh", half(p), d_out)))
  return out, d_q, d_k, d_v


@pytest.mark.parametrize("shape", [(4, 2, 128, 300), (8, 1, 64, 300)])
def test_bfloat16_is_float32_with_rounded_operands_and_results(small, shape):
  arrays, d_out = case(*shape, jnp.bfloat16)
  visibility = Grid(10, "inputs", segment=20, holes=0.1).visibility(B, shape[-1])
  exact = dense(*arrays, visibility, d_out)
  ours, theirs = compiled()(*arrays, visibility, d_out), jit(rounded)(*arrays, visibility, d_out)
  for name, a, b, c in zip(NAMES, ours, theirs, exact):
    assert a.dtype == jnp.bfloat16
    error, explained = (np.asarray(x, np.float64) - c for x in (a, b))
    assert rms(error) < 1.1 * rms(explained), name
    assert np.abs(error).max() < 2 * np.abs(explained).max(), name


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


def test_bfloat16_outputs_are_within_the_bound_of_rounding(small):
  """A number loses up to u = 2^-8 of itself in rounding; to first order in u an output loses
  u |out| for itself,
  u sum p |v| for weights p, and
  u sum p t (|v| + |out|) for scores, where t = sum |q k| bounds what rounding of q does to them."""
  (q, k, v), d_out = case(8, 1, 64, 300, jnp.bfloat16)
  visibility = Grid(10, "ordered", segment=4, holes=0.2).visibility(B, 300)
  out, *_ = compiled()(q, k, v, visibility, d_out)
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  p = np.exp(q @ k.swapaxes(2, 3) / 8) * np.asarray(visibility.dense())[:, None]
  p /= p.sum(-1, keepdims=True)
  exact = p @ v
  t = np.abs(q) @ np.abs(k).swapaxes(2, 3) / 8
  of_scores = (p * t) @ np.abs(v) + (p * t).sum(-1, keepdims=True) * np.abs(exact)
  bound = 2**-8 * (np.abs(exact) + p @ np.abs(v) + of_scores)
  error = np.abs(np.asarray(out, np.float64) - exact)
  assert (error <= 1.05 * bound + 1e-5).all()
  assert error.max() > 0.05 * bound.max()  # the bound bounds something


# What is not read.


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_that_nobody_sees_are_not_read(small, streamed):
  """Segments of 16 rows of 8, that is of one block; 0 x NaN would show.

  What stands in the first and the last of three sequences does not reach the second.
  """
  if streamed:
    small(tpu_forward, RESIDENT=0)
  arrays, d_out = case(2, 1, 64, 384)
  visibility = Grid(8).visibility(B, 384)
  start = np.arange(384, dtype=np.int32) // 128 * 128
  visibility = visibility._replace(start=np.tile(start, (B, 1)))
  middle = (np.arange(384) // 128 == 1)[:, None]
  run = compiled()
  clean = run(*arrays, visibility, d_out)
  poisoned = run(*(jnp.where(middle, x, np.nan) for x in arrays), visibility, d_out * middle)
  for a, b in zip(clean, poisoned):
    np.testing.assert_array_equal(a[:, :, 128:256], b[:, :, 128:256])
    assert np.isfinite(a[:, :, 128:256]).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_the_future_is_not_read(small, streamed):
  if streamed:
    small(tpu_forward, RESIDENT=0)
  (q, k, v), d_out = case(2, 1, 64, 384)
  visibility = Grid(8, "visible").visibility(B, 384)
  past = (np.arange(384) < 256)[:, None]
  run = compiled()
  clean = run(q, k, v, visibility, d_out)
  k, v = (jnp.where(past, x, np.nan) for x in (k, v))
  out, d_q, *_ = run(q, k, v, visibility, d_out)
  np.testing.assert_array_equal(out[:, :, :256], clean[0][:, :, :256])
  np.testing.assert_array_equal(d_q[:, :, :256], clean[1][:, :, :256])


# Plans and sizes.


def test_a_plan_says_where_no_query_sees_keys_of_a_later_panel(small):
  """A panel is 128 cells; one of 8 cells a row ends with a row, one of 10 does not."""
  small(tpu, LARGEST_BLOCK=256)
  q = jax.ShapeDtypeStruct((B, 1, 512, 64), jnp.float32)
  causal = lambda S, rule: plan(q, q, Grid(S, rule).visibility(B, 512)).forward.causal.tolist()
  assert causal(10, "hidden") == causal(10, "ordered") == causal(8, "visible") == [[1, 1]] * B
  assert causal(10, "visible") == [[0, 0]] * B


@pytest.mark.parametrize(
  ("shape", "dtype", "cut"),
  [
    # N, K, H, L; block size, parts of the backward pass
    ((8, 4, 128, 5120), jnp.bfloat16, (512, 1)),
    ((3, 1, 64, 1280), jnp.bfloat16, (256, 1)),
    # 40 MiB hold 5 blocks of 512 queries in groups of 8 in 128 lanes, 10 in groups of 2 in 256
    ((8, 1, 128, 2560), jnp.bfloat16, (512, 1)),
    ((8, 1, 128, 3072), jnp.bfloat16, (512, 2)),
    ((8, 1, 64, 3072), jnp.bfloat16, (512, 2)),
    ((8, 4, 256, 8192), jnp.bfloat16, (512, 2)),
    ((8, 4, 160, 8192), jnp.bfloat16, (512, 2)),
    ((8, 4, 128, 40_960), jnp.bfloat16, (512, 4)),
    ((8, 4, 128, 40_960), jnp.float32, (512, 8)),
  ],
)
def test_sizes(shape, dtype, cut):
  N, K, H, L = shape
  assert cut == sizes_of(*(jax.ShapeDtypeStruct((1, heads, L, H), dtype) for heads in (N, K)))


@pytest.mark.parametrize(
  ("group", "block", "heads"), [(1, 512, 1), (2, 512, 2), (3, 512, 1), (6, 256, 3), (8, 128, 8)]
)
def test_heads_are_stacked_as_long_as_it_helps(group, block, heads):
  assert tpu_forward.stacked_heads(group, block) == heads


@pytest.mark.parametrize(("L", "streamed"), [(32_768, False), (33_280, True)])
def test_keys_that_do_not_fit_are_streamed(L, streamed):
  x = jax.ShapeDtypeStruct((1, 1, L, 128), jnp.bfloat16)
  program = str(jax.make_jaxpr(attention)(x, x, x, cells(1, L)))
  assert ("stream_forward_streamed" in program) == streamed


# Refusals.


def shapes(dtype=jnp.float32, **changed):
  """q, k, v and visibility, of which some have another shape or dtype."""
  sizes = {"q": (2, 4, 256, 64), "k": (2, 2, 256, 64), "v": (2, 2, 256, 64)}
  dtypes = dict.fromkeys(sizes, dtype)
  for name, new in changed.items():
    (sizes if isinstance(new, tuple) else dtypes)[name] = new
  return [jax.ShapeDtypeStruct(sizes[name], dtypes[name]) for name in sizes]


@pytest.mark.parametrize(
  "changed",
  [
    {},
    {"dtype": jnp.bfloat16},
    {"q": (2, 16, 256, 64)},
    dict.fromkeys("qkv", (2, 2, 256, 256)),
    dict.fromkeys("qkv", (2, 2, 256, 1)),
  ],
)
def test_what_runs_is_not_refused(changed):
  arrays = shapes(**changed)
  assert refusal(*arrays) is None
  out = jax.eval_shape(attention, *arrays, cells(2, 256))
  assert (out.shape, out.dtype) == (arrays[0].shape, arrays[0].dtype)


TAKES = "the TPU kernels take"


@pytest.mark.parametrize(
  ("changed", "sentence"),
  [
    ({"q": (4, 256, 64)}, f"q: shape (4, 256, 64); {TAKES} [batch, heads, length, head dim]"),
    ({"v": (4, 256, 64)}, f"v: shape (4, 256, 64); {TAKES} [batch, heads, length, head dim]"),
    ({"dtype": jnp.float16}, f"q: dtype float16; {TAKES} bfloat16 or float32, one for all"),
    ({"k": jnp.bfloat16}, f"k: dtype bfloat16; {TAKES} bfloat16 or float32, one for all"),
    (
      {"k": (2, 2, 128, 64)},
      "k: shape (2, 2, 128, 64); expected (2, K, 256, 64) for q (2, 4, 256, 64), a key for every "
      "query",
    ),
    (
      {"k": (1, 2, 256, 64)},
      "k: shape (1, 2, 256, 64); expected (2, K, 256, 64) for q (2, 4, 256, 64), a key for every "
      "query",
    ),
    ({"v": (2, 4, 256, 64)}, "v: shape (2, 4, 256, 64); expected (2, 2, 256, 64), as k is"),
    ({"q": (2, 5, 256, 64)}, f"k: 2 heads; {TAKES} 1 to 8 heads of q to one of k, q has 5"),
    ({"q": (2, 18, 256, 64)}, f"k: 2 heads; {TAKES} 1 to 8 heads of q to one of k, q has 18"),
    (
      dict.fromkeys("kv", (2, 0, 256, 64)),
      f"k: 0 heads; {TAKES} 1 to 8 heads of q to one of k, q has 4",
    ),
    (
      dict.fromkeys("qkv", (2, 2, 256, 320)),
      f"q: shape (2, 2, 256, 320); {TAKES} a head dim of up to 256",
    ),
    (
      dict.fromkeys("qkv", (16, 2, 40_960, 64)),
      f"q: shape (16, 2, 40960, 64); 102,400 pairs of blocks, {TAKES} up to 80,000",
    ),
  ],
)
def test_refusals_name_argument_shape_and_what_is_supported(changed, sentence):
  arrays = shapes(**changed)
  assert refusal(*arrays) == sentence
  with pytest.raises(ValueError, match=re.escape(sentence)):
    jax.eval_shape(attention, *arrays, cells(2, 256))


@pytest.mark.parametrize("name", Visibility._fields)
def test_refuses_the_visibility_of_other_grids(name):
  visibility = cells(2, 256)._replace(**{name: jax.ShapeDtypeStruct((2, 384), jnp.int32)})
  sentence = f"visibility.{name}: shape (2, 384); expected (2, 256) for q (2, 4, 256, 64)"
  for call in (lambda *x: plan(*x[:2], x[3]), attention):
    with pytest.raises(ValueError, match=re.escape(sentence)):
      jax.eval_shape(call, *shapes(), visibility)
