"""A Hugging Face folder as parameters, streams and tokenizer, and as a work directory."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.config import Config, DataConfig
from msjax.errors import InputError
from msjax.hub.config import model_config
from msjax.hub.gguf import Gguf
from msjax.hub.names import STREAM_EMBEDDING, read_params, tensors
from msjax.hub.weights import Weights
from msjax.streams import Streams
from msjax.text import tokenizer as tokenizers
from msjax.text.tokenizer import HfTokenizer, Tokenizer
from msjax.training.checkpoint import save_params, saved_steps
from msjax.training.state import Learner, Params
from msjax.workdir import WorkDir

STREAM_INIT = ("normal", "zeros")


class Checkpoint(NamedTuple):
  """What a Hugging Face folder holds.

  Attributes:
    config: streams and model; it trains nothing by itself.
    streams: with the silence token.
    tokenizer: of the folder.
    params: float32 arrays of NumPy.
    stream_embedding: `checkpoint` where it came along, else how it was made.
    unused: tensors that no part of the model takes.
  """

  config: Config
  streams: Streams
  tokenizer: Tokenizer
  params: Params
  stream_embedding: str
  unused: tuple[str, ...]


def is_checkpoint(directory: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder or a GGUF file, not a work directory."""
  if directory.suffix == ".gguf":
    return True
  path = directory / "config.json"
  return path.is_file() and "model_type" in _read_json(path)


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
  """Reads a folder with config.json, tokenizer.json and safetensors, or a GGUF file.

  Args:
    source: the folder or the file.
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
  if source.suffix == ".gguf":
    weights = Gguf(source)
    where, hf, tokenizer_json = source, weights.config(), weights.tokenizer_json()
  else:
    where = source / "config.json"
    hf, weights, tokenizer_json = _read_json(where), Weights(source), None
  model = model_config(hf, str(where))
  model.vocab_size = hf.get("vocab_size", 0)
  if streams is None and "msjax" in hf:  # an export of ours knows its streams
    known = Streams.from_json(hf["msjax"])
    streams, same_row, skip_silence = map(str, known.streams), known.same_row, known.skip_silence
    silence = known.silence_id if silence is None else silence
  if tokenizer_json is None:
    tokenizer = tokenizers.load(source, silence=silence, vocab_size=model.vocab_size)
  else:
    tokenizer = HfTokenizer(tokenizer_json, silence, vocab_size=model.vocab_size)
  config = Config(
    streams=tuple(streams or _default_streams(weights)),
    same_row=same_row,
    skip_silence=skip_silence,
    model=model,
    data=DataConfig(
      tokenizer=str(source.absolute() if tokenizer_json else source.absolute() / "tokenizer.json"),
      silence=tokenizer.name(tokenizer.silence_id),
    ),
  )
  stream_set = config.stream_set(tokenizer.silence_id)
  learner = Learner(config, stream_set, tokenizer.vocab_size)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  params = read_params(weights, {k: v for k, v in like.items() if k != "stream_embed"})
  params["stream_embed"], origin = _stream_embed(weights, like["stream_embed"], stream_init, seed)
  unused = set(weights) - {tensor.name for tensor in tensors(like)}
  return Checkpoint(config, stream_set, tokenizer, params, origin, tuple(sorted(unused)))


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
    save_params(workdir.checkpoints, checkpoint.params)


def _default_streams(weights: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  if STREAM_EMBEDDING not in weights:
    return ("text:output",)
  return tuple(f"s{i}:output" for i in range(len(weights[STREAM_EMBEDDING])))


def _stream_embed(weights, like, stream_init: str, seed: int) -> tuple[np.ndarray, str]:
  """Returns the stream embedding [S, D], and where it comes from."""
  if STREAM_EMBEDDING in weights:
    return read_params(weights, {"stream_embed": like})["stream_embed"], "checkpoint"
  if stream_init == "zeros":
    return np.zeros(like.shape, np.float32), stream_init
  drawn = 0.02 * jax.random.normal(jax.random.key(seed), like.shape, jnp.float32)
  return np.asarray(drawn), stream_init


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{path}: not found; expected a Hugging Face checkpoint there") from None
  except ValueError as error:
    raise InputError(f"{path}: is no JSON: {error}") from None
