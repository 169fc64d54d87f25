"""The training step: what it minimises, and what it does not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import Config, LossConfig, ModelConfig, OptimConfig, TrainConfig
from msjax.streams import HOLE
from msjax.training.state import Learner, summarize

VOCAB, SILENCE, ROWS, BATCH = 20, 3, 6, 8
POLICIES = ("none", "dots", "full")
TINY = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=64, dtype="float32")
CONFIG = Config(
  streams=("user:input", "think:internal:0.5", "output:output"),
  same_row="inputs",
  model=TINY,
  loss=LossConfig(silence_weight=0.1),
  optim=OptimConfig(warmup_steps=2, stream_learning_rate=0.01),
  train=TrainConfig(steps=10),
)


def learner_of(**model_fields):
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(TINY, **model_fields))
  return Learner(config, config.stream_set(SILENCE), VOCAB)


# Compiling takes most of the time here, and LLVM's optimisation most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LEARNER = learner_of()
INIT, STEP, EVALUATE = map(jit, (LEARNER.init, LEARNER.step, LEARNER.evaluate))


@functools.cache
def first_state():
  return INIT(jax.random.key(0))


def random_batch(seed=0):
  """[B, R, S]: holes, silence, segments, and sequences of very different weight."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (BATCH, ROWS, 3)).astype(np.int32)
  tokens[rng.random(tokens.shape) < 0.3] = SILENCE
  tokens[rng.random(tokens.shape) < 0.2] = HOLE
  tokens[-2:] = HOLE  # padding sequences
  weights = rng.random(tokens.shape) * 10.0 ** rng.integers(-3, 2, (BATCH, 1, 1))
  return {
    "tokens": tokens,
    "weights": weights.astype(np.float32),
    "segments": np.cumsum(rng.random((BATCH, ROWS)) < 0.2, axis=1).astype(np.int32),
  }


def cut(batch, micro_batches):
  return jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)


def close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def same_bits(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


@functools.cache
def expected_scalars():
  """Losses of the first state on `random_batch()` by their definition, in float64."""
  batch, model = random_batch(), LEARNER.model(first_state().params)
  tokens, segments = batch["tokens"], batch["segments"]
  logits = jit(lambda model: model.logits(model(tokens, segments), tokens))(model)
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  of_stream = (0.0, 0.5, 1.0)
  total = weight = 0.0
  nats = {"loss": [[], [], []], "spoken": [[], [], []]}
  for b, r, s in np.ndindex(BATCH, ROWS - 1, 3):
    label = tokens[b, r + 1, s]
    if HOLE in (tokens[b, r, s], label) or segments[b, r] != segments[b, r + 1]:
      continue
    entropy = -log_p[b, r, s, label]
    w = of_stream[s] * batch["weights"][b, r + 1, s] * (0.1 if label == SILENCE else 1)
    total, weight = total + w * entropy, weight + w
    nats["loss"][s].append(entropy)
    if label != SILENCE:
      nats["spoken"][s].append(entropy)
  scalars = {"loss": total / weight, "cells": sum(map(len, nats["loss"]))}
  for kind, by_stream in nats.items():
    for name, cells in zip(LEARNER.streams.names, by_stream):
      scalars[f"{kind}/{name}"] = np.mean(cells)
  return scalars


def test_losses_are_weighted_means():
  _, scalars = STEP(first_state(), cut(random_batch(), 1))
  expected = expected_scalars()
  assert scalars.keys() - expected.keys() == {"gradient_norm", "learning_rate"}
  close({name: scalars[name] for name in expected}, expected)


def test_evaluation_adds_up_to_the_same_means():
  sums = EVALUATE(first_state().params, random_batch())
  scores = summarize(sums, LEARNER.streams)
  close(scores, expected_scalars())
  twice = summarize(jax.tree.map(jnp.add, sums, sums), LEARNER.streams)
  assert twice.pop("cells") == 2 * scores.pop("cells")
  close(twice, scores)


def test_entropies_stand_at_the_cells_that_predict():
  labels, entropy = jit(LEARNER.cell_entropy)(first_state().params, random_batch())
  expected = expected_scalars()
  assert np.sum(labels >= 0) == expected["cells"]
  for s, name in enumerate(LEARNER.streams.names):
    of_stream = np.asarray(entropy)[..., s][np.asarray(labels)[..., s] >= 0]
    np.testing.assert_allclose(of_stream.mean(), expected[f"loss/{name}"], rtol=1e-5)


def test_micro_batches_change_nothing():
  whole, scalars = STEP(first_state(), cut(random_batch(), 1))
  parts, scalars_of_parts = STEP(first_state(), cut(random_batch(), 4))
  close(scalars_of_parts, scalars)
  # Adam divides by the root of squared gradients: moments tell more than the parameters.
  close(parts.opt_state, whole.opt_state, rtol=1e-4, atol=1e-7)
  close(parts.params, whole.params, atol=1e-5)


def test_a_step_moves_all_parameters_downhill():
  batch, losses = cut(random_batch(), 1), []
  state = now = first_state()
  for i in range(5):
    assert int(now.step) == i
    now, scalars = STEP(now, batch)
    losses.append(float(scalars["loss"]))
    assert float(scalars["learning_rate"]) == pytest.approx((0.0005, 0.001, 0.001, 0.001, 0.001)[i])
  assert losses == sorted(losses, reverse=True)
  for (path, before), after in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(now.params)
  ):
    assert np.any(before != after), path
    assert after.dtype == jnp.float32


