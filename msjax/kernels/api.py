"""Which attention runs where: the one place that chooses, and says why."""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from absl import logging

from msjax.kernels import splash, tpu, tpu_decode, tpu_rotary, xla
from msjax.kernels.rotary import Turn
from msjax.streams import Streams, Visibility


class Attend(Protocol):
  """Attention from the products on: norm, rotation, and who sees whom."""

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
  ) -> jax.Array:
    """q [B, L, N, H], k and v [B, L, K, H] -> [B, L, N, H]."""


Array = jax.Array | jax.ShapeDtypeStruct


def platform() -> str:
  """Returns what programs are built for: `tpu`, `gpu` or `cpu`.

  That is where the devices of the mesh in use are, be they at hand or only compiled for, else where
  JAX puts arrays by default.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  kind = device.device_kind.lower()
  return next((p for p in ("tpu", "cpu") if kind.startswith(p)), "gpu")


def choose(q: Array, k: Array, v: Array, streams: Streams, dropout: float) -> tuple[str, str]:
  """Chooses who attends whole grids, by shapes and the platform.

  Args:
    q: [B, N, L, H], or its shape and dtype.
    k: [B, K, L, H], alike.
    v: [B, K, L, H], alike.
    streams: of the grid.
    dropout: rate, 0 for none.

  Returns:
    `tpu`, `splash` or `xla`, and one sentence that says why it is not what stands before it.
  """
  if platform() != "tpu":
    return "xla", f"the others run on TPU, this is {platform()}"
  if dropout:
    return "xla", f"attention_dropout: {dropout}; the kernels for TPU have none"
  reason = tpu.refusal(q, k, v)
  if len(streams) > tpu.STREAMS:
    reason = f"streams: {len(streams)}; the TPU kernels take up to {tpu.STREAMS}"
  if not reason:
    return "tpu", "the shapes allow it"
  also = splash.refusal(q, k, v, streams)
  return ("xla", f"{reason}; {also}") if also else ("splash", reason)


def of_grid(
  q: Array,
  k: Array,
  v: Array,
  visibility: Visibility,
  streams: Streams,
  turn: Turn,
  dropout: float = 0.0,
) -> Callable[..., jax.Array]:
  """Prepares attention of a whole grid to itself, once for all layers; the log says who attends.

  Args:
    q: as for `choose`, like k and v.
    k: see q.
    v: see q.
    visibility: of the grid.
    streams: of the grid.
    turn: of queries and keys.
    dropout: rate, 0 for none.

  Returns:
    An `Attend` that takes a `dropout_key` besides.
  """
  backend, reason = choose(q, k, v, streams, dropout)
  _say(f"grids attend by {_NAMES[backend]}: {reason}")
  if backend == "tpu":
    plan = tpu.plan(q, k, visibility)
    if q.shape[3] in tpu_rotary.HEAD_DIMS:
      return functools.partial(_turn_by_kernel, turn, plan)
    attend = lambda q, k, v, key: tpu.attention(q, k, v, plan)
  elif backend == "splash":
    attend = lambda q, k, v, key: splash.attention(q, k, v, visibility, streams)
  else:
    drop = lambda key: xla.Dropout(dropout, key) if dropout and key is not None else None
    columns = lambda k: jnp.swapaxes(k, 2, 3)
    attend = lambda q, k, v, key: xla.attention(q, columns(k), v, visibility, drop(key))
  return functools.partial(_turn_by_xla, turn, attend)


def _turn_by_kernel(turn, plan, q, k, v, q_scale, k_scale, dropout_key=None):
  rotary = functools.partial(tpu_rotary.rotary, cos=turn.cos, sin=turn.sin, eps=turn.eps)
  q = rotary(q, scale=q_scale, factor=tpu.q_factor(q.shape[3]))
  return _swap(tpu.attend_scaled(q, rotary(k, scale=k_scale), _swap(v), plan))


def _turn_by_xla(turn, attend, q, k, v, q_scale, k_scale, dropout_key=None):
  q, k = turn(q, q_scale), turn(k, k_scale)
  return _swap(attend(_swap(q), _swap(k), _swap(v), dropout_key))


def _swap(x):
  """[B, cells, heads, H] to [B, heads, cells, H], or back: kernels take heads first."""
  return jnp.swapaxes(x, 1, 2)


def of_rows(streams: int, heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> str:
  """Chooses who attends when rows are fed against a cache, and says so in the log.

  Args:
    streams: S, cells of a row.
    heads: N.
    kv_heads: K.
    head_dim: H.
    dtype: of all arrays.

  Returns:
    `tpu` for tpu_decode.py, else `xla`.
  """
  backend, reason = "xla", f"the decode kernel runs on TPU, this is {platform()}"
  if platform() == "tpu":
    reason = tpu_decode.refusal(*_rows(streams, heads, kv_heads, head_dim, dtype))
    backend = "xla" if reason else "tpu"
  _say(f"rows attend by {_NAMES[backend]}: {reason or 'the shapes allow it'}")
  return backend


def _rows(S, N, K, H, dtype):
  """Arguments of the decode kernel's `refusal` for one session with the smallest cache."""
  M = 128
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  new, cache, index = array(1, S, K, H), array(1, 1, M, K * H), array(1, S, dtype=jnp.int32)
  see = Visibility(index, index, index, array(1, M, dtype=bool))
  return array(1, S, N, H), new, new, cache, cache, see


_NAMES = {"tpu": "stream-block kernels", "splash": "jax's splash attention", "xla": "chunked XLA"}


@functools.cache  # a program is traced several times
def _say(sentence: str) -> None:
  logging.info(sentence)
