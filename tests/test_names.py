"""Parameters and tensors: each becomes the other, and lands in the shard where it belongs."""

import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.config import ModelConfig
from msjax.hub.names import part_of, read_params, tensors
from msjax.models.transformer import Transformer
from msjax.streams import Stream, Streams
from msjax.training.checkpoint import placed

EVERYTHING = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_head": False}


def abstract(S=2, V=8, **sizes):
  """Shapes of every parameter that a model may have."""
  sizes = {"dim": 8, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 4, "mlp_dim": 12} | sizes
  streams = Streams(tuple(Stream(f"s{i}", "output", 1.0) for i in range(S)), 0)
  make = lambda: Transformer(ModelConfig(**sizes, **EVERYTHING), streams, V, rngs=nnx.Rngs(0))
  return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def random_weights(like):
  """A checkpoint's tensors for these parameters."""
  rng = np.random.default_rng(0)
  return {t.name: rng.normal(size=t.shape).astype(np.float32) for t in tensors(like)}


sizes = st.fixed_dictionaries(
  {
    **dict.fromkeys(("S", "dim", "layers", "mlp_dim", "kv_heads"), st.integers(1, 3)),
    "V": st.integers(1, 5),
    "head_dim": st.sampled_from([2, 4, 6]),
  }
)


@settings(max_examples=8, deadline=None)
@given(sizes, st.integers(1, 3))
def test_tensors_and_parameters_become_each_other(sizes, group):
  like = abstract(**sizes, heads=group * sizes["kv_heads"])
  weights = random_weights(like)
  params = read_params(weights, placed(like))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda p: p.shape, like)
  for tensor in tensors(params):
    part = part_of(params, tensor)
    np.testing.assert_array_equal(tensor.to_hf(part), weights[tensor.name])
    np.testing.assert_array_equal(tensor.to_msjax(tensor.to_hf(part)), part)


def test_a_matrix_of_theirs_computes_what_ours_does():
  like = abstract(kv_heads=2)
  weights = random_weights(like)
  layers = jax.tree.map(np.asarray, read_params(weights, placed(like)))["layers"]
  rng = np.random.default_rng(1)
  x, heads = rng.normal(size=8), rng.normal(size=(4, 4))
  theirs = lambda name: weights[f"model.layers.2.{name}.weight"]
  for name, ours in (("q", (4, 4)), ("k", (2, 4)), ("v", (2, 4))):
    expected = (theirs(f"self_attn.{name}_proj") @ x).reshape(ours)
    found = np.einsum("d,dnh->nh", x, layers["attention"][name][2])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  out = np.einsum("nh,nhd->d", heads, layers["attention"]["out"][2])
  np.testing.assert_allclose(out, theirs("self_attn.o_proj") @ heads.reshape(-1), rtol=1e-6)
  np.testing.assert_allclose(x @ layers["mlp"]["up"][2], theirs("mlp.up_proj") @ x, rtol=1e-6)


class Watched(dict):
  """Tensors of which none may be alive when the next is read."""

  def __init__(self, weights):
    super().__init__(weights)
    self.read = []

  def __getitem__(self, name):
    assert not any(array() is not None for _, array in self.read)
    array = super().__getitem__(name).copy()
    self.read.append((name, weakref.ref(array)))
    return array


def test_every_tensor_is_read_once_and_let_go():
  like = abstract()
  weights = Watched(random_weights(like))
  read_params(weights, placed(like))
  assert [name for name, _ in weights.read] == list(weights)


MESH = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, {tests!r})
from test_names import Watched, abstract, placed, random_weights, read_params

mesh = jax.make_mesh((2, 2), ("x", "y"))
everywhere = ("x", "y")
like = abstract(S=4, V=8)
alone = jax.tree.map(np.asarray, read_params(random_weights(like), placed(like)))
plus_one = jax.jit(lambda params: jax.tree.map(lambda p: p + 1, params), donate_argnums=0)


def check(array, expected):
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(shard.data, expected[shard.index])


def on(spec_of):
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, spec_of(p))), like
  )


for name, to in {{
  "copies": on(lambda p: P()),
  "layers": on(lambda p: P(everywhere)),
  "rows": on(lambda p: P(None, everywhere) if p.ndim > 1 else P(everywhere)),
  "columns": on(lambda p: P(*[None] * (p.ndim - 1), everywhere)),
  "layers and rows": on(lambda p: P(*everywhere[: p.ndim])),
  "layers and columns": on(lambda p: P("y", *[None] * (p.ndim - 2), "x") if p.ndim > 1 else P()),
  "columns on half of the mesh": on(lambda p: P(*[None] * (p.ndim - 1), "y")),
}}.items():
  weights = Watched(random_weights(like))
  params = read_params(weights, to)
  assert len(weights.read) == len(weights)
  assert jax.tree.map(lambda p: p.sharding, params) == jax.tree.map(lambda p: p.sharding, to)
  jax.tree.map(check, params, alone)
  # Copies may share memory until one of them is given up to a computation.
  jax.tree.map(check, plus_one(params), jax.tree.map(lambda p: p + 1, alone))
  print(name)
print(jax.device_count())
"""


def test_a_mesh_holds_what_one_device_does(request, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  program = MESH.format(tests=str(request.path.parent))
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=180
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.endswith("half of the mesh\n4\n")
