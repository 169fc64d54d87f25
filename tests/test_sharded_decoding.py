"""Decoding on eight devices writes the rows of one."""

import contextlib
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from eight_devices import mesh, on_eight_devices

from msjax.config import Config, ModelConfig
from msjax.decoding import aligned, prepared
from msjax.decoding.engine import Engine, fill
from msjax.decoding.policy import Policy
from msjax.decoding.prepared import Unrolled, prepare
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import RunError
from msjax.kernels import api, tpu_decode
from msjax.streams import HOLE
from msjax.training.state import Learner

VOCAB, SESSIONS, ROWS = 37, 8, 7
CONFIG = Config(
  streams=("user:input", "think:internal", "output:output"),
  model=ModelConfig(
    dim=64,
    layers=2,
    heads=16,
    kv_heads=8,
    head_dim=16,
    mlp_dim=48,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied_head=False,
    dtype="float32",
  ),
)


def random_params(learner):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(learner.init, jax.random.key(0)).params
  return jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(p.dtype), shapes)


def rows(seed=0):
  """[B, R, S]: what is read, with holes, and what the model writes."""
  rng = np.random.default_rng(seed)
  given = rng.integers(0, VOCAB, (SESSIONS, ROWS, 3)).astype(np.int32)
  given[rng.random(given.shape) < 0.2] = HOLE
  given[..., 1:][rng.random((SESSIONS, ROWS, 2)) < 0.7] = FREE
  return given


def decode(sizes, changes, *temperatures):
  """Rows that are written, and the cache after the last, at each temperature."""
  config, found = CONFIG.changed(changes), []
  learner = Learner(config, config.stream_set(5), VOCAB)
  with jax.set_mesh(mesh(**sizes)) if sizes else contextlib.nullcontext():
    params = learner.begun_with(random_params(learner)).params
    model = prepare(learner.model(params))
    for temperature in temperatures:
      engine = Engine(model, SESSIONS, rows=4)
      written = fill(engine, rows(), Policy(temperature), seed=3)
      found.append((written, jax.device_get(engine.state.cache)))
  return found


def decode_in_small_blocks(sizes, changes, *temperatures):
  """With a cache that grows on the way."""
  with mock.patch.object(prepared, "KEY_BLOCK", 4):
    return decode(sizes, changes, *temperatures)


def by_kernel(f, *args):
  """As on TPU: a scan over layers with the decode kernel, interpreted."""
  kernel = functools.partial(tpu_decode.attention, interpret=True)
  with (
    mock.patch.object(api, "of_rows", lambda *_: "tpu"),
    mock.patch.object(tpu_decode, "attention", kernel),
  ):
    return f(*args)


def decode_by_kernel(*args):
  return by_kernel(decode, *args)


def assert_decoded_alike(ours, theirs):
  for (tokens, cache), (tokens_there, cache_there) in zip(ours, theirs):
    np.testing.assert_array_equal(tokens, tokens_there)
    assert jax.tree.structure(cache) == jax.tree.structure(cache_there)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), cache, cache_there)


@functools.cache
def on_one_device():
  return on_eight_devices(decode, {}, {}, 0.0, 1.0)


@pytest.mark.parametrize(
  "sizes", [{"data": 8}, {"data": 4, "model": 2}, {"data": 2, "model": 4}, {"model": 8}], ids=str
)
def test_a_mesh_writes_the_rows_of_one_device(sizes):
  theirs = on_one_device()
  assert_decoded_alike(on_eight_devices(decode, sizes, {}, 0.0, 1.0), theirs)


def test_the_rows_are_worth_comparing():
  (likeliest, cache), (drawn, _) = on_one_device()
  free = rows() == FREE
  assert len(np.unique(likeliest[free])) > 3 and len(np.unique(drawn[free])) > 16
  assert np.mean(likeliest[free] != drawn[free]) > 0.5
  assert not (likeliest[0] == likeliest).all()
  assert np.abs(cache.k[1]).max() > 0.1


