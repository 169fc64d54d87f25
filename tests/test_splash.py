"""Splash attention under our mask against dense attention in float64, and compiled for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.kernels import splash, static
from msjax.streams import HOLE, SAME_ROW, Stream, Streams, Visibility

ROWS, HEAD = 30, 32


def streams_of(count=5, **rule):
  kinds = ("output", "input", "internal")
  return Streams(tuple(Stream(f"s{i}", kinds[i % 3], 1.0) for i in range(count)), 0, **rule)


def grid(seed=0, count=5, holes=0.0, segments=1):
  """Tokens [2, ROWS, count] and segments [2, ROWS]."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 9, (2, ROWS, count)).astype(np.int32)
  tokens[rng.random(tokens.shape) < holes] = HOLE
  starts = rng.random((2, ROWS)) < (segments - 1) / ROWS
  return tokens, np.cumsum(starts, axis=1).astype(np.int32)


def arrays(heads=4, kv_heads=2, length=5 * ROWS, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda n: rng.normal(size=(2, n, length, HEAD)).astype(np.float32)
  return (normal(heads), normal(kv_heads), normal(kv_heads)), normal(heads)


def dense(q, k, v, see, d_out):
  """Textbook attention and gradients in float64."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  group = q.shape[1] // k.shape[1]
  k, v = (np.repeat(x, group, axis=1) for x in (k, v))
  scale = 1 / np.sqrt(q.shape[-1])
  s = np.where(see[:, None], np.einsum("bnqh,bnkh->bnqk", q, k) * scale, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("bnqk,bnkh->bnqh", p, v)
  d_p = np.einsum("bnqh,bnkh->bnqk", d_out, v)
  d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
  over_group = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)
  d_q = np.einsum("bnqk,bnkh->bnqh", d_s, k)
  d_k = over_group(np.einsum("bnqk,bnqh->bnkh", d_s, q))
  return out, d_q, d_k, over_group(np.einsum("bnqk,bnqh->bnkh", p, d_out))


# Compiling takes most of the time here, and LLVM's optimisation most of that.
@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def ours(streams, q, k, v, visibility, d_out):
  attend = lambda *x: splash.attention(*x, visibility, streams, interpret=True)
  out, pull = jax.vjp(attend, q, k, v)
  return out, *pull(d_out)


@pytest.mark.parametrize(
  ("same_row", "holes", "segments"),
  [*((rule, 0.0, 1) for rule in SAME_ROW), ("hidden", 0.2, 4), ("inputs", 0.2, 4)],
)
def test_is_dense_attention(same_row, holes, segments):
  streams = streams_of(same_row=same_row)
  tokens, numbers = grid(holes=holes, segments=segments)
  visibility = streams.visibility(tokens, numbers)
  qkv, d_out = arrays()
  real = np.asarray(streams.to_attention(tokens) != HOLE)
  d_out = np.where(real[:, None, :, None], d_out, 0)  # nobody asks what a hole holds
  found = ours(streams, *qkv, visibility, d_out)
  expected = dense(*qkv, np.asarray(visibility.dense()), d_out)
  assert np.isfinite(found[0]).all()
  at_cells = lambda x: np.where(real[:, None, :, None], x, 0)
  np.testing.assert_allclose(at_cells(found[0]), at_cells(expected[0]), atol=5e-6, rtol=0)
  for name, a, b in zip(("d_q", "d_k", "d_v"), found[1:], expected[1:]):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_streams(count):
  streams = streams_of(count)
  tokens, _ = grid(count=count)
  visibility = streams.visibility(tokens)
  qkv, d_out = arrays(length=count * ROWS)
  found = ours(streams, *qkv, visibility, d_out)
  for a, b in zip(found, dense(*qkv, np.asarray(visibility.dense()), d_out)):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
  ("length", "tile"), [(1, 128), (300, 128), (512, 512), (5120, 1024), (4200, 512), (40960, 1024)]
)
def test_tiles_leave_little_padding(length, tile):
  assert splash.tile(length) == tile


def shaped(q=(2, 4, 300, 32), k=(2, 2, 300, 32), v=None, dtype="float32", key_ok=(2, 300)):
  array = lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  index = jax.ShapeDtypeStruct((2, 300), jnp.int32)
  ok = jax.ShapeDtypeStruct(key_ok, jnp.bool_)
  return array(q), array(k), array(v or k), Visibility(index, index, index, ok)


@pytest.mark.parametrize(
  ("wrong", "streams", "names"),
  [
    ({}, streams_of(skip_silence=True), "skip_silence"),
    ({"q": (2, 300, 32)}, streams_of(), "q: shape (2, 300, 32)"),
    ({"q": (2, 4, 300, 40)}, streams_of(), "q: shape (2, 4, 300, 40)"),
    ({"k": (2, 3, 300, 32)}, streams_of(), "k: 3 heads"),
    ({"k": (2, 2, 299, 32)}, streams_of(), "k: shape (2, 2, 299, 32)"),
    ({"v": (2, 1, 300, 32)}, streams_of(), "v: shape (2, 1, 300, 32)"),
    ({"dtype": "float16"}, streams_of(), "float16"),
  ],
)
def test_refuses_what_it_cannot_do(wrong, streams, names):
  refused = shaped(**wrong)
  assert names in splash.refusal(*refused[:3], streams)
  with pytest.raises(ValueError, match=names.split(":")[0]):
    splash.attention(*refused, streams)


def test_refuses_nothing_else():
  assert splash.refusal(*shaped()[:3], streams_of()) is None


def test_refuses_the_visibility_of_other_arrays():
  with pytest.raises(ValueError, match=r"visibility.key_ok: shape \(2, 299\)"):
    splash.attention(*shaped(key_ok=(2, 299)), streams_of())


def gradients(streams, q, k, v, visibility):
  attend = lambda *x: splash.attention(*x, visibility, streams)
  out, pull = jax.vjp(attend, q, k, v)
  return out, *pull(out)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("head", [64, 128])
def test_compiles_for_a_tpu(head):
  length = 2000  # of a padded tile of 1,024
  arrays = (jax.ShapeDtypeStruct((1, n, length, head), jnp.bfloat16) for n in (4, 2, 2))
  index = jax.ShapeDtypeStruct((1, length), jnp.int32)
  see = Visibility(index, index, index, jax.ShapeDtypeStruct((1, length), jnp.bool_))
  fn = functools.partial(gradients, streams_of(10))
  compiled = static.compile_for(fn, (*arrays, see), "v5e:2x2")
  assert compiled.as_text().count('"tpu_custom_call"') == 3
