"""Training on eight devices is training on one."""

import contextlib
import functools

import grain
import jax
import numpy as np
import pytest
from eight_devices import mesh, on_eight_devices

from msjax import sharding
from msjax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from msjax.streams import HOLE
from msjax.training.checkpoint import Checkpoints
from msjax.training.state import Learner

VOCAB, SILENCE, STEPS = 37, 5, 10
PARTS, BATCH = 2, 8
RICH = Config(
  streams=("user:input", "think:internal:0.5", "output:output"),
  model=ModelConfig(
    dim=32,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=4,
    mlp_dim=48,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied_head=False,
    remat="full",
    dtype="float32",
  ),
  data=DataConfig(rows=7),  # 21 cells: no number of chips divides them
  loss=LossConfig(silence_weight=0.3, z_loss=1e-3, label_smoothing=0.1),
  optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.1, weight_decay=0.1),
  train=TrainConfig(steps=STEPS, batch=PARTS * BATCH, micro_batches=PARTS),
)
PLAIN = {
  "streams": ("user:input", "output:output"),
  "data.rows": 6,  # 12 cells: of four chips some begin in the middle of a row
  "model.kv_heads": 4,
  "model.qk_norm": False,
  "model.qkv_bias": False,
  "model.out_bias": False,
  "model.mlp_bias": False,
  "model.tied_head": True,
  "loss.z_loss": 0.0,
  "loss.label_smoothing": 0.0,
}


def learner_of(changes):
  config = RICH.changed(changes)
  return Learner(config, config.stream_set(SILENCE), VOCAB)