def test_with_a_tied_head_and_a_cache_that_grows_it_does_so_too():
  tied = {"model.tied_head": True}
  theirs = on_eight_devices(decode_in_small_blocks, {}, tied, 1.0)
  ours = on_eight_devices(decode_in_small_blocks, {"data": 2, "model": 4}, tied, 1.0)
  assert ours[0][1].capacity == 24 >= ROWS * 3
  assert_decoded_alike(ours, theirs)


def test_the_decode_kernel_does_so_too():
  wide = {"model.head_dim": 64}
  theirs = on_eight_devices(decode_by_kernel, {}, wide, 1.0)
  ours = on_eight_devices(decode_by_kernel, {"data": 2, "model": 4}, wide, 1.0)
  assert ours[0][1].k.shape == (2, SESSIONS, 128, 8 * 64)
  assert_decoded_alike(ours, theirs)


def live(sizes, of):
  """A session that reads a block, is looked at, forked and put back, among others."""
  config = CONFIG.changed({"model.head_dim": 64} if of is decode_by_kernel else {})
  learner = Learner(config, config.stream_set(5), VOCAB)
  with jax.set_mesh(mesh(**sizes)) if sizes else contextlib.nullcontext():
    model = prepare(learner.model(learner.begun_with(random_params(learner)).params))
    engine = Engine(model, SESSIONS, rows=40, rows_at_once=4)
    others = [engine.join(policies=Policy(1.0)) for _ in range(SESSIONS - 3)]
    prompt = np.random.default_rng(1).integers(0, VOCAB, (7, 3))
    session = engine.join(prompt, Policy(1.0), looks=3, stop=Stop(rows=14))
    for _ in range(5):
      engine.step()
    fork = engine.fork(session)
    session.read("user", [1, 2, 3])
    while session.reason is None or fork.reason is None:
      engine.step()
  assert not any(other.reason for other in others)
  return np.stack(session.rows), np.stack(fork.rows), list(session.looks.values())


@pytest.mark.parametrize("of", [decode, decode_by_kernel])
def test_sessions_live_on_a_mesh_as_on_one_device(of):
  theirs = on_eight_devices(live_by, of, {}, of)
  ours = on_eight_devices(live_by, of, {"data": 2, "model": 4}, of)
  np.testing.assert_array_equal(ours[0], theirs[0])
  np.testing.assert_array_equal(ours[1], theirs[1])
  assert (ours[0] != ours[1]).any() and len(ours[2]) > 3
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours[2], theirs[2])


def live_by(of, *args):
  return by_kernel(live, *args) if of is decode_by_kernel else live(*args)


def refusal(sizes, token):
  """What decoding says where the logits of one token are not finite."""
  learner = Learner(CONFIG, CONFIG.stream_set(5), VOCAB)
  params = random_params(learner)
  params["head"][token] = np.nan
  with jax.set_mesh(mesh(**sizes)):
    model = prepare(learner.model(learner.begun_with(params).params))
    try:
      fill(Engine(model, SESSIONS), rows())
    except RunError as error:
      return str(error)
  return None


@pytest.mark.parametrize("token", [0, VOCAB - 1])
def test_logits_that_are_not_finite_on_one_chip_are_told(token):
  message = on_eight_devices(refusal, {"model": 8}, token)
  assert message == "session 0, row 1: logits are not finite; are the parameters?"


def answer(sizes):
  """What two assistants draw side by side."""
  learner = Learner(CONFIG, CONFIG.stream_set(5), VOCAB)
  opening = {"user": [1, 2], "think": [3], "output": [4, 5, 6, 7]}
  options = aligned.Options(
    9, temperature=1.5, top_k=9, top_p=0.9, min_p=0.02, presence_penalty=1.0
  )
  with jax.set_mesh(mesh(**sizes)) if sizes else contextlib.nullcontext():
    params = learner.begun_with(random_params(learner)).params
    model = Unrolled.of(learner.model(params))
    return aligned.answer(model, opening, [8, 9, 10, 11], VOCAB - 1, options)


def test_an_aligned_answer_is_that_of_one_device():
  expected = on_eight_devices(answer, {})
  assert len(set(expected["think"])) > 3
  assert on_eight_devices(answer, {"model": 4, "fsdp": 2}) == expected
