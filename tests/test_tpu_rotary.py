"""Norm and rotation by the TPU kernel against those of the model's XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.kernels import static, tpu_rotary
from msjax.kernels.rotary import Turn
from msjax.kernels.tpu_rotary import rotary
from msjax.models.layers import rope_angles

EPS = 1e-5
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def case(B, L, N, H, normed, dtype=jnp.float32):
  """x [B, L, N, H], what turns it, a scale or None, and a cotangent [B, N, L, H]."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  angles = rope_angles(jnp.asarray(rng.integers(0, 9_000, (B, L))), H, 1e4, None)
  scale = jnp.asarray(rng.normal(size=H), jnp.float32) if normed else None
  return normal(B, L, N, H), Turn(*angles, EPS), scale, normal(B, N, L, H)


def by_kernel(x, turn, scale, factor=1.0):
  return rotary(x, turn.cos, turn.sin, scale, turn.eps, factor=factor, interpret=True)


def with_gradients(f, x, scale, d_out):
  """f(x, scale), and its gradients."""

  @jit
  def run(x, scale, d_out):
    out, pull = jax.vjp(f, x, scale)
    return out, *jax.tree.leaves(pull(d_out))

  return run(x, scale, d_out)


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize(("B", "L", "N", "H"), [(2, 48, 3, 128), (1, 40, 2, 256), (1, 5, 1, 128)])
def test_is_the_models_norm_and_rotation(monkeypatch, B, L, N, H, normed):
  monkeypatch.setattr(tpu_rotary, "_ROWS", 32)  # two blocks, the second of them part
  x, turn, scale, d_out = case(B, L, N, H, normed)
  ours = with_gradients(lambda x, s: by_kernel(x, turn, s, 0.3), x, scale, d_out)
  theirs = with_gradients(lambda x, s: 0.3 * jnp.swapaxes(turn(x, s), 1, 2), x, scale, d_out)
  assert len(ours) == (3 if normed else 2)
  for name, a, b in zip(("out", "dx", "d_scale"), ours, theirs):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), rtol=0, err_msg=name)


def test_bfloat16_is_rounded_once():
  x, turn, scale, d_out = case(1, 32, 2, 128, True, jnp.bfloat16)
  wide = x.astype(jnp.float32), scale, d_out.astype(jnp.float32)
  exact = with_gradients(lambda x, s: jnp.swapaxes(turn(x, s), 1, 2), *wide)
  ours = with_gradients(lambda x, s: by_kernel(x, turn, s), x, scale, d_out)
  for a, b in zip(ours[:2], exact):
    assert a.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits, and what float32 leaves undecided.
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8 + 1e-5, atol=1e-6)
  assert ours[2].dtype == jnp.float32


def test_steps_fit_their_memory_and_whole_registers():
  x = jax.ShapeDtypeStruct((1, 5_120, 16, 128), jnp.bfloat16)
  assert tpu_rotary._rows(x) == 512
  wide = jax.ShapeDtypeStruct((1, 5_120, 64, 128), jnp.float32)
  assert tpu_rotary._rows(wide) == 64


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
  ("N", "H", "L", "dtype"),
  [(16, 128, 5_120, jnp.bfloat16), (3, 256, 1_001, jnp.float32)],
  ids=["16 heads of 128", "3 heads of 256, float32, a part of a block"],
)
def test_compiles_for_tpu(topology, N, H, L, dtype):
  x, d_out = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, L, N, H), (1, N, L, H)))
  angle = jax.ShapeDtypeStruct((1, L, H // 2), jnp.float32)
  scale = jax.ShapeDtypeStruct((H,), jnp.float32)

  def both(x, cos, sin, scale, d_out):
    out, pull = jax.vjp(lambda x, s: rotary(x, cos, sin, s, EPS), x, scale)
    return out, pull(d_out)

  program = static.compile_for(both, (x, angle, angle, scale, d_out), topology)
  text = program.as_text()
  assert "rotary_forward" in text
  assert "rotary_backward" in text
