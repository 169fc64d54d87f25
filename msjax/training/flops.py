"""Model FLOPs of training: the arithmetic that a step asks for, however it is carried out.

Counted are the products with matrices and the two of attention, over tokens that are there and keys
that the rule shows; a multiplication and an addition are two. The backward pass asks for twice as
much as the forward pass. What is computed again to save memory, padding, holes and masked scores
are no model FLOPs: they make a step slower, and its share of peak arithmetic smaller.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from msjax.config import ModelConfig
from msjax.kernels.chips import chip_of_device
from msjax.streams import HOLE, Streams

_FORWARD_AND_BACKWARD = 3  # times the forward pass


class Work(NamedTuple):
  """What there is to compute in grids, whatever the model.

  Attributes:
    cells: that hold a token.
    pairs: of such a cell and a key that it sees, itself among them.
  """

  cells: int
  pairs: int


def full_work(streams: Streams, rows: int) -> Work:
  """Returns the work of one sequence of so many rows without holes, silence to skip or segments."""
  S, seen = len(streams), streams.seen_of_own_row
  own_row = int((seen + (np.arange(S) >= seen)).sum())  # the cell itself may be among them
  return Work(rows * S, S**2 * rows * (rows - 1) // 2 + rows * own_row)


def batch_work(streams: Streams, tokens: np.ndarray, segments: np.ndarray | None = None) -> Work:
  """Returns the work of a batch at hand.

  Args:
    streams: of the grids.
    tokens: int32 [..., R, S], with any axes in front.
    segments: int32 [..., R], rows of one number belong together and lie together; None for one.
  """
  grids = tokens.reshape(-1, *tokens.shape[-2:])
  B, R, S = grids.shape
  there = streams.to_attention(grids != HOLE).reshape(B, R, S)
  ok = streams.key_ok(grids).reshape(B, R, S)  # may be seen by others
  earlier = ok.sum(-1).cumsum(-1) - ok.sum(-1)  # in the rows before each
  if segments is not None:
    earlier -= np.take_along_axis(earlier, _first_rows(segments.reshape(B, R)), -1)
  seen = streams.seen_of_own_row
  own_row = np.pad(ok.cumsum(-1), ((0, 0), (0, 0), (1, 0)))[..., seen]
  itself = ~(ok & (np.arange(S) < seen))  # where it is not among those of its row
  return Work(int(there.sum()), int((earlier[..., None] + own_row + itself)[there].sum()))


def _first_rows(segments: np.ndarray) -> np.ndarray:
  """First row of each row's segment, [B, R]."""
  rows = np.arange(segments.shape[1])
  begins = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
  return np.maximum.accumulate(np.where(begins, rows, 0), axis=1)


def matrix_parameters(model: ModelConfig, vocab_size: int) -> int:
  """Returns how many parameters every cell is multiplied with: of all layers, and of the head.

  The embedding is looked up, so it counts where it is the head too.
  """
  projections = 2 * model.dim * model.head_dim * (model.heads + model.kv_heads)
  return model.layers * (projections + 3 * model.dim * model.mlp_dim) + model.dim * vocab_size


def training_flops(model: ModelConfig, vocab_size: int, work: Work) -> int:
  """Returns the model FLOPs of a training step, forward and backward, on this work."""
  products = 2 * matrix_parameters(model, vocab_size) * work.cells
  scores_and_values = 2 * 2 * model.layers * model.heads * model.head_dim * work.pairs
  return _FORWARD_AND_BACKWARD * (products + scores_and_values)


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
  """Returns the bfloat16 arithmetic a second of which these devices are capable together.

  None where one of them is none of `chips.CHIPS`, such as a CPU.
  """
  chips = [chip_of_device(device.device_kind) for device in devices]
  return None if None in chips else sum(chip.flops_per_second for chip in chips)
