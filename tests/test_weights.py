"""Folders of safetensors: what is written as the library reads it, and folders that are broken."""

import json
import resource
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import load_file, save_file

from msjax.errors import InputError
from msjax.hub.weights import SIDE_FILES, Folder, Part, write_safetensors

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SHAPES = {"z": (5, 7), "a": (), "none": (0, 3), "m": (2, 3, 1), "odd": (3,), "ü": (1, 11)}
RNG = np.random.default_rng(0)
ARRAYS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def parts(arrays):
  return [Part(name, array.shape, lambda array=array: array) for name, array in arrays.items()]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_the_library_reads_what_was_written(tmp_path, dtype):
  path = tmp_path / "model.safetensors"
  write_safetensors(path, parts(ARRAYS), dtype)
  found = load_file(path)
  assert found.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert (found[name].dtype, found[name].shape) == (dtype, array.shape)
    assert found[name].tobytes() == array.astype(dtype).tobytes()
  with safetensors.safe_open(path, "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_tensors_are_rounded_as_torch_does(tmp_path):
  write_safetensors(tmp_path / "model.safetensors", parts(ARRAYS), BFLOAT16)
  theirs = torch.from_numpy(ARRAYS["z"]).to(torch.bfloat16).float().numpy()
  found = load_file(tmp_path / "model.safetensors")["z"].astype(np.float32)
  np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("length", range(1, 10))
def test_the_tensors_start_at_a_multiple_of_eight(tmp_path, length):
  path = tmp_path / "model.safetensors"
  write_safetensors(path, parts({"n" * length: ARRAYS["odd"]}), FLOAT32)
  content = path.read_bytes()
  start = 8 + int.from_bytes(content[:8], "little")
  assert start % 8 == 0 and content[8:9] == b"{"
  assert content[start:] == ARRAYS["odd"].tobytes()


def test_views_are_written_in_their_own_order(tmp_path):
  array = ARRAYS["z"].T
  write_safetensors(tmp_path / "model.safetensors", parts({"t": array}), FLOAT32)
  np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["t"], array)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
  read = []  # weakly

  def ones():
    assert not any(array() is not None for array in read)
    array = np.ones((3, 4), np.float32)
    read.append(weakref.ref(array))
    return array

  same = [Part(f"t{i}", (3, 4), ones) for i in range(3)]
  write_safetensors(tmp_path / "model.safetensors", same, FLOAT32)
  assert len(read) == 3


@pytest.mark.parametrize("missing", [1, 40_000, 80_000])
def test_a_disk_that_is_full_is_told_wherever_it_was_full(tmp_path, missing):
  arrays = parts({f"t{i}": np.ones(5_000, np.float32) for i in range(4)})
  write_safetensors(tmp_path / "whole.safetensors", arrays, FLOAT32)
  size = (tmp_path / "whole.safetensors").stat().st_size
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, hard))
  try:
    with pytest.raises(OSError, match="File too large"):
      write_safetensors(tmp_path / "model.safetensors", arrays, FLOAT32)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Folders.


@pytest.fixture
def folder(tmp_path):
  """A folder of two files of tensors, with their index and a file that is nobody's."""
  names = sorted(ARRAYS)
  where = {}
  for file, part in (("one.safetensors", names[:2]), ("two.safetensors", names[2:])):
    save_file({name: ARRAYS[name].astype(BFLOAT16) for name in part}, tmp_path / file)
    where |= dict.fromkeys(part, file)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  (tmp_path / "config.json").write_text('{"model_type":  "llama"}')
  (tmp_path / "tokenizer.json").write_bytes(b'{"t":\r\n"\xc3\xbc"}')
  (tmp_path / "pytorch_model.bin").write_bytes(b"another")
  return tmp_path


def test_a_folder_is_a_mapping_of_tensors(folder):
  found = Folder(folder)
  assert sorted(found) == sorted(ARRAYS) and len(found) == len(ARRAYS)
  assert repr(found) == str(folder) and found.get("nobody") is None
  for name, array in ARRAYS.items():
    assert found[name].dtype == BFLOAT16
    assert found[name].tobytes() == array.astype(BFLOAT16).tobytes()
  assert found.config() == {"model_type": "llama"}
  assert found.tokenizer_json() == '{"t":\r\n"ü"}'


def test_files_go_along_byte_for_byte_if_they_are_known(folder):
  (folder / "vocab.json").mkdir()
  expected = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")}
  assert Folder(folder).side_files() == expected
  assert set(expected) < set(SIDE_FILES)


@pytest.mark.parametrize(
  ("file", "content", "told"),
  [
    ("config.json", b"3", "config.json: holds '3'; expected a JSON object"),
    ("config.json", b"\xff", "config.json: is no JSON"),
    ("model.safetensors.index.json", b'{"weight_map": ["a"]}', "index.json: is no index"),
    ("model.safetensors.index.json", b'["weight_map"]', "index.json: is no index"),
    ("model.safetensors.index.json", b"\xff", "index.json: is no index"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "3: not found, but model.safe"),
    ("model.safetensors.index.json", b'{"weight_map": {}}', r"holds no \*.safetensors"),
    ("two.safetensors", b"", "two.safetensors: cannot be read, it may be cut short"),
    ("two.safetensors", b"<!DOCTYPE html>", "two.safetensors: cannot be read"),
    ("tokenizer.json", b"\xff", "tokenizer.json: is no text"),
  ],
)
def test_a_broken_file_is_named(folder, file, content, told):
  (folder / file).write_bytes(content)
  with pytest.raises(InputError, match=told):
    Folder(folder).tokenizer_json()


def test_a_file_is_no_folder(folder):
  with pytest.raises(InputError, match=r"one.safetensors/config.json: not found; expected a Hug"):
    Folder(folder / "one.safetensors")


def test_a_file_that_is_cut_anywhere_is_told(folder):
  content = (folder / "two.safetensors").read_bytes()
  for end in range(0, len(content), 7):
    (folder / "two.safetensors").write_bytes(content[:end])
    with pytest.raises(InputError, match=r"two.safetensors: cannot be read, it may be cut short"):
      Folder(folder)
