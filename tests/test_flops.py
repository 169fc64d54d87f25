"""Model FLOPs against the rule's own mask, against XLA's count, and against known figures."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.config import Config, ModelConfig
from msjax.models.presets import preset
from msjax.streams import HOLE, SAME_ROW, Stream, Streams
from msjax.training.flops import (
  Work,
  batch_work,
  full_work,
  matrix_parameters,
  peak_flops,
  training_flops,
)
from msjax.training.state import Learner

SILENCE, WORD = 0, 1
VOCABULARY = 256
SMALL = ModelConfig(
  dim=64, layers=1, heads=4, kv_heads=2, head_dim=16, mlp_dim=128, remat="none", dtype="float32"
)


def stream_set(kinds, **rule):
  return Streams(tuple(Stream(str(i), kind, 1.0) for i, kind in enumerate(kinds)), SILENCE, **rule)


KINDS = st.lists(st.sampled_from(["input", "output"]), min_size=1, max_size=4)
RULES = st.fixed_dictionaries(
  {"same_row": st.sampled_from(SAME_ROW), "skip_silence": st.booleans()}
)


@settings(deadline=None)
@given(kinds=KINDS, rule=RULES, seed=st.integers(0, 999), packed=st.booleans())
def test_a_batch_is_counted_as_the_mask_says(kinds, rule, seed, packed):
  rng, streams, shape = np.random.default_rng(seed), stream_set(kinds, **rule), (2, 3, 6)
  tokens = rng.choice([HOLE, SILENCE, WORD], (*shape, len(kinds))).astype(np.int32)
  segments = rng.integers(0, 2, shape).cumsum(-1) if packed else None
  grids, rows = tokens.reshape(6, 6, -1), None if segments is None else segments.reshape(6, 6)
  there = np.asarray(streams.to_attention(grids != HOLE))
  mask = np.asarray(streams.visibility(grids, rows).dense())
  expected = Work(there.sum(), mask[there].sum())
  assert batch_work(streams, tokens, segments) == expected


@settings(deadline=None)
@given(kinds=KINDS, same_row=st.sampled_from(SAME_ROW), rows=st.integers(1, 9))
def test_a_full_grid_needs_no_batch(kinds, same_row, rows):
  streams = stream_set(kinds, same_row=same_row)
  tokens = np.full((1, rows, len(kinds)), WORD, np.int32)
  assert full_work(streams, rows) == batch_work(streams, tokens)


def test_every_matrix_is_counted_and_nothing_else():
  model = dataclasses.replace(SMALL, layers=3, tied_head=False, qkv_bias=True)
  streams = stream_set(["input", "output"])
  params = jax.eval_shape(Learner(Config(model=model), streams, VOCABULARY).init, jax.random.key(0))
  named = jax.tree_util.tree_leaves_with_path(params.params)
  matrices = {
    jax.tree_util.keystr(path): leaf.size
    for path, leaf in named
    if path[-1].key in ("q", "k", "v", "out", "gate", "up", "down", "head")
  }
  assert len(matrices) == 8
  assert matrix_parameters(model, VOCABULARY) == sum(matrices.values())
  tied = dataclasses.replace(model, tied_head=True)
  assert matrix_parameters(tied, VOCABULARY) == sum(matrices.values())


def test_xla_counts_the_same_for_a_dense_step():
  """One layer and one block of keys, so that XLA has no loop, whose body it would count once."""
  streams, R = stream_set(["input", "output"]), 64
  learner = Learner(Config(model=SMALL), streams, VOCABULARY)
  cells = jnp.zeros((1, 2, R, 2), jnp.int32)
  batch = {"tokens": cells, "weights": cells.astype(jnp.float32), "segments": cells[..., 0]}
  state = jax.eval_shape(learner.init, jax.random.key(0))
  counted = jax.jit(learner.step).lower(state, batch).compile().cost_analysis()["flops"]
  # XLA fills the whole square of scores, masked or not, and the backward pass makes it again.
  L, products, recomputed = 2 * R, 6, 1
  square = 2 * L**2 * (products + recomputed) / products
  expected = training_flops(SMALL, VOCABULARY, Work(2 * L, square))
  assert counted == pytest.approx(expected, rel=0.04)


def test_the_figure_of_qwen3_8b():
  """6 x 7.57e9 x 5,120 and attention over half of the square: 2.56e14, or 1.3 s of a v5e."""
  model, streams = preset("qwen3-8b"), stream_set(["output"] * 10)
  work = full_work(streams, 512)
  L = work.cells
  assert L == 5120
  ours = training_flops(model, model.vocab_size, work)
  assert ours == pytest.approx(2.56e14, rel=0.005)
  attention = 12 * model.layers * model.heads * model.head_dim
  square = 6 * matrix_parameters(model, model.vocab_size) * L + attention * L**2
  assert square - ours == attention * (L**2 - work.pairs)
  assert work.pairs == pytest.approx(L**2 / 2, rel=0.002)


def test_peak_arithmetic_of_devices_together():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  chips = [device("TPU v5 lite"), device("TPU v6 lite")]
  assert peak_flops(chips) == pytest.approx((197 + 918) * 1e12, rel=0.005)
  assert peak_flops([*chips, device("TPU v99")]) is None
  assert peak_flops(jax.devices()) is None  # those of a CPU
