"""How parameters, an optimizer's state and prepared models are cut."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from msjax import sharding
from msjax.config import Config, ModelConfig
from msjax.decoding.prepared import Stacked, Unrolled
from msjax.models import axes
from msjax.training.state import Learner

MODEL = ModelConfig(dim=32, layers=2, heads=8, kv_heads=4, head_dim=16, mlp_dim=48, tied_head=False)
MODEL.qkv_bias = MODEL.mlp_bias = MODEL.out_bias = True
LEARNER = Learner(Config(model=MODEL), Config().stream_set(5), 37)
STATE = jax.eval_shape(LEARNER.init, jax.random.key(0))
# Into how many parts (2, 2) chips of fsdp and 2 of model cut the axes of a parameter.
PARTS = {
  "embed": (1, 8),
  "head": (1, 8),
  "stream_embed": (1, 1),
  "norm": (1,),
  "attention_norm": (1, 1),
  "mlp_norm": (1, 1),
  "q": (1, 4, 2, 1),
  "k": (1, 4, 2, 1),
  "v": (1, 4, 2, 1),
  "out": (1, 2, 1, 4),
  "q_bias": (1, 2, 1),
  "k_bias": (1, 2, 1),
  "v_bias": (1, 2, 1),
  "out_bias": (1, 1),
  "q_norm": (1, 1),
  "k_norm": (1, 1),
  "gate": (1, 4, 2),
  "up": (1, 4, 2),
  "down": (1, 2, 4),
  "gate_bias": (1, 2),
  "up_bias": (1, 2),
  "down_bias": (1, 1),
}


def parts(tree, shape=(1, 1, 2, 2, 2)):
  """Names of arrays, None for those of no parameter, and into how many parts their axes are cut."""
  mesh = AbstractMesh(shape, sharding.MESH_AXES)
  found = []
  for (path, array), spec in zip(
    jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(axes.specs(tree))
  ):
    keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    name = next((key for key in reversed(keys) if key in PARTS or key == "unembed"), None)
    here = NamedSharding(mesh, spec).shard_shape(array.shape)
    found.append((name, tuple(whole // part for whole, part in zip(array.shape, here))))
  return found


def test_every_parameter_is_cut_as_it_should():
  assert dict(parts(STATE.params)) == PARTS
  assert len(parts(STATE.params)) == len(PARTS)


def test_moments_are_cut_like_their_parameters():
  found = parts(STATE.opt_state)
  assert [cut for name, cut in found if name is None] == [()] * 4  # counts
  of_parameters = [(name, cut) for name, cut in found if name]
  assert len(of_parameters) == 2 * len(PARTS)
  assert all(cut == PARTS[name] for name, cut in of_parameters)


def test_data_and_slices_cut_no_parameter():
  assert all(math.prod(cut) == 1 for _, cut in parts(STATE, (2, 4, 1, 1, 1)))


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("variant", [Unrolled, Stacked])
def test_a_prepared_model_is_cut_by_model(variant, tied_head):
  model = Config(model=MODEL).changed({"model.tied_head": tied_head})
  learner = Learner(model, model.stream_set(5), 36)
  prepared = jax.eval_shape(
    lambda: variant.of(learner.model(learner.init(jax.random.key(0)).params))
  )
  found = dict(parts(prepared, (1, 2, 1, 1, 4)))
  assert found["embed"] == (1, 4)
  assert found["unembed"] == (4, 1)
  names = "q", "out", "gate", "down", "mlp_norm"
  of_stacked = (1, 1, 4, 1), (1, 4, 1, 1), (1, 1, 4), (1, 4, 1), (1, 1)
  by_output = (4, 1), (1, 4), (4, 1), (1, 4), (1,)
  assert [found[name] for name in names] == list(of_stacked if variant is Stacked else by_output)
  if variant is Unrolled:
    found = dict(parts(prepared))
    by_output = (2, 4), (4, 2), (2, 4), (4, 2), (1,)
    assert [found[name] for name in names] == list(by_output)
  assert "head" not in found
