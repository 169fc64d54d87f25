import forked
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.errors import InputError
from msjax.training.checkpoint import Checkpoints, load_params, open_params, save_params
from msjax.training.state import TrainState


def data():
  return iter(grain.MapDataset.range(100).seed(0).shuffle().repeat().to_iter_dataset())


def state(step, size=5):
  """A state whose every array tells its step, with values that no rounding would keep."""
  weights = jax.random.normal(jax.random.key(step), (size,))
  moments = {"mu": weights / 3, "count": jnp.int32(step)}
  return TrainState(jnp.int32(step), {"w": weights, "layers": {"b": weights * 7}}, (moments, ()))


def abstract(size=5):
  return jax.eval_shape(lambda: state(0, size))


def equal(a, b):
  """Whether two trees of arrays are the same, bit for bit."""
  same = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    jax.tree.leaves(jax.tree.map(same, a, b))
  )


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def saved(directory, *steps, keep=100, losses=None):
  with Checkpoints(directory, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), data(), (losses or {}).get(step))


def test_parameters_optimizer_and_data_lie_apart(tmp_path):
  saved(tmp_path, 3)
  assert {"params", "optimizer", "data"} <= {
    p.name for p in (tmp_path / "3").iterdir() if p.is_dir()
  }


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
  batches = data()
  first = [next(batches) for _ in range(4)]
  with Checkpoints(tmp_path, 2) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(4, state(4), batches, None)
    following = [next(batches) for _ in range(4)]
  with Checkpoints(tmp_path, 2) as checkpoints:
    assert checkpoints.latest == 4
    again = data()
    assert equal(checkpoints.restore(abstract(), again), state(4))
  assert [next(again) for _ in range(4)] == following != first


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  forward = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  running = state(0, size=300_000)
  expected = {}
  with Checkpoints(tmp_path, 10) as checkpoints:
    for step in range(1, 4):
      running = forward(running)
      expected[step] = np.array(running.params["w"])
      checkpoints.save(step, running, data(), None)
      for _ in range(5):
        running = forward(running)
  for step, weights in expected.items():
    np.testing.assert_array_equal(load_params(tmp_path, None, step)["w"], weights)


def test_the_latest_are_kept_and_the_best_besides(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: 4.0}
  saved(tmp_path, 1, 2, 3, 4, 5, 6, keep=2, losses=losses)
  assert names(tmp_path) == ["2", "5", "6"]
  with Checkpoints(tmp_path, 2) as checkpoints:  # it knows after a restart, too
    assert checkpoints.best_loss == 1.0
    checkpoints.save(7, state(7), data(), 0.5)
    checkpoints.save(8, state(8), data(), None)
    checkpoints.save(9, state(9), data(), None)
  assert names(tmp_path) == ["7", "8", "9"]


def test_without_a_held_out_loss_none_is_best(tmp_path):
  saved(tmp_path, 1, 2, 3, keep=1)
  assert names(tmp_path) == ["3"]
  with Checkpoints(tmp_path, 1) as checkpoints:
    assert checkpoints.best_loss == float("inf")


# Parameters alone.


@pytest.mark.parametrize("step", ["latest", "1", 2])
@pytest.mark.parametrize("shapes", [None, abstract().params], ids=["as saved", "as asked"])
def test_parameters_are_read_alone(tmp_path, step, shapes):
  saved(tmp_path, 1, 2)
  assert equal(load_params(tmp_path, shapes, step), state(1 if step == "1" else 2).params)


def test_the_best_goes_by_held_out_loss(tmp_path):
  saved(tmp_path / "a", 1, 2, 3, losses={1: 3.0, 2: 1.0})
  assert equal(load_params(tmp_path / "a", None, "best"), state(2).params)
  saved(tmp_path / "b", 1)
  with pytest.raises(InputError, match="no checkpoint has a held-out loss; take latest or a step"):
    load_params(tmp_path / "b", None, "best")


def test_a_step_that_is_not_there_names_those_that_are(tmp_path):
  saved(tmp_path, 1, 2)
  with pytest.raises(InputError, match="no checkpoint of step 7; there are 1, 2, latest and best"):
    load_params(tmp_path, None, 7)


@pytest.mark.parametrize("directory", ["", "missing"])
def test_a_directory_without_checkpoints_is_an_error(tmp_path, directory):
  with pytest.raises(InputError, match="holds no checkpoint; train this work directory first"):
    load_params(tmp_path / directory, None)


