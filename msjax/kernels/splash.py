"""Stream-block attention by jax's own splash attention kernel: the fallback on TPU.

The rule of a dense grid is a mask that splash computes from one number a query; packed segments and
holes are its segment ids. Splash skips blocks that are hidden in a dense grid, but not those of
other segments, and asks in every block who sees whom.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from msjax.streams import Streams, Visibility

TILES = (1024, 512, 256, 128)
_COMPUTED = 512  # keys of a tile that are computed with at a time: more would spill registers
_PADDING = 1 / 8  # of the length, at most: a smaller tile costs less
_NO_SEGMENT = -1  # of keys that nobody sees


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visibility: Visibility,
  streams: Streams,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Softmax attention of whole grids; differentiable in q, k and v.

  Args:
    q: [B, N, L, H], cells in attention order; N a multiple of K; bfloat16 or float32, like all.
    k: [B, K, L, H].
    v: [B, K, L, H].
    visibility: what `streams.visibility` made of the grid.
    streams: static; no `skip_silence`.
    interpret: run on any backend, slowly, for tests.

  Returns:
    [B, N, L, H] in the dtype of q; scores and sums are float32. What it holds at a hole means
    nothing, for a hole does not see itself here; it is finite.

  Raises:
    ValueError: with the sentence of `refusal`, or `visibility` is of other shapes.
  """
  reason = refusal(q, k, v, streams)
  if reason:
    raise ValueError(reason)
  if visibility.key_ok.shape != (q.shape[0], q.shape[2]):
    raise ValueError(
      f"visibility.key_ok: shape {visibility.key_ok.shape}; expected one for each key of {k.shape}"
    )
  queries = visibility.start
  keys = jnp.where(visibility.key_ok, queries, _NO_SEGMENT)
  segments = splash_attention_kernel.SegmentIds(queries, keys)
  return attend(Mask.of(streams, tile(q.shape[2])), q, k, v, segments, interpret=interpret)


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams) -> str | None:
  """Says in one sentence why `attention` cannot take these; None if it can."""
  if streams.skip_silence:
    return "skip_silence: splash attention cannot let a silent cell be seen by itself alone"
  if q.ndim != 4:
    return f"q: shape {q.shape}; splash attention takes [B, N, L, H]"
  B, N, L, H = q.shape
  if H % 32:
    return f"q: shape {q.shape}; splash attention takes multiples of 32 for H"
  if k.ndim != 4 or k.shape != (B, k.shape[1], L, H):
    return f"k: shape {k.shape}; expected ({B}, K, {L}, {H}), as q is {q.shape}"
  if not k.shape[1] or N % k.shape[1]:
    return f"k: {k.shape[1]} heads; expected a divisor of the {N} heads of q"
  if v.shape != k.shape:
    return f"v: shape {v.shape}; expected {k.shape}, as k is"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"q: dtype {q.dtype}; splash attention takes bfloat16 and float32"
  for name, x in (("k", k), ("v", v)):
    if x.dtype != q.dtype:
      return f"{name}: dtype {x.dtype}; expected {q.dtype}, as q is"
  return None


def tile(length: int) -> int:
  """Returns how many queries and keys make a block: many, but with little padding."""
  return next((t for t in TILES if -length % t <= length * _PADDING), TILES[-1])


@dataclasses.dataclass(frozen=True)
class Mask:
  """Who sees whom in a dense grid, in blocks of `tile` x `tile`.

  Attributes:
    streams: how many there are.
    seen_of_own_row: as of `Streams`.
    tile: side of a block.
    fused: whether one kernel computes all gradients, with partial sums of q's in HBM.
  """

  streams: int
  seen_of_own_row: tuple[int, ...]
  tile: int
  fused: bool = False

  @classmethod
  def of(cls, streams: Streams, tile: int, fused: bool = False) -> "Mask":
    """Takes from `streams` what matters."""
    return cls(len(streams), tuple(streams.seen_of_own_row.tolist()), tile, fused)

  def for_splash(self, length: int) -> splash_attention_mask.Mask:
    """Returns the mask of so many cells."""
    return _StreamMask(self, length)


@dataclasses.dataclass(frozen=True)
class CausalMask(Mask):
  """The mask of one stream of text, to compare costs with: query i sees keys up to i."""

  def for_splash(self, length: int) -> splash_attention_mask.Mask:
    """Returns the mask of so many cells."""
    return splash_attention_mask.CausalMask((length, length))


def attend(
  mask: Mask,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: splash_attention_kernel.SegmentIds | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Attends under a mask and, where given, within segments [B, L]; q, k and v as of `attention`."""
  B, N, L, H = q.shape
  K = k.shape[1]
  q = (q.astype(jnp.float32) / math.sqrt(H)).astype(q.dtype).reshape(B, K, N // K, L, H)
  q, k, v = (_pad(x, x.ndim - 2, mask.tile) for x in (q, k, v))
  if segments is not None:
    fill = functools.partial(_pad, axis=1, multiple=mask.tile, constant_values=_NO_SEGMENT)
    segments = jax.tree.map(fill, segments)
  kernel = _kernel(mask, k.shape[2], N // K, interpret)
  over_heads = jax.vmap(kernel, (0, 0, 0, None))
  return jax.vmap(over_heads)(q, k, v, segments)[:, :, :, :L].reshape(B, N, L, H)


@functools.cache  # it looks at every pair of cells
def _kernel(mask: Mask, length: int, heads: int, interpret: bool):
  """Returns splash attention of `heads` query heads over one head of keys."""
  size = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), mask.tile)
  computed = min(mask.tile, _COMPUTED)
  size |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), computed)
  if not mask.fused:
    size |= dict.fromkeys(("block_q_dq", "block_kv_dq"), mask.tile)
  with jax.ensure_compile_time_eval():  # tables, not tracers, are kept for the next caller
    return splash_attention_kernel.make_splash_mqa_single_device(
      splash_attention_mask.MultiHeadMask([mask.for_splash(length)] * heads),
      block_sizes=splash_attention_kernel.BlockSizes(**size, use_fused_bwd_kernel=mask.fused),
      interpret=interpret,
    )


def _pad(x, axis, multiple, **kwargs):
  widths = [(0, -x.shape[axis] % multiple if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Sees:
  """Whether queries, by their codes, see keys, by their indices.

  A code holds the last key of the interval that a query sees and, in its low `bits`, how far
  beyond it the query's own key stands: 0 for one within.
  """

  bits: int

  def __call__(self, code, key):
    last = code >> self.bits
    return (key <= last) | (key == last + (code & (1 << self.bits) - 1))


class _StreamMask(splash_attention_mask._ComputableMask):
  """A `Mask` as splash wants it, with a code for every query."""

  def __init__(self, mask: Mask, length: int):
    sees = _Sees(mask.streams.bit_length())
    super().__init__(shape=(length, length), mask_function=sees)
    itself = np.arange(length, dtype=np.int32)
    row, place = np.divmod(itself, mask.streams)
    last = row * mask.streams + np.array(mask.seen_of_own_row)[place] - 1
    self.q_sequence = (last << sees.bits | np.maximum(itself - last, 0)).astype(np.int32)
    self._key = mask, length

  def __eq__(self, other: object):
    return isinstance(other, _StreamMask) and self._key == other._key

  def __hash__(self):
    return hash(self._key)
