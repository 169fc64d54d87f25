"""A Hugging Face checkpoint becomes a work directory: parameters, streams and tokenizer."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.config import Config, DataConfig
from msjax.errors import InputError
from msjax.hub.config import model_config
from msjax.hub.names import STREAM_EMBEDDING, read_params, tensors
from msjax.hub.weights import Weights
from msjax.text import tokenizer as tokenizers
from msjax.training.checkpoint import save_params, saved_steps
from msjax.training.state import Learner
from msjax.workdir import WorkDir

STREAM_INIT = ("normal", "zeros")


class Imported(NamedTuple):
  """What came in.

  Attributes:
    parameters: how many numbers.
    silence: the silence token, as the vocabulary spells it.
    silence_id: its id.
    stream_embedding: `checkpoint` where it came along, else how it was made.
    unused: tensors that no part of the model takes.
  """

  parameters: int
  silence: str
  silence_id: int
  stream_embedding: str
  unused: tuple[str, ...]


def import_checkpoint(
  source: pathlib.Path,
  workdir: WorkDir,
  streams: tuple[str, ...],
  *,
  same_row: str = "hidden",
  skip_silence: bool = False,
  silence: str | None = None,
  stream_init: str = "normal",
  seed: int = 0,
) -> Imported:
  """Writes a checkpoint of step 0 into a work directory; `config.init_from` starts from it.

  Args:
    source: folder with config.json, tokenizer.json and safetensors.
    workdir: without a checkpoint.
    streams: `name:kind` or `name:kind:weight`.
    same_row: rule of the streams.
    skip_silence: rule of the streams.
    silence: token that stands for silence; None: the official release's rule.
    stream_init: of a stream embedding that does not come along: `normal` (0.02 wide), or `zeros`,
      which leaves the model's answers unchanged.
    seed: of that.

  Raises:
    InputError: the folder is no such checkpoint, or the work directory is taken.
  """
  if saved_steps(workdir.checkpoints):
    raise InputError(f"{workdir.path}: holds a run already; choose another work directory")
  hf = _read_json(source / "config.json")
  model = model_config(hf, str(source / "config.json"))
  model.vocab_size = hf.get("vocab_size", 0)
  tokenizer = tokenizers.load(source, silence=silence, vocab_size=model.vocab_size)
  config = Config(
    streams=streams,
    same_row=same_row,
    skip_silence=skip_silence,
    model=model,
    data=DataConfig(
      tokenizer=str(workdir.path.absolute() / "tokenizer.json"), silence=silence or ""
    ),
  )
  stream_set = config.stream_set(tokenizer.silence_id)
  learner = Learner(config, stream_set, tokenizer.vocab_size)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  weights = Weights(source)
  params = read_params(weights, {k: v for k, v in like.items() if k != "stream_embed"})
  params["stream_embed"], origin = _stream_embed(weights, like["stream_embed"], stream_init, seed)
  with workdir.lock():
    workdir.describe(config, stream_set, tokenizer)
    save_params(workdir.checkpoints, params)
  used = {tensor.name for tensor in tensors(like)}
  return Imported(
    sum(p.size for p in jax.tree.leaves(params)),
    tokenizer.name(tokenizer.silence_id),
    tokenizer.silence_id,
    origin,
    tuple(sorted(set(weights) - used)),
  )


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
