"""A trained run becomes a Hugging Face folder."""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import msjax
from msjax.errors import InputError
from msjax.hub.config import to_hf
from msjax.hub.import_ import read_checkpoint
from msjax.hub.names import Tensor, part_of, tensors
from msjax.hub.weights import INDEX
from msjax.model import Model
from msjax.streams import HOLE
from msjax.text.tokenizer import Tokenizer
from msjax.training.state import Params
from msjax.workdir import write_json

LAYOUTS = ("stream", "folded")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FORMAT_VERSION = 1
MANIFEST = "msjax_manifest.json"
_REMOTE_CODE = pathlib.Path(__file__).with_name("modeling_msjax.py")
_VERIFIED_ROWS = 32


def export(
  model: Model,
  target: pathlib.Path,
  *,
  layout: str = "stream",
  stream: str | None = None,
  dtype: str = "bfloat16",
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a folder; it gets its name when all of it is written.

  Args:
    model: what to export.
    target: a folder that does not exist.
    layout: `stream`: every family's own tensors and the stream embedding beside them, which loads
      in transformers as a plain model, and with `trust_remote_code` as one that has streams;
      `folded`: a plain model that speaks one stream.
    stream: that of `folded`.
    dtype: of the tensors, `float32` or `bfloat16`.
    shard_bytes: of one file, at most; a tensor is never cut.

  Raises:
    InputError: the target exists, or no family computes this model.
    OSError: the folder cannot be written; nothing is left of it.
  """
  if target.exists():
    raise InputError(f"{target}: exists; expected the name of a folder to make")
  params, hf = _laid_out(model, layout, stream)
  hf |= {"dtype": dtype, "torch_dtype": dtype, "eos_token_id": model.tokenizer.end_id}
  hf |= {"pad_token_id": model.tokenizer.pad_id}
  temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
  temporary.mkdir(parents=True)
  try:
    _write_weights(params, temporary, DTYPES[dtype], shard_bytes)
    write_json(temporary / "config.json", hf)
    if layout == "stream":
      shutil.copyfile(_REMOTE_CODE, temporary / _REMOTE_CODE.name)
    write_json(temporary / "generation_config.json", {"eos_token_id": model.tokenizer.end_id})
    model.tokenizer.save(temporary / "tokenizer.json")
    write_json(temporary / "tokenizer_config.json", _tokenizer_config(model.tokenizer))
    write_json(temporary / MANIFEST, _manifest(temporary, layout, dtype))
    os.rename(temporary, target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


class Verified(NamedTuple):
  """A folder against the model that it was made of.

  Attributes:
    cells: compared.
    max_difference: of logits.
    same_likeliest: fraction of cells with the same likeliest token.
    kl: mean divergence in nats, of the folder's distribution from the model's.
  """

  cells: int
  max_difference: float
  same_likeliest: float
  kl: float

  def good(self, dtype: str) -> bool:
    """Whether rounding to `dtype` explains the difference."""
    return self.max_difference < 1e-3 if dtype == "float32" else self.kl < 0.015


def verify(model: Model, folder: pathlib.Path, stream: str | None = None) -> Verified:
  """Loads a folder and compares logits on random rows.

  Args:
    model: that was exported.
    folder: from `export`.
    stream: of a folded export: rows have tokens in this stream alone.
  """
  again = read_checkpoint(folder)
  tokens = np.random.default_rng(0).integers(
    0, model.tokenizer.vocab_size, (2, _VERIFIED_ROWS, len(model.streams))
  )
  columns = slice(None)
  if stream is not None:
    columns = [model.streams.id(stream)]
    tokens[:, :, np.arange(len(model.streams)) != columns[0]] = HOLE
  ours = model.logits(tokens)[:, :, columns]
  params = jax.tree.map(jnp.asarray, again.params)
  theirs = Model(again.config, again.streams, again.tokenizer, params).logits(tokens[:, :, columns])
  ours_log, theirs_log = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
  return Verified(
    cells=ours[..., 0].size,
    max_difference=float(jnp.abs(ours - theirs).max()),
    same_likeliest=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    kl=float((jnp.exp(ours_log) * (ours_log - theirs_log)).sum(-1).mean()),
  )


def _laid_out(model: Model, layout: str, stream: str | None) -> tuple[Params, dict[str, Any]]:
  """Returns the parameters as NumPy's, and config.json."""
  params = jax.tree.map(np.asarray, model.params)
  hf = to_hf(model.config.model, model.tokenizer.vocab_size)
  if layout == "stream":
    hf |= {"num_channels": len(model.streams), "channel_embedding_method": "additive"}
    stream_class = f"{_REMOTE_CODE.stem}.Stream{hf['architectures'][0]}"
    hf |= {"auto_map": {"AutoModelForCausalLM": stream_class}}
    return params, hf | {"msjax": model.streams.to_json()}
  if stream is None:
    raise InputError(f"stream: not given; layout folded speaks one of {model.streams.names}")
  s = model.streams.id(stream)
  params = {"head": params["embed"], **params}  # a tied head is the embedding before folding
  params["embed"] = params["embed"] + params.pop("stream_embed")[s]
  return params, hf | {"tie_word_embeddings": False}


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
  """The class is one that every version of transformers knows."""
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": tokenizer.name(tokenizer.end_id),
    "pad_token": tokenizer.name(tokenizer.pad_id),
  }


def _write_weights(params: Params, folder: pathlib.Path, dtype: np.dtype, shard_bytes: int) -> None:
  """Writes shards and their index; holds one shard at a time."""
  shards = list(_shards(params, dtype, shard_bytes))
  where: dict[str, str] = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    arrays = {t.name: np.ascontiguousarray(t.to_hf(part_of(params, t)), dtype) for t in shard}
    save_file(arrays, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(arrays, file)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  metadata = {"total_size": total * dtype.itemsize, "total_parameters": total}
  write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def _shards(params: Params, dtype: np.dtype, limit: int) -> Iterator[list[Tensor]]:
  """Deals tensors out by name, each shard as large as it may be."""
  shard: list[Tensor] = []
  size = 0
  for tensor in sorted(tensors(params), key=lambda t: t.name):
    bytes_ = int(np.prod(tensor.shape)) * dtype.itemsize
    if shard and size + bytes_ > limit:
      yield shard
      shard, size = [], 0
    shard.append(tensor)
    size += bytes_
  yield shard


def _manifest(folder: pathlib.Path, layout: str, dtype: str) -> dict[str, Any]:
  """What was written by whom, with a digest of every file."""
  digests = {}
  for path in sorted(folder.iterdir()):
    with open(path, "rb") as file:
      digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return {
    "format_version": FORMAT_VERSION,
    "msjax": msjax.__version__,
    "layout": layout,
    "dtype": dtype,
    "sha256": digests,
  }
