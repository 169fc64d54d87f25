"""Which attention is chosen, what is said of it, and that all of them compute the same."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Grid, dense, jit

from msjax.kernels import api, splash, static, tpu, tpu_rotary
from msjax.kernels.rotary import Turn
from msjax.models.layers import rope_angles

B, N, K, L, H = 2, 4, 2, 240, 64
GRID = Grid(10, "inputs", segment=4)
TOO_MANY_HEADS = "k: 1 heads; the TPU kernels take 1 to 8 heads of q to one of k, q has 16"


def shapes(N=N, K=K, H=H, dtype=jnp.bfloat16):
  return [jax.ShapeDtypeStruct((B, heads, L, H), dtype) for heads in (N, K, K)]


def streams(S=2, **rule):
  return dataclasses.replace(Grid(S).streams, **rule)


@pytest.fixture
def on(monkeypatch):
  """Makes programs be built for a platform."""
  return lambda name: monkeypatch.setattr(api, "platform", lambda: name)


# The choice.


def test_builds_for_where_arrays_are_put():
  assert api.platform() == "cpu"
  assert api.choose(*shapes(), streams(), 0.0) == (
    "xla",
    "the others run on TPU, this is cpu",
  )


@pytest.mark.parametrize(
  ("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu"), ("cpu", "cpu")]
)
def test_builds_for_the_devices_of_the_mesh_in_use(monkeypatch, kind, platform):
  mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind))
  monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
  assert api.platform() == platform


def test_a_gpu_runs_xla(on):
  on("gpu")
  assert api.choose(*shapes(), streams(), 0.0)[1] == "the others run on TPU, this is gpu"


@pytest.mark.parametrize(
  ("arrays", "rule", "dropout", "chosen"),
  [
    pytest.param({}, {}, 0.0, ("tpu", "the shapes allow it"), id="ours"),
    pytest.param(
      {"dtype": jnp.float32},
      {"skip_silence": True},
      0.0,
      ("tpu", "the shapes allow it"),
      id="ours whatever the rule",
    ),
    pytest.param(
      {},
      {},
      0.1,
      ("xla", "attention_dropout: 0.1; the kernels for TPU have none"),
      id="dropout",
    ),
    pytest.param({"N": 16, "K": 1}, {}, 0.0, ("splash", TOO_MANY_HEADS), id="the fallback"),
    pytest.param({}, {"S": 128}, 0.0, ("tpu", "the shapes allow it"), id="ours, many streams"),
    pytest.param(
      {},
      {"S": 129},
      0.0,
      ("splash", "streams: 129; the TPU kernels take up to 128"),
      id="the fallback by streams",
    ),
    pytest.param(
      {"N": 16, "K": 1},
      {"skip_silence": True},
      0.0,
      (
        "xla",
        f"{TOO_MANY_HEADS}; skip_silence: splash attention cannot let a silent cell be seen by "
        "itself alone",
      ),
      id="neither by the rule",
    ),
    pytest.param(
      {"N": 16, "K": 1, "H": 40},
      {},
      0.0,
      (
        "xla",
        f"{TOO_MANY_HEADS}; q: shape (2, 16, 240, 40); splash attention takes multiples of 32 for "
        "H",
      ),
      id="neither by the shapes",
    ),
  ],
)
def test_choice_on_tpu(on, arrays, rule, dropout, chosen):
  on("tpu")
  assert api.choose(*shapes(**arrays), streams(**rule), dropout) == chosen


def test_says_once_who_attends_and_why(on, monkeypatch):
  said = []
  monkeypatch.setattr(api.logging, "info", said.append)
  api._say.cache_clear()
  visibility = GRID.visibility(B, L)
  _, turn = case(H)
  prepare = lambda *x: api.of_grid(*x, visibility, streams(), turn)
  prepare(*shapes())
  prepare(*shapes())
  assert said == ["grids attend by chunked XLA: the others run on TPU, this is cpu"]
  on("tpu")
  prepare(*shapes())
  prepare(*shapes(N=16, K=1))
  assert said[1:] == [
    "grids attend by stream-block kernels: the shapes allow it",
    f"grids attend by jax's splash attention: {TOO_MANY_HEADS}",
  ]


@pytest.mark.parametrize(
  ("platform", "head_dim", "backend", "sentence"),
  [
    ("cpu", 64, "xla", "chunked XLA: the decode kernel runs on TPU, this is cpu"),
    ("tpu", 64, "tpu", "stream-block kernels: the shapes allow it"),
    (
      "tpu",
      96,
      "xla",
      "chunked XLA: q: shape (1, 10, 4, 96); this kernel takes [B, S, N, H] with H 64 or 128",
    ),
  ],
)
def test_choice_for_rows(on, monkeypatch, platform, head_dim, backend, sentence):
  said = []
  monkeypatch.setattr(api.logging, "info", said.append)
  api._say.cache_clear()
  on(platform)
  assert api.of_rows(10, N, K, head_dim, jnp.bfloat16) == backend
  assert said == [f"rows attend by {sentence}"]


# What is chosen.


def case(H, seed=0):
  """q, k and v with heads after cells, scales of the norms; what turns them."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  angles = rope_angles(jnp.tile(jnp.arange(L) // GRID.S, (B, 1)), H, 1e4, None)
  arrays = [normal(B, L, heads, H) for heads in (N, K, K)]
  return [*arrays, normal(H), normal(H)], Turn(*angles, 1e-6)


