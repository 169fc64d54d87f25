"""A session as it stands, to go on from: in memory, or on disk."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from msjax import sharding
from msjax.decoding import tick
from msjax.decoding.prepared import Prepared
from msjax.decoding.session import Setting, plain
from msjax.decoding.tick import State
from msjax.errors import InputError
from msjax.files import replacing

FORMAT = "msjax session 2"
_HEADER = "session"  # an array of JSON, for safetensors' own headers have a limit


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """What `Engine.snapshot` makes and `Engine.restore` takes, as often as one likes.

  Attributes:
    setting: the session's.
    session: what `Session.again` makes it of.
    state: what the devices know of it, as of one session; None: nothing was fed.
    identity: of the model.
  """

  setting: Setting
  session: Mapping[str, Any]
  state: State | None
  identity: str

  @property
  def _who(self) -> str:
    return f"snapshot of session {self.setting.number}"

  def check(self, identity: str, state: State) -> None:
    """Refuses a model, or an engine with such a state, where it cannot go on."""
    if self.identity != identity:
      raise InputError(
        f"{self._who}: is of model {self.identity or 'unnamed'}, this one is "
        f"{identity or 'unnamed'}; restore it where that model runs"
      )
    if self.state is not None:
      ours, theirs = state.past.had.shape[-1] > 0, self.state.past.had.shape[-1] > 0
      if ours != theirs:
        raise InputError(
          f"{self._who}: is of an Engine with remembers={theirs}; expected that here, not {ours}"
        )

  def save(self, path: str | os.PathLike) -> None:
    """Writes a file; all of it or nothing.

    Raises:
      InputError: a grammar, which no file can hold, or a place that cannot be written.
    """
    header = {
      "format": FORMAT,
      "identity": self.identity,
      "setting": self.setting.to_json(self._who),
      "session": self.session,
      "fed": self.state is not None,
    }
    arrays = {} if self.state is None else _named(_trimmed(_plain(self.state)))
    arrays = {name: np.ascontiguousarray(x) for name, x in jax.device_get(arrays).items()}
    arrays[_HEADER] = np.frombuffer(json.dumps(header, default=plain).encode(), np.uint8)
    with replacing(path) as file:
      file.write(safetensors.numpy.save(arrays))

  @classmethod
  def load(cls, path: str | os.PathLike, model: Prepared) -> "Snapshot":
    """Reads what `save` wrote, for a model, onto the mesh in use.

    Raises:
      InputError: a file that is no snapshot, or of another model.
    """
    path = pathlib.Path(path)
    try:
      with safetensors.safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
      raise InputError(f"{path}: {error}; expected a snapshot of a session") from None
    header = json.loads(arrays.pop(_HEADER, np.frombuffer(b"{}", np.uint8)).tobytes())
    if header.get("format") != FORMAT:
      raise InputError(f"{path}: format {header.get('format')!r}; expected {FORMAT!r}")
    state = _state(path, model, arrays) if header["fed"] else None
    return cls(Setting.from_json(header["setting"]), header["session"], state, header["identity"])


def _plain(state: State) -> State:
  """With keys that a file can hold."""
  return dataclasses.replace(state, keys=jax.random.key_data(state.keys))


def _named(state: State) -> dict[str, jax.Array]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _trimmed(state: State) -> State:
  """Without the cells of the cache that nothing was written to."""
  cache = state.cache
  S = state.proposal.shape[1]
  return dataclasses.replace(state, cache=cache.cut(int(cache.row[0]) * S))


def _state(path: pathlib.Path, model: Prepared, arrays: Mapping[str, np.ndarray]) -> State:
  """A state of one session, on the mesh in use."""
  for name in ("past.had", "cache.row"):
    if name not in arrays:
      raise InputError(f"{path}: {name} is missing; expected a snapshot of a session")
  remembers = arrays["past.had"].shape[-1] > 0
  rows = 1 << int(arrays["cache.row"][0]).bit_length()
  like = jax.eval_shape(lambda: _plain(tick.room(model, 1, rows, remembers, None)))
  leaves, shape = jax.tree.flatten(like)
  found = []
  for (name, leaf), _ in zip(_named(like).items(), leaves):
    array = arrays.get(name)
    short = [] if array is None else [(0, n - m) for n, m in zip(leaf.shape, array.shape)]
    if array is None or array.dtype != leaf.dtype or min(n for _, n in short) < 0:
      what = "is missing" if array is None else f"is {array.dtype}, shape {array.shape}"
      raise InputError(
        f"{path}: {name} {what}; expected {leaf.dtype}, {leaf.shape} at most; is it of this model, "
        "and this kind of chip?"
      )
    found.append(jnp.pad(array, short))
  state = jax.tree.unflatten(shape, found)
  state = dataclasses.replace(state, keys=jax.random.wrap_key_data(state.keys))
  return sharding.put(state, tick.specs(model, state, None))