def random_params(learner):
  """Parameters of which none is 0 or 1."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  return jax.tree.map(lambda p: 0.2 * rng.normal(size=p.shape).astype(p.dtype) + 0.1, shapes)


def random_batch(config):
  """[A, B, R, S]: holes, silence, packed sequences, and micro-batches of different weight."""
  rng = np.random.default_rng(0)
  rows = config.data.rows
  cells = PARTS, BATCH, rows, len(config.streams)
  tokens = rng.integers(0, VOCAB, cells).astype(np.int32)
  tokens[rng.random(cells) < 0.3] = SILENCE
  tokens[rng.random(cells) < 0.15] = HOLE
  tokens[:, -1] = HOLE  # a padding sequence
  weights = rng.random(cells) * 10.0 ** rng.integers(-2, 1, (PARTS, BATCH, 1, 1))
  segments = np.cumsum(rng.random((PARTS, BATCH, rows)) < 0.25, axis=-1)
  return {
    "tokens": tokens,
    "weights": weights.astype(np.float32),
    "segments": segments.astype(np.int32),
  }


def on(sizes):
  """A mesh to work on; without sizes none, as if there were no sharding."""
  return jax.set_mesh(mesh(**sizes)) if sizes else contextlib.nullcontext()


def train(sizes, changes):
  """What every step tells, and the state after the last."""
  learner, told = learner_of(changes), []
  with on(sizes):
    state = learner.begun_with(random_params(learner))
    batch = sharding.joined(random_batch(learner.config), 1, BATCH)
    step = learner.jitted_step()
    for _ in range(STEPS):
      state, scalars = step(state, batch)
      told.append(scalars)
    return jax.device_get((told, state))


@functools.cache
def on_one_device(*changes):
  return on_eight_devices(train, {}, dict(changes))


def assert_trained_alike(ours, theirs):
  (told, state), (told_there, state_there) = ours, theirs
  for step, (mine, other) in enumerate(zip(told, told_there)):
    for name in other:
      # Adam divides small gradients by small ones, so that rounding grows into the next gradient.
      rtol = 1e-3 if name == "gradient_norm" and step else 1e-5
      np.testing.assert_allclose(mine[name], other[name], rtol, 1e-6, err_msg=f"{name}, {step}")
  for (path, mine), other in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(state_there)
  ):
    difference = np.abs(mine - other).max() / np.abs(other).max()
    assert difference < 1e-3, (jax.tree_util.keystr(path), difference)


@pytest.mark.parametrize(
  ("sizes", "same_row", "remat"),
  [
    ({"fsdp": 8}, "hidden", "none"),
    ({"fsdp": (2, 2), "model": 2}, "hidden", "dots"),
    ({"fsdp": 4, "model": 2}, "inputs", "qkv"),
    ({"fsdp": 2, "model": 4}, "inputs", "attention"),
    ({"fsdp": 1, "model": 8}, "ordered", "full"),
    ({"data": 2, "fsdp": 2, "model": 2}, "ordered", "none"),
    ({"slices": 2, "fsdp": 2, "model": 2}, "visible", "dots"),
  ],
  ids=str,
)
def test_a_mesh_trains_like_one_device(sizes, same_row, remat):
  changes = {"same_row": same_row, "skip_silence": same_row == "ordered"}
  theirs = on_one_device(*changes.items())
  assert all(scalars["gradient_norm"] > RICH.optim.clip_norm for scalars in theirs[0])
  assert theirs[0][-1]["loss"] < theirs[0][0]["loss"]
  ours = on_eight_devices(train, sizes, {**changes, "model.remat": remat})
  assert_trained_alike(ours, theirs)


def test_with_a_tied_head_and_without_biases_it_does_so_too():
  theirs = on_one_device(*PLAIN.items())
  assert_trained_alike(on_eight_devices(train, {"fsdp": 2, "model": 4}, PLAIN), theirs)


def scores(sizes):
  learner = learner_of({})
  with on(sizes):
    params = learner.begun_with(random_params(learner)).params
    first = jax.tree.map(lambda x: x[0], random_batch(learner.config))
    batch = sharding.joined(first, 0, BATCH)
    return jax.device_get(
      (jax.jit(learner.evaluate)(params, batch), jax.jit(learner.cell_entropy)(params, batch))
    )


def test_a_mesh_evaluates_like_one_device():
  (sums, (labels, entropy)), theirs = (
    on_eight_devices(scores, sizes) for sizes in ({"fsdp": (2, 2), "model": 2}, {})
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, theirs[0])
  np.testing.assert_array_equal(labels, theirs[1][0])
  np.testing.assert_allclose(entropy, theirs[1][1], rtol=1e-4, atol=1e-5)


def first_states(seed):
  """Of no mesh and of one."""
  learner = learner_of({"train.seed": seed})
  states = []
  for sizes in ({}, {"fsdp": (2, 2), "model": 2}):
    with on(sizes):
      states.append(jax.device_get(learner.begun()))
  return states


def same_bits(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and x.tobytes() == y.tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


def test_a_mesh_draws_the_parameters_of_one_device():
  assert same_bits(*on_eight_devices(first_states, 3))


def gathers(sizes, remat):
  """How many exchanges of the step fetch what lies on other chips."""
  learner = learner_of({"model.remat": remat, "train.micro_batches": 1})
  with on(sizes):
    first = jax.tree.map(lambda x: x[:1], random_batch(learner.config))
    batch = sharding.joined(first, 1, BATCH)
    lowered = learner.jitted_step().lower(learner.abstract(), batch)
  return lowered.as_text().count("all_gather")


def test_no_policy_keeps_weights_from_other_chips():
  none, full = (on_eight_devices(gathers, {"fsdp": 8}, remat) for remat in ("none", "full"))
  assert none == full
  none, full = (
    on_eight_devices(gathers, {"fsdp": 4, "model": 2}, remat) for remat in ("none", "full")
  )
  assert none < full  # cells from other chips are kept


# Restored elsewhere.


def data():
  return iter(grain.MapDataset.range(100).repeat().to_iter_dataset())


def save(directory, sizes):
  """Writes a state that none has trained; returns it."""
  learner = learner_of({})
  with on(sizes), Checkpoints(directory, 1) as checkpoints:
    rng = np.random.default_rng(0)
    draw = lambda x: (100 * rng.normal(size=x.shape)).astype(x.dtype)
    place = lambda x: jax.device_put(draw(x), x.sharding)
    state = jax.tree.map(place, learner.abstract())
    checkpoints.save(1, state, data(), None)
    return jax.device_get(state)


def restore(directory, sizes):
  learner = learner_of({})
  with on(sizes), Checkpoints(directory, 1) as checkpoints:
    state = checkpoints.restore(learner.abstract(), data())
    wanted = jax.tree.leaves(learner.abstract())
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(state), wanted))
    return jax.device_get(state)


def test_a_state_is_restored_on_other_meshes_bit_for_bit(tmp_path):
  saved = on_eight_devices(save, tmp_path, {"fsdp": 4, "model": 2})
  for sizes in ({"fsdp": 8}, {"slices": 1}, {"data": 2, "fsdp": (2, 2)}):
    assert same_bits(on_eight_devices(restore, tmp_path, sizes), saved), sizes
