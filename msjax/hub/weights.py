"""A Hugging Face folder: config.json, the tokenizer's files, tensors read when asked for."""

import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors

from msjax.errors import InputError

INDEX = "model.safetensors.index.json"
# What goes along with the tensors, byte for byte.
SIDE_FILES = (
  "README.md",
  "added_tokens.json",
  "chat_template.jinja",
  "config.json",
  "generation_config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
)
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_READ = ("F64", "F32", "F16", "BF16")


class Tensors(Mapping[str, np.ndarray]):
  """Tensors by their Hugging Face names, each read when it is asked for.

  Attributes:
    path: of the folder or the file.
    shapes: of the tensors, by name.
  """

  path: pathlib.Path
  shapes: dict[str, tuple[int, ...]]

  def __iter__(self) -> Iterator[str]:
    """Yields the names."""
    return iter(self.shapes)

  def __len__(self) -> int:
    """Returns how many there are."""
    return len(self.shapes)

  def __repr__(self) -> str:
    """Names the place."""
    return str(self.path)


class Folder(Tensors):
  """Those of one safetensors file or several, and what lies beside them."""

  def __init__(self, path: pathlib.Path):
    """Looks into every file; reads no tensor.

    Raises:
      InputError: no config.json, no safetensors; a file that is missing, broken or cut short; a
        tensor that stands in two files, or not in the one that the index names.
    """
    self.path = path
    self._config = _read_json(path / "config.json")
    index = _index(path)
    self.shapes = {}
    self._where: dict[str, str] = {}
    for file in _file_names(path, index):
      for tensor, shape in _shapes(path / file).items():
        if tensor in self._where:
          raise InputError(f"{path}: {tensor} stands in {self._where[tensor]} and in {file}")
        self._where[tensor], self.shapes[tensor] = file, shape
    for tensor, file in (index or {}).items():
      if self._where.get(tensor) != file:
        raise InputError(f"{path / file}: lacks {tensor}, which {INDEX} says is there")

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads a tensor; bfloat16 comes as ml_dtypes'."""
    # Opened anew each time: a file that stays mapped fills memory with what was read of it.
    with safetensors.safe_open(self.path / self._where[name], "np") as file:
      if (dtype := file.get_slice(name).get_dtype()) not in _READ:
        raise InputError(f"{self.path}: {name} is of {dtype}; expected one of {', '.join(_READ)}")
      return file.get_tensor(name)

  def config(self) -> dict[str, Any]:
    """Returns config.json."""
    return self._config

  def tokenizer_json(self) -> str:
    """Returns the text of tokenizer.json."""
    path = self.path / "tokenizer.json"
    try:
      return path.read_bytes().decode()
    except OSError as error:
      raise InputError(f"{path}: {error.strerror}; expected a tokenizer there") from None
    except UnicodeDecodeError as error:
      raise InputError(f"{path}: is no text: {error}") from None

  def side_files(self) -> dict[str, bytes]:
    """Returns the files that go along with the tensors, by name."""
    paths = (self.path / name for name in SIDE_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


class Part(NamedTuple):
  """A tensor to write.

  Attributes:
    name: at Hugging Face.
    shape: there.
    read: returns it, of any float dtype.
  """

  name: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]

  def nbytes(self, dtype: np.dtype) -> int:
    """Its size on disk."""
    return int(np.prod(self.shape)) * dtype.itemsize


def write_safetensors(path: pathlib.Path, parts: Sequence[Part], dtype: np.dtype) -> None:
  """Writes a safetensors file, holding one tensor at a time; the library would hold them all."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants it
  end = 0
  for part in parts:
    begin, end = end, end + part.nbytes(dtype)
    header[part.name] = {
      "dtype": _CODES[dtype.name],
      "shape": part.shape,
      "data_offsets": (begin, end),
    }
  head = json.dumps(header).encode()
  head += b" " * (-len(head) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(head)) + head)
    for part in parts:
      # Not tofile, which keeps quiet about a disk that is full at its last bytes.
      file.write(np.ascontiguousarray(part.read(), dtype).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())


def _index(folder: pathlib.Path) -> dict[str, str] | None:
  """File by tensor, as the index says, if there is one."""
  path = folder / INDEX
  if not path.exists():
    return None
  try:
    return {t: str(file) for t, file in json.loads(path.read_bytes())["weight_map"].items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise InputError(f"{path}: is no index; expected JSON with a weight_map") from None


def _file_names(folder: pathlib.Path, index: dict[str, str] | None) -> list[str]:
  names = {p.name for p in folder.glob("*.safetensors")} if index is None else index.values()
  if not names:
    raise InputError(f"{folder}: holds no *.safetensors; expected a Hugging Face checkpoint")
  return sorted(set(names))


def _shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Shapes of a file's tensors, by name."""
  try:
    with safetensors.safe_open(path, "np") as file:
      return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
  except FileNotFoundError:
    raise InputError(f"{path}: not found, but {INDEX} names it") from None
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path}: cannot be read, it may be cut short: {error}") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    raise InputError(f"{path}: not found; expected a Hugging Face checkpoint there") from None
  except ValueError as error:
    raise InputError(f"{path}: is no JSON: {error}") from None
  if not isinstance(found, dict):
    raise InputError(f"{path}: holds {str(found)[:40]!r}; expected a JSON object")
  return found
