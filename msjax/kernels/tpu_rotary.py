"""Norm, rotary positions and heads before cells, in one pass over queries or keys, on TPU.

In XLA these are a dozen operations on halves of a head, each of which fills half of every register.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from msjax.kernels.lanes import LANES, VMEM_LIMIT

HEAD_DIMS = (128, 256)  # whole registers
_ROWS = 512
_BLOCK_BYTES = 2 * 2**20  # of the rows of a step


class _Static(NamedTuple):
  """What the kernels are compiled for."""

  eps: float
  factor: float
  interpret: bool


def rotary(
  x: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  scale: jax.Array | None,
  eps: float,
  *,
  factor: float = 1.0,
  interpret: bool = False,
) -> jax.Array:
  """Norms each head, rotates it by its positions and multiplies it; differentiable in x and scale.

  Args:
    x: [B, L, N, H], H of `HEAD_DIMS`.
    cos: float32 [B, L, H / 2]; gets no gradient, nor does sin.
    sin: float32 [B, L, H / 2].
    scale: [H], of the root-mean-square norm over a head; None for no norm.
    eps: of the norm.
    factor: by which the result is multiplied.
    interpret: run on any backend, slowly, for tests.

  Returns:
    [B, N, L, H] in x's dtype, rounded once.

  Raises:
    ValueError: the head dim is none of these.
  """
  if x.shape[3] not in HEAD_DIMS:
    raise ValueError(f"x: shape {x.shape}; the rotary kernel takes a head dim of 128 or 256")
  angles = jnp.concatenate([cos, sin], axis=-1)
  return _rotary(_Static(eps, factor, interpret), x, angles, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotary(static, x, angles, scale):
  B, L, N, H = x.shape
  cells, per_cell, per_head, of_scale = _specs(x)
  return _call(
    functools.partial(_forward_kernel, static),
    x,
    in_specs=[cells, per_cell, *of_scale(scale)],
    out_specs=per_head,
    out_shape=jax.ShapeDtypeStruct((B, N, L, H), x.dtype),
    name="rotary_forward",
    interpret=static.interpret,
  )(x.reshape(B, L, N * H), angles, *_row(scale))


def _rotary_saving(static, x, angles, scale):
  return _rotary(static, x, angles, scale), (x, angles, scale)


def _rotary_gradients(static, saved, d_out):
  x, angles, scale = saved
  B, L, N, H = x.shape
  cells, per_cell, per_head, of_scale = _specs(x)
  steps = pl.cdiv(L, _rows(x))
  part = pl.BlockSpec((None, None, 1, H), lambda b, i: (b, i, 0, 0))
  parts = jax.ShapeDtypeStruct((B, steps, 1, H), jnp.float32)
  dx, *d_scale = _call(
    functools.partial(_backward_kernel, static, L),
    x,
    in_specs=[per_head, cells, per_cell, *of_scale(scale)],
    out_specs=[cells, *([] if scale is None else [part])],
    out_shape=[jax.ShapeDtypeStruct((B, L, N * H), x.dtype), *([] if scale is None else [parts])],
    name="rotary_backward",
    interpret=static.interpret,
  )(d_out, x.reshape(B, L, N * H), angles, *_row(scale))
  d_scale = None if scale is None else d_scale[0].sum((0, 1, 2)).astype(scale.dtype)
  return dx.reshape(x.shape), None, d_scale


_rotary.defvjp(_rotary_saving, _rotary_gradients)


def _rows(x):
  """Cells of a step: as many as fit, in whole registers."""
  fit = _BLOCK_BYTES // (x.shape[2] * x.shape[3] * x.dtype.itemsize)
  return max(16, min(_ROWS, fit // 16 * 16))


def _specs(x):
  """Blocks of [B, L, N * H], [B, L, H], [B, N, L, H] and, where there is one, of the scale."""
  _, _, N, H = x.shape
  rows = _rows(x)
  return (
    pl.BlockSpec((None, rows, N * H), lambda b, i: (b, i, 0)),
    pl.BlockSpec((None, rows, H), lambda b, i: (b, i, 0)),
    pl.BlockSpec((None, N, rows, H), lambda b, i: (b, 0, i, 0)),
    lambda scale: [] if scale is None else [pl.BlockSpec((1, H), lambda b, i: (0, 0))],
  )


def _row(scale):
  return [] if scale is None else [scale.astype(jnp.float32)[None]]


def _call(kernel, x, **kwargs):
  B, L, N, H = x.shape
  moved = 2 * x.size * x.dtype.itemsize + 4 * B * L * H
  return pl.pallas_call(
    kernel,
    grid=(B, pl.cdiv(L, _rows(x))),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=pl.CostEstimate(
      flops=10 * x.size, bytes_accessed=moved, transcendentals=B * L * N
    ),
    **kwargs,
  )


def _forward_kernel(static, x, angles, *scale_and_out):
  """x [rows, N * H], angles [rows, H], scale [1, H] if any, out [N, rows, H]."""
  *scale, out = scale_and_out
  N, _, H = out.shape
  cos, sin = _tables(angles[...], static.factor)

  def head(h, _):
    y = x[:, pl.ds(pl.multiple_of(h * H, LANES), H)].astype(jnp.float32)
    if scale:
      y = y * _inverse_rms(y, static.eps) * scale[0][...]
    out[h] = (y * cos + pltpu.roll(y, H // 2, 1) * sin).astype(out.dtype)

  lax.fori_loop(0, N, head, None)


def _backward_kernel(static, length, d_out, x, angles, *rest):
  """d_out [N, rows, H], x and dx [rows, N * H]; with a norm its scale [1, H], and its gradient."""
  scale, dx, d_scale = rest if len(rest) == 3 else (None, *rest, None)
  N, rows, H = d_out.shape
  cos, sin = _tables(angles[...], static.factor)
  if scale is not None:
    d_scale[...] = jnp.zeros_like(d_scale)
    row = pl.program_id(1) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

  def head(h, _):
    at = pl.ds(pl.multiple_of(h * H, LANES), H)
    g = d_out[h].astype(jnp.float32)
    d_y = g * cos + pltpu.roll(g * sin, H // 2, 1)
    if scale is not None:
      y = x[:, at].astype(jnp.float32)
      inverse = _inverse_rms(y, static.eps)
      y *= inverse
      # The last block may have rows beyond the end, and they may hold anything.
      d_scale[...] += jnp.sum(jnp.where(row < length, d_y * y, 0.0), axis=0, keepdims=True)
      d_y *= scale[...]
      d_y = inverse * (d_y - y * jnp.mean(d_y * y, axis=-1, keepdims=True))
    dx[:, at] = d_y.astype(dx.dtype)

  lax.fori_loop(0, N, head, None)


def _tables(angles, factor):
  """cos | sin [rows, H] -> what multiplies a head, and what multiplies it with halves swapped."""
  swapped = pltpu.roll(angles, angles.shape[1] // 2, 1)
  first = lax.broadcasted_iota(jnp.int32, angles.shape, 1) < angles.shape[1] // 2
  return factor * jnp.where(first, angles, swapped), factor * jnp.where(first, -swapped, angles)


def _inverse_rms(x, eps):
  return lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
