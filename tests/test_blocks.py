"""Kinds of blocks against the dense mask, and the order in which they are visited."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import GRIDS, Grid
from hypothesis import strategies as st

from msjax.kernels import blocks
from msjax.kernels.blocks import HIDDEN, PARTIAL, WHOLE
from msjax.streams import Visibility

LENGTH = 96
kinds = jax.jit(blocks.kinds, static_argnums=1)
sizes = st.sampled_from([4, 8, 16, 32, 48, 96])


def assert_kinds_are_safe(visibility, block):
  """Returns kinds [B, n, n] and the mask of each block [B, n, n, block * block]."""
  n = LENGTH // block
  mask = np.asarray(visibility.dense()).reshape(2, n, block, n, block).swapaxes(2, 3)
  mask = mask.reshape(2, n, n, -1)
  found = np.asarray(kinds(visibility, block))
  assert found.dtype == np.int32
  assert np.isin(found, (HIDDEN, PARTIAL, WHOLE)).all()
  np.testing.assert_array_equal(found == WHOLE, mask.all(-1))
  assert not mask[found == HIDDEN].any()
  return found, mask


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(grid=GRIDS, block=sizes)
def test_kinds_are_those_of_the_dense_mask(grid, block):
  visibility = grid.visibility(2, LENGTH)
  found, _ = assert_kinds_are_safe(visibility, block)
  own = np.eye(LENGTH // block, dtype=bool)
  assert (found[:, own] != HIDDEN).all()
  nothing_to_see = ~visibility.key_ok.reshape(2, 1, -1, block).any(-1)
  assert (found[nothing_to_see & ~own] == HIDDEN).all()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  S=st.sampled_from([1, 2, 3, 5, 7, 10, 13, 16]),
  same_row=st.sampled_from(["hidden", "inputs", "ordered", "visible"]),
  segment=st.sampled_from([0, 2, 5]),
  seed=st.integers(0, 99),
  block=st.sampled_from([16, 32, 48, 96]),
)
def test_what_nobody_sees_is_hidden(S, same_row, segment, seed, block):
  """Without holes no block is visited in vain; with them one may be, at the edge of a segment."""
  visibility = Grid(S, same_row, segment=segment, seed=seed).visibility(2, LENGTH)
  found, mask = assert_kinds_are_safe(visibility, block)
  np.testing.assert_array_equal(found == HIDDEN, ~mask.any(-1))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), block=sizes, ok=st.sampled_from([0.5, 0.99, 1.0]))
def test_kinds_of_any_intervals(seed, block, ok):
  rng = np.random.default_rng(seed)
  ends = np.sort(rng.choice([0, 8, 31, 32, 48, 64, 95, 96], (2, 2, LENGTH)), axis=0)
  start, end = np.repeat(ends[:, :, ::8], 8, axis=2).astype(np.int32)
  itself = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  assert_kinds_are_safe(Visibility(start, end, itself, rng.random((2, LENGTH)) < ok), block)


def test_kinds_by_hand():
  """Two streams in segments of 16 and 32 cells, with a hole in the second block of the latter."""
  visibility = Grid(2).visibility(1, 48)
  start = np.repeat(np.int32([0, 16]), [16, 32])[None]
  visibility = visibility._replace(start=start, key_ok=np.arange(48)[None] != 30)
  expected = [
    [1, 0, 0, 0, 0, 0],
    [2, 1, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0],
    [0, 0, 2, 1, 0, 0],
    [0, 0, 2, 1, 1, 0],
    [0, 0, 2, 1, 2, 1],
  ]
  np.testing.assert_array_equal(blocks.kinds(visibility, 8), [expected])


visits = jax.jit(blocks.visits)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=3, max_size=3)
)
def test_visits_are_what_is_partial_then_what_is_whole(rows):
  index, partial, whole = visits(np.array([rows]))
  assert {x.dtype for x in (index, partial, whole)} == {jnp.dtype("int32")}
  for row, order, p, w in zip(rows, index[0].tolist(), partial[0].tolist(), whole[0].tolist()):
    where = lambda kind, row=row: [j for j, x in enumerate(row) if x == kind]
    assert order[:p] == where(PARTIAL)
    assert order[p : p + w] == where(WHOLE)
    assert sorted(order) == list(range(5))


@pytest.mark.parametrize(
  ("parts", "expected"),
  [
    (1, [[[[0, 1, 2, 1, 2]]]]),
    (2, [[[[0, 1, 2]]], [[[1, 2, HIDDEN]]]]),
    (3, [[[[0, 1]]], [[[2, 1]]], [[[2, HIDDEN]]]]),
    (5, [[[[0]]], [[[1]]], [[[2]]], [[[1]]], [[[2]]]]),
  ],
)
def test_cut(parts, expected):
  np.testing.assert_array_equal(blocks.cut(jnp.array([[[0, 1, 2, 1, 2]]]), parts), expected)


def test_cut_keeps_sequences_and_blocks_apart():
  whole = np.arange(2 * 3 * 4).reshape(2, 3, 4)
  np.testing.assert_array_equal(blocks.cut(jnp.array(whole), 2), np.stack(np.split(whole, 2, -1)))


@pytest.mark.parametrize(
  ("length", "largest", "block"),
  [
    (5120, 512, 512),
    (512, 512, 512),
    (1, 512, 128),
    (128, 512, 128),
    (129, 512, 256),
    (640, 512, 384),  # two blocks, 128 cells too many; 128 divides it, into five
    (1280, 512, 256),  # five blocks; three of 512 are 256 cells too many
    (1300, 512, 512),
    (500, 128, 128),
  ],
)
def test_block_size(length, largest, block):
  assert blocks.block_size(length, largest) == block


@hypothesis.given(st.integers(1, 10**6))
def test_block_size_pads_no_more_than_it_saves(length):
  block = blocks.block_size(length)
  assert block in (128, 256, 384, 512)
  padded, least = (-(-length // b) * b for b in (block, 128))
  assert padded / least <= 1.5 / (1 + 64 / block)
