"""A compiled step in a file: compiled on any machine, run on the pod that it was compiled for."""

import importlib.metadata
import json
import os
import pathlib
import pickle
from typing import Any

import jax
from jax.experimental import serialize_executable

from msjax.errors import InputError
from msjax.files import replacing
from msjax.training.begin import Program
from msjax.training.state import Learner

FORMAT_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "libtpu", "msjax")
# Fields of a config that the compiled step does not depend on.
_OTHER_FIELDS = ("workdir", "init_from", "report", "baseline")
_OTHER_DATA = ("train", "valid", "tokenizer", "on_bad_record")
_OTHER_TRAIN = ("log_every", "eval_every", "eval_batches", "save_every", "keep", "read_threads")
_OTHER_TRAIN += ("stall_seconds", "profile_first_step", "profile_last_step")


def save(path: str | os.PathLike, learner: Learner, program: Program) -> None:
  """Writes the step of a run, compiled for the mesh in use."""
  made = serialize_executable.serialize(program.step)
  content = {"identity": _identity(learner), "remat": program.remat, "made": made}
  with replacing(path) as file:
    pickle.dump(content, file)


def load(path: str | os.PathLike, learner: Learner) -> Program:
  """Reads a step back, for the mesh in use. The file can run code: open none but your own.

  Raises:
    InputError: it is of another run, of another kind or number of devices, or of other versions of
      what compiled it, or cannot be read.
  """
  try:
    content = pickle.loads(pathlib.Path(path).read_bytes())
    theirs, made = content["identity"], content["made"]
  except OSError as error:
    raise InputError(f"--program {path}: cannot be read: {error.strerror}") from None
  except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError):
    raise InputError(
      f"--program {path}: is no compiled step; expected what msjax.compile --save wrote"
    ) from None
  ours = _identity(learner)
  for name in sorted(ours | theirs):
    if ours.get(name) != theirs.get(name):
      raise InputError(
        f"--program {path}: compiled with {name} {theirs.get(name)!r}, here it is "
        f"{ours.get(name)!r}; compile again by msjax.compile --save"
      )
  devices = list(jax.sharding.get_mesh().devices.flat)
  return Program(
    content["remat"], serialize_executable.deserialize_and_load(*made, execution_devices=devices)
  )


def _identity(learner: Learner) -> dict[str, Any]:
  """All that a compiled step depends on, by name."""
  config, mesh = learner.config.to_json(), jax.sharding.get_mesh()
  for name in _OTHER_FIELDS:
    del config[name]
  for group, names in (("data", _OTHER_DATA), ("train", _OTHER_TRAIN)):
    for name in names:
      del config[group][name]
  return {
    "format_version": FORMAT_VERSION,
    **{name: _version(name) for name in _PACKAGES},
    "device": mesh.devices.flat[0].device_kind,
    "mesh": str(dict(mesh.shape)),
    "vocabulary": learner.vocab_size,
    "streams": json.dumps(learner.streams.to_json()),
    **{f"config.{name}": json.dumps(value, sort_keys=True) for name, value in config.items()},
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
