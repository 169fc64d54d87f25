"""Orbax checkpoints: parameters, optimizer and data position apart, written in the background.

A checkpoint appears under its step number only when it is whole (Orbax writes to a temporary name
and renames), so whatever kills a run, the last one that stands is good.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tensorstore
from absl import logging
from orbax.checkpoint import v1 as ocp

from msjax.errors import InputError, RunError
from msjax.training.state import Params, TrainState

_policies = ocp.training.preservation_policies
_CHUNK_BYTES = 2**26


class Checkpoints:
  """The checkpoints of one work directory; a context manager, so that the last write lands."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens or creates the directory; keeps the latest `keep` and the best by held-out loss."""
    self.directory = directory
    best = _policies.BestN(
      get_metric_fn=lambda metrics: -metrics["valid_loss"],
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    self._checkpointer = ocp.training.Checkpointer(
      directory.absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep), best]),
      cleanup_tmp_directories=True,
      context=_by_layers(),
    )
    self._writing = None

  def __enter__(self) -> "Checkpoints":
    """Returns itself."""
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Waits for the write in flight."""
    try:
      if kind is None:
        self.wait()
    finally:
      _quietly(self._checkpointer.close)

  @property
  def latest(self) -> int | None:
    """Steps taken at the latest whole checkpoint, or None."""
    return self._checkpointer.latest.step if self._checkpointer.latest else None

  def latest_path(self) -> str:
    """Names the latest whole checkpoint on disk, or says "none"."""
    steps = saved_steps(self.directory)
    return str(self.directory / str(steps[-1])) if steps else "none"

  @property
  def best_loss(self) -> float:
    """Lowest held-out loss of the checkpoints that stand; infinite if none has one."""
    losses = [c.metrics["valid_loss"] for c in self._checkpointer.checkpoints if c.metrics]
    return min(losses, default=float("inf"))

  def save(self, step: int, state: TrainState, data: Any, valid_loss: float | None) -> None:
    """Starts writing a checkpoint; first waits for the one before, and raises what befell it.

    Args:
      step: steps taken.
      state: finite; may be donated as soon as this returns.
      data: the data iterator, at the batch after the last one used.
      valid_loss: held-out loss at this step if it was just measured.
    """
    self.wait()
    checkpointables = {
      "params": state.params,
      "optimizer": {"step": state.step, "opt_state": state.opt_state},
      "data": data,
    }
    metrics = None if valid_loss is None else {"valid_loss": valid_loss}
    self._writing = self._attempt(
      lambda: self._checkpointer.save_checkpointables_async(step, checkpointables, metrics=metrics)
    )

  def wait(self) -> None:
    """Returns when nothing is being written; raises `RunError` if it could not be."""
    writing, self._writing = self._writing, None
    if writing is not None:
      self._attempt(writing.result)

  def _attempt(self, act):
    with _told(f"a checkpoint could not be written to {self.directory}", self.latest_path):
      return act()

  def restore(self, abstract: TrainState, data: Any) -> TrainState:
    """Returns the latest state and moves the data iterator to where it was then.

    Args:
      abstract: `jax.ShapeDtypeStruct`s of the state; each process reads what its devices hold.
      data: a fresh iterator over the same data.
    """
    restored = self._checkpointer.load_checkpointables(
      None,
      {
        "params": abstract.params,
        "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state},
        "data": data,
      },
    )
    optimizer = restored["optimizer"]
    return TrainState(optimizer["step"], restored["params"], optimizer["opt_state"])


def save_params(directory: pathlib.Path, params: Params) -> None:
  """Writes parameters alone, as the checkpoint of step 0: what no step has made."""
  context = _by_layers()
  context.array.saving.use_ocdbt = False  # whose one transaction would hold all of them
  with _told(f"{directory}: parameters could not be written"), context:
    ocp.save_checkpointables((directory / "0").absolute(), {"params": params})


def load_params(
  directory: pathlib.Path, abstract: Params | None, step: int | str = "latest"
) -> Params:
  """Reads the parameters alone of a checkpoint.

  Args:
    directory: `WORKDIR/checkpoints`.
    abstract: `jax.ShapeDtypeStruct`s to read into, wherever they lie (see `placed`), or None to
      take shapes as they were saved.
    step: steps taken at the checkpoint, `latest`, or `best` by held-out loss.
  """
  path = (directory / str(chosen(directory, step))).absolute()
  logging.info("reading parameters from %s", path)
  if abstract is None:
    abstract = saved_shapes(directory, step)
  with _told(f"{path}: parameters could not be read"):
    return ocp.load_checkpointables(path, {"params": placed(abstract)})["params"]


def saved_shapes(directory: pathlib.Path, step: int | str = "latest") -> Any:
  """Returns shapes and dtypes of the parameters of a checkpoint; arguments as of `load_params`."""
  path = (directory / str(chosen(directory, step))).absolute()
  with _told(f"{path}: parameters could not be read"):
    saved = ocp.metadata(path, "params").metadata
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)


def open_params(directory: pathlib.Path, step: int | str = "latest") -> Params:
  """Opens the parameters of a checkpoint: TensorStores, which read what is indexed of them.

  Args:
    directory: `WORKDIR/checkpoints`.
    step: as for `load_params`.
  """
  path = (directory / str(chosen(directory, step))).absolute()
  store = {"driver": "file", "path": f"{path / 'params'}/"}
  if (path / "params" / "manifest.ocdbt").exists():
    store = {"driver": "ocdbt", "base": store}

  def opened(keys, _) -> tensorstore.TensorStore:
    name = ".".join(key.key for key in keys)
    kvstore = {**store, "path": f"{store.get('path', '')}{name}/"}
    # A chunk that is not there is an error, not zeros.
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    with _told(f"{path}: parameters could not be read"):
      return tensorstore.open(spec).result()

  return jax.tree_util.tree_map_with_path(opened, ocp.metadata(path, "params").metadata)


def _by_layers() -> ocp.Context:
  """How arrays are cut on disk: so that one layer can be read without the others."""
  options = functools.partial(
    ocp.options.ArrayOptions.Saving.StorageOptions, chunk_byte_size=_CHUNK_BYTES
  )

  def cut(keys, array):
    of_layers = "layers" in (getattr(key, "key", None) for key in keys) and array.ndim > 1
    return options(shard_axes=(0,) if of_layers else None)

  context = ocp.Context()
  context.array.saving.scoped_storage_options_creator = cut
  return context


def chosen(directory: pathlib.Path, step: int | str) -> int:
  """Returns the steps taken at the checkpoint that is asked for, as for `load_params`."""
  steps = saved_steps(directory)
  if not steps:
    raise InputError(f"{directory}: holds no checkpoint; train this work directory first")
  if step == "latest":
    return steps[-1]
  if step == "best":
    return _best(directory)
  if str(step) not in map(str, steps):
    listed = ", ".join(map(str, steps))
    raise InputError(
      f"{directory}: no checkpoint of step {step}; there are {listed}, latest and best"
    )
  return int(step)


def _best(directory: pathlib.Path) -> int:
  """Returns the step whose held-out loss is lowest."""
  with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
    losses = {c.step: c.metrics["valid_loss"] for c in checkpointer.checkpoints if c.metrics}
  if not losses:
    raise InputError(f"{directory}: no checkpoint has a held-out loss; take latest or a step")
  return min(losses, key=losses.get)


def placed(abstract: Any, place: jax.sharding.Sharding | None = None) -> Any:
  """Says of `jax.ShapeDtypeStruct`s where each array is to lie.

  Args:
    abstract: those that say so already stay where they are.
    place: of the others; by default one device.
  """
  place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  at = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=getattr(x, "sharding", None) or place
  )
  return jax.tree.map(at, abstract)


def saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the whole checkpoints in a directory, which may not exist; temporary names differ."""
  names = (p.name for p in directory.iterdir()) if directory.is_dir() else ()
  return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def _told(what: str, last_good: Callable[[], str] | None = None) -> Iterator[None]:
  """Turns whatever Orbax and TensorStore raise into one line."""
  try:
    yield
  except Exception as error:
    last = f"; last good checkpoint: {last_good()}" if last_good else ""
    raise RunError(f"{what}: {_first_line(error)}{last}") from error


def _first_line(error: BaseException) -> str:
  """The innermost message, cut to one readable line."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]


def _quietly(close) -> None:
  """Closes after an error that has been reported already: its repetition helps nobody."""
  try:
    close()
  except Exception as error:
    logging.debug("while closing: %s", error)