def prepared(q, k, v, visibility, turn, dropout=0.0):
  """What `of_grid` returns for arrays with heads after cells."""
  like = [jax.ShapeDtypeStruct((B, x.shape[2], L, x.shape[3]), x.dtype) for x in (q, k, v)]
  return api.of_grid(*like, visibility, GRID.streams, turn, dropout)


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no norms"])
@pytest.mark.parametrize(
  ("backend", "H"),
  [
    ("xla", 64),
    ("splash", 64),
    pytest.param("tpu", 64, id="tpu turned by xla"),
    pytest.param("tpu", 128, id="tpu"),
  ],
)
def test_all_compute_the_same(monkeypatch, backend, H, norms):
  for module, name in (
    (splash, "attention"),
    (tpu, "attention"),
    (tpu, "attend_scaled"),
    (tpu_rotary, "rotary"),
  ):
    interpreted = functools.partial(getattr(module, name), interpret=True)
    monkeypatch.setattr(module, name, interpreted)
  monkeypatch.setattr(api, "choose", lambda *_: (backend, "a test wants it"))
  visibility = GRID.visibility(B, L)
  (q, k, v, *scales), turn = case(H)
  scales = scales if norms else [None, None]

  @jit
  def run(q, k, v, scales, visibility, angles):
    return prepared(q, k, v, visibility, Turn(*angles, turn.eps))(q, k, v, *scales)

  out = run(q, k, v, scales, visibility, turn[:2])
  turned = turn(q, scales[0]), turn(k, scales[1]), v
  expected, *_ = dense(*(x.swapaxes(1, 2) for x in turned), visibility, np.zeros((B, N, L, H)))
  np.testing.assert_allclose(out, expected.swapaxes(1, 2), atol=1e-5, rtol=0)


def test_dropout_drops_where_there_is_a_key():
  arrays, turn = case(64)
  visibility = GRID.visibility(B, L)

  def out(rate, key):
    return jit(lambda *x: prepared(*x[:3], visibility, turn, rate)(*x, dropout_key=key))(*arrays)

  plain, key = out(0.0, None), jax.random.key(0)
  np.testing.assert_array_equal(out(0.0, key), plain)
  np.testing.assert_array_equal(out(0.3, None), plain)
  assert np.abs(out(0.3, key) - plain).max() > 0.1


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_mesh_of_tpus_that_are_not_there_gets_their_kernels(topology):
  from jax.experimental import topologies

  static.compile_for(jnp.sin, (jnp.zeros(8),), topology)  # it sets what libtpu needs to start
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("data",))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

  def attend(arrays, turn, visibility):
    return prepared(*arrays[:3], visibility, Turn(*turn, 1e-6))(*arrays)

  arrays, turn = case(128)
  arguments = jax.tree.map(place, (arrays, turn[:2], GRID.visibility(B, L)))
  with jax.set_mesh(mesh):
    program = jax.jit(attend).lower(*arguments).compile().as_text()
  assert re.search(r"%\S*stream_forward\S* = .*tpu_custom_call", program)