# Parameters that are opened, and read as they are asked for.


def stacked():
  """Parameters of three layers, and some that are of none."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  layers = {"mlp": {"up": array(3, 4, 6)}, "norm": array(3, 4)}
  return {"embed": array(8, 4), "layers": layers, "norm": array(4)}


@pytest.fixture(params=["trained", "imported"])
def opened(tmp_path, request):
  """A directory that holds `stacked()`."""
  params = stacked()
  if request.param == "imported":
    save_params(tmp_path, params)
    return tmp_path
  later = jax.tree.map(jnp.zeros_like, params)
  with Checkpoints(tmp_path, 2) as checkpoints:
    for step, of_step in ((1, params), (2, later)):
      state = TrainState(jnp.int32(step), of_step, {"mu": of_step})
      checkpoints.save(step, state, data(), float(step))
  return tmp_path


def test_what_is_opened_reads_what_is_loaded(opened):
  step = "best" if (opened / "1").exists() else 0
  found, loaded = open_params(opened, step), load_params(opened, None, step)
  assert equal(loaded, stacked())
  assert equal(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, loaded))
  for i in range(3):
    layer = lambda array, i=i: np.asarray(array[i])
    assert equal(jax.tree.map(layer, found["layers"]), jax.tree.map(layer, loaded["layers"]))
  with pytest.raises(InputError, match="no checkpoint of step 7; there are "):
    open_params(opened, 7)


def test_a_layer_is_a_chunk_on_disk_and_other_arrays_are_whole(opened):
  chunks = jax.tree.map(lambda array: array.chunk_layout.write_chunk.shape, open_params(opened))
  assert chunks == {
    "embed": (8, 4),
    "layers": {"mlp": {"up": (1, 4, 6)}, "norm": (1, 4)},
    "norm": (4,),
  }


def test_a_layer_is_read_without_the_others(tmp_path):
  save_params(tmp_path, stacked())
  files = sorted((tmp_path / "0" / "params" / "layers.mlp.up" / "c").glob("*/*/*"))
  assert len(files) == 3
  files[0].write_bytes(b"broken")
  up = open_params(tmp_path)["layers"]["mlp"]["up"]
  np.testing.assert_array_equal(up[2], stacked()["layers"]["mlp"]["up"][2])
  with pytest.raises(ValueError):
    np.asarray(up[0])


# What a killed or failed save leaves.


def test_what_a_killed_save_left_is_ignored_and_cleaned_up(tmp_path):
  saved(tmp_path, 1)
  (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
  with Checkpoints(tmp_path, 2) as checkpoints:
    assert (checkpoints.latest, checkpoints.latest_path()) == (None, "none")
    with pytest.raises(InputError, match="holds no checkpoint"):
      load_params(tmp_path, None)
    checkpoints.save(2, state(2), data(), None)
  assert names(tmp_path) == ["2"]
  assert equal(load_params(tmp_path, None), state(2).params)


FULL_DISK = """
import pathlib, resource, signal, sys
from absl import logging
from msjax.errors import RunError
from msjax.training.checkpoint import Checkpoints
sys.path.insert(0, {tests!r})
from test_checkpoint import data, state

logging.set_verbosity(logging.FATAL)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing fails and nobody dies
try:
  with Checkpoints(pathlib.Path({directory!r}), 5) as checkpoints:
    checkpoints.save(1, state(1), data(), None)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    checkpoints.save(2, state(2, size=500_000), data(), None)
    {then}
except RunError as error:
  print(error)
"""


@pytest.mark.parametrize("then", ["", "checkpoints.save(3, state(3), data(), None)"])
def test_a_full_disk_is_told_and_leaves_the_last_good_checkpoint(
  tmp_path, request, monkeypatch, then
):
  directory = tmp_path / "checkpoints"
  program = FULL_DISK.format(tests=str(request.path.parent), directory=str(directory), then=then)
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as here: `state` is the same to a bit
  done = forked.run(program)
  (line,) = done.stdout.splitlines()
  assert line.startswith(f"a checkpoint could not be written to {directory}: ")
  assert "File too large" in line
  assert line.endswith(f"; last good checkpoint: {directory / '1'}")
  assert equal(load_params(directory, None), state(1).params)
  saved(directory, 4)  # there is room again
  assert names(directory) == ["1", "4"]
