"""The tensors of a Hugging Face folder, each read when it is asked for."""

import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors

from msjax.errors import InputError

INDEX = "model.safetensors.index.json"


class Weights(Mapping[str, np.ndarray]):
  """Tensors by name, from one safetensors file or several."""

  def __init__(self, directory: pathlib.Path):
    """Opens every file; reads no tensor.

    Raises:
      InputError: no safetensors; a file that is missing, broken or cut short; a tensor that stands
        in two files, or not in the one that the index names.
    """
    self.directory = directory
    index = _index(directory)
    self._files = {name: _open(directory / name) for name in _file_names(directory, index)}
    self._where: dict[str, str] = {}
    for file, opened in self._files.items():
      for tensor in opened.keys():  # noqa: SIM118 - it is no dict
        if tensor in self._where:
          raise InputError(f"{directory}: {tensor} stands in {self._where[tensor]} and in {file}")
        self._where[tensor] = file
    for tensor, file in (index or {}).items():
      if self._where.get(tensor) != file:
        raise InputError(f"{directory / file}: lacks {tensor}, which {INDEX} says is there")

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads a tensor; bfloat16 comes as ml_dtypes'."""
    return self._files[self._where[name]].get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    """Yields the names."""
    return iter(self._where)

  def __len__(self) -> int:
    """Returns how many there are."""
    return len(self._where)

  def __repr__(self) -> str:
    """Names the folder."""
    return str(self.directory)


def _index(directory: pathlib.Path) -> dict[str, str] | None:
  """File by tensor, as the index says, if there is one."""
  path = directory / INDEX
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))["weight_map"]
  except (ValueError, KeyError, TypeError):
    raise InputError(f"{path}: is no index; expected JSON with a weight_map") from None


def _file_names(directory: pathlib.Path, index: dict[str, str] | None) -> list[str]:
  names = {p.name for p in directory.glob("*.safetensors")} if index is None else index.values()
  if not names:
    raise InputError(f"{directory}: holds no *.safetensors; expected a Hugging Face checkpoint")
  return sorted(set(names))


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, "np")
  except FileNotFoundError:
    raise InputError(f"{path}: not found, but {INDEX} names it") from None
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path}: cannot be read, it may be cut short: {error}") from None