def test_a_step_is_repeated_bit_for_bit():
  batch = cut(random_batch(), 4)
  assert same_bits(STEP(first_state(), batch), STEP(first_state(), batch))


def test_a_batch_without_weight_is_harmless():
  batch = {**random_batch(), "weights": np.zeros((BATCH, ROWS, 3), np.float32)}
  after, scalars = STEP(first_state(), cut(batch, 1))
  assert scalars["loss"] == scalars["gradient_norm"] == 0
  assert same_bits(after.params, first_state().params)


def test_remat_computes_again_what_it_says():
  def count(policy, operation):
    step = jax.jit(learner_of(remat=policy).step)
    return step.lower(first_state(), cut(random_batch(), 1)).as_text().count(operation)

  none, dots, full = ({n: count(p, n) for n in ("dot_general", "rsqrt")} for p in POLICIES)
  assert none["dot_general"] == dots["dot_general"] < full["dot_general"]
  assert none["rsqrt"] < dots["rsqrt"] <= full["rsqrt"]  # of the norms


@functools.cache
def after_a_step(policy):
  return jit(learner_of(remat=policy).step)(first_state(), cut(random_batch(), 1))


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_remat_changes_memory_alone(policy):
  kept, scalars = after_a_step("none")
  again, scalars_again = after_a_step(policy)
  close(again.opt_state, kept.opt_state, rtol=1e-4, atol=1e-7)  # Adam's moments: the gradients
  close(scalars_again, scalars)


def test_attention_drops_in_training_alone():
  learner = learner_of(attention_dropout=0.3)
  step, batch, state = jit(learner.step), cut(random_batch(), 2), first_state()
  loss = lambda state, batch: float(step(state, batch)[1]["loss"])
  _, plain = STEP(state, cut(random_batch(), 1))
  assert loss(state, batch) != pytest.approx(float(plain["loss"]), abs=1e-4)
  later = dataclasses.replace(state, step=state.step + 1)
  assert loss(later, batch) != pytest.approx(loss(state, batch), abs=1e-4)  # steps drop apart
  swapped = jax.tree.map(lambda x: x[::-1], batch)
  assert loss(state, swapped) != pytest.approx(loss(state, batch), abs=1e-4)  # so do micro-batches
  assert same_bits(step(state, batch), step(state, batch))
  undropped = jit(learner.evaluate)(state.params, random_batch())
  assert same_bits(undropped, EVALUATE(state.params, random_batch()))


def test_bfloat16_trains_float32_parameters():
  batch = cut(random_batch(), 1)
  after, scalars = jit(learner_of(dtype="bfloat16").step)(first_state(), batch)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(after.params))
  _, exact = STEP(first_state(), batch)
  close(scalars["loss"], exact["loss"], rtol=0.01)
  close(scalars["gradient_norm"], exact["gradient_norm"], rtol=0.05)


def test_the_first_state_is_drawn_from_the_key():
  assert same_bits(INIT(jax.random.key(0)), first_state())
  assert not same_bits(INIT(jax.random.key(1)).params, first_state().params)
  abstract = jax.eval_shape(LEARNER.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, first_state()) == jax.tree.map(jnp.shape, abstract)


def test_what_layers_add_is_scaled_down_by_their_number():
  layers = first_state().params["layers"]
  gain = lambda w, fan_in: float(w.std()) * fan_in**0.5
  assert gain(layers["attention"]["q"], TINY.dim) == pytest.approx(1, rel=0.1)
  assert gain(layers["mlp"]["up"], TINY.dim) == pytest.approx(1, rel=0.1)
  heads = TINY.heads * TINY.head_dim
  assert gain(layers["attention"]["out"], heads) == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(2 x 2)
  assert gain(layers["mlp"]["down"], TINY.mlp_dim) == pytest.approx(0.5, rel=0.1)
  assert np.all(layers["attention_norm"] == 1)
