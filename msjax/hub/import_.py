"""A Hugging Face checkpoint as parameters, streams and tokenizer, and as a work directory."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.config import Config, DataConfig
from msjax.errors import InputError
from msjax.hub.config import model_config
from msjax.hub.gguf import Gguf
from msjax.hub.names import STREAM_EMBEDDING, read_params, tensors
from msjax.hub.weights import SIDE_FILES, Folder
from msjax.streams import Streams
from msjax.text import tokenizer_file
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import placed, save_params, saved_steps
from msjax.training.state import Learner, Params
from msjax.workdir import WorkDir

STREAM_INIT = ("normal", "zeros")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint(NamedTuple):
  """What a Hugging Face checkpoint holds.

  Attributes:
    config: streams and model; it trains nothing by itself.
    streams: with the silence token.
    tokenizer: of the folder.
    params: float32.
    stream_embedding: `checkpoint` where it came along, else how it was made.
    unused: tensors that no part of the model takes.
    files: what lay beside the tensors, by name.
  """

  config: Config
  streams: Streams
  tokenizer: Tokenizer
  params: Params
  stream_embedding: str
  unused: tuple[str, ...]
  files: dict[str, bytes]


def is_checkpoint(path: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder or a GGUF file, not a work directory."""
  if path.suffix == ".gguf":
    return True
  try:
    return "model_type" in json.loads((path / "config.json").read_bytes())
  except (OSError, ValueError):
    return False


def fetched(source: str) -> pathlib.Path:
  """Returns a folder or GGUF file on disk: the one that is named, or a download from the hub.

  Args:
    source: a path, or where there is none such, the id of a model on the hub, as in
      `Qwen/Qwen3-0.6B`.

  Raises:
    InputError: neither, or the hub cannot be reached or has no such model.
  """
  path = pathlib.Path(source).expanduser()
  if path.exists() or not _HUB_ID.fullmatch(source):
    return path
  try:
    import huggingface_hub
  except ImportError:
    raise InputError(
      f"{source}: no such folder; to take it for a hub id, pip install -e '.[hub]'"
    ) from None
  try:
    files = ["*.safetensors", "*.safetensors.index.json", *SIDE_FILES]
    return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=files))
  except Exception as error:  # of many libraries: the hub's, the network's
    reason = str(error).strip().partition("\n")[0]
    raise InputError(
      f"{source}: no such folder, and the hub gave no model of that name: {reason}"
    ) from None


def read_checkpoint(
  source: pathlib.Path,
  streams: tuple[str, ...] | None = None,
  *,
  same_row: str = "hidden",
  skip_silence: bool = False,
  silence: str | None = None,
  stream_init: str = "zeros",
  seed: int = 0,
) -> Checkpoint:
  """Reads a folder or file of Hugging Face's, tensor by tensor into its place.

  Args:
    source: a folder with config.json, tokenizer.json and safetensors, or a GGUF file.
    streams: `name:kind` or `name:kind:weight`; None: those of an export by msjax, with their rule;
      else one output stream `text`, or as many as there are embeddings for, `s0`, `s1` and so on.
    same_row: rule of the streams.
    skip_silence: rule of the streams.
    silence: token that stands for silence; None: the official release's rule.
    stream_init: of a stream embedding that does not come along: `normal` (0.02 wide), or `zeros`,
      which leaves the model's answers unchanged.
    seed: of that.

  Raises:
    InputError: names the file or tensor that is wrong.
  """
  opened = Gguf(source) if source.suffix == ".gguf" else Folder(source)
  hf = opened.config()
  model = model_config(hf, str(source))
  model.vocab_size = hf.get("vocab_size", 0)
  if streams is None and "msjax" in hf:  # an export of ours knows its streams
    known = Streams.from_json(hf["msjax"])
    streams, same_row, skip_silence = map(str, known.streams), known.same_row, known.skip_silence
    silence = known.silence_id if silence is None else silence
  tokenizer = _tokenizer(opened, silence, model.vocab_size)
  config = Config(
    streams=tuple(streams or _default_streams(opened)),
    same_row=same_row,
    skip_silence=skip_silence,
    model=model,
    data=DataConfig(silence=tokenizer.name(tokenizer.silence_id)),
  )
  stream_set = config.stream_set(tokenizer.silence_id)
  learner = Learner(config, stream_set, tokenizer.vocab_size)
  like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params)
  unused = set(opened) - {tensor.name for tensor in tensors(like)}
  params = read_params(opened, {k: v for k, v in like.items() if k != "stream_embed"})
  params["stream_embed"], origin = _stream_embed(opened, like["stream_embed"], stream_init, seed)
  files = opened.side_files()
  return Checkpoint(config, stream_set, tokenizer, params, origin, tuple(sorted(unused)), files)


def import_checkpoint(checkpoint: Checkpoint, workdir: WorkDir) -> None:
  """Writes a checkpoint of step 0 into a work directory, for `config.init_from` to start from.

  Raises:
    InputError: a run lies there already.
  """
  if saved_steps(workdir.checkpoints):
    raise InputError(f"{workdir.path}: holds a run already; choose another work directory")
  tokenizer = str(workdir.path.absolute() / "tokenizer.json")
  with workdir.lock():
    config = checkpoint.config.changed({"data.tokenizer": tokenizer})
    workdir.describe(config, checkpoint.streams, checkpoint.tokenizer)
    workdir.write_hub_files(checkpoint.files)
    save_params(workdir.checkpoints, checkpoint.params)


def _default_streams(weights: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  if STREAM_EMBEDDING not in weights:
    return ("text:output",)
  return tuple(f"s{i}:output" for i in range(len(weights[STREAM_EMBEDDING])))


def _tokenizer(opened: Folder | Gguf, silence: str | int | None, vocab_size: int) -> Tokenizer:
  try:
    return tokenizer_file.parse(opened.tokenizer_json(), silence, vocab_size=vocab_size)
  except InputError as error:
    raise InputError(f"{opened}: {error}") from None


def _stream_embed(weights, like, stream_init: str, seed: int) -> tuple[jax.Array, str]:
  """Returns the stream embedding [S, D], and where it comes from."""
  if STREAM_EMBEDDING in weights:
    return read_params(weights, {"stream_embed": like})["stream_embed"], "checkpoint"
  new = jnp.zeros(like.shape)
  if stream_init == "normal":
    new = 0.02 * jax.random.normal(jax.random.key(seed), like.shape)
  return jax.device_put(new, like.sharding), stream_init
