"""A Hugging Face checkpoint as parameters, streams and tokenizer, and as a work directory."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msjax.config import Config, DataConfig
from msjax.errors import InputError
from msjax.hub.config import model_config
from msjax.hub.gguf import Gguf
from msjax.hub.names import STREAM_EMBEDDING, check, read_params
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
  except (OSError, ValueError, TypeError):
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
  if path.parent.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(source):
    return path
  try:
    import huggingface_hub
  except ImportError:
    raise InputError(
      f"{source}: no such folder; to take it for a hub id, pip install -e '.[hub]'"
    ) from None
  files = ["*.safetensors", "*.safetensors.index.json", *SIDE_FILES]
  others = ["*/*", "consolidated*"]
  try:
    found = huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=others)
  except Exception as error:  # of many libraries: the hub's, the network's
    reason = str(error).strip().partition("\n")[0]
    raise InputError(f"{source}: no such folder; taken for an id of the hub: {reason}") from None
  return pathlib.Path(found)


def read_checkpoint(
  source: pathlib.Path,
  streams: tuple[str, ...] | None = None,
  *,
  same_row: str | None = None,
  skip_silence: bool | None = None,
  silence: str | int | None = None,
  end: str | None = None,
  stream_init: str = "zeros",
  seed: int = 0,
  place: jax.sharding.Sharding | None = None,
) -> Checkpoint:
  """Reads a folder or file of Hugging Face's, tensor by tensor into its place.

  An export of msjax knows its streams, their rule and silence; what is given here comes before.

  Args:
    source: a folder with config.json, tokenizer.json and safetensors, or a GGUF file.
    streams: `name:kind` or `name:kind:weight`; None: the export's; else one output stream `text`,
      or as many as there are embeddings for, `s0`, `s1` and so on.
    same_row: rule of the streams; by default the export's, else `hidden`.
    skip_silence: rule of the streams; by default the export's, else False.
    silence: token that stands for silence; None: the export's, else the official release's rule.
    end: token that ends a message; None: the first known of the usual ones.
    stream_init: of a stream embedding that does not come along: `normal` (0.02 wide), or `zeros`,
      which leaves the model's answers unchanged.
    seed: of that.
    place: of every parameter; None: where all arrays lie.

  Raises:
    InputError: names the file or tensor that is wrong.
  """
  opened = Gguf(source) if source.suffix == ".gguf" else Folder(source)
  hf = opened.config()
  model = model_config(hf, str(source))
  known = _known_streams(hf, source)
  if known is not None:
    streams = streams or tuple(map(str, known.streams))
    same_row = known.same_row if same_row is None else same_row
    skip_silence = known.skip_silence if skip_silence is None else skip_silence
    silence = known.silence_id if silence is None else silence
    if len(streams) != len(known):
      raise InputError(
        f"{source}: has the streams {', '.join(known.names)}; expected as many names, or none"
      )
  tokenizer = _tokenizer(opened, silence, end, model.vocab_size)
  config = Config(
    streams=tuple(streams or _default_streams(opened.shapes)),
    same_row=same_row or "hidden",
    skip_silence=bool(skip_silence),
    model=model,
    data=DataConfig(
      silence=tokenizer.name(tokenizer.silence_id),
      end=end or "",
      end_token=hf.get("msjax", {}).get("end_token", True),
    ),
  )
  stream_set = config.stream_set(tokenizer.silence_id)
  learner = Learner(config, stream_set, tokenizer.vocab_size)
  like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params, place)
  comes_along = STREAM_EMBEDDING in opened
  expected = {k: v for k, v in like.items() if comes_along or k != "stream_embed"}
  unused = check(opened.shapes, expected, str(source))
  params = read_params(opened, expected)
  if not comes_along:
    params["stream_embed"] = _stream_embed(like["stream_embed"], stream_init, seed)
  origin, files = "checkpoint" if comes_along else stream_init, opened.side_files()
  return Checkpoint(config, stream_set, tokenizer, params, origin, unused, files)


def check_target(workdir: WorkDir) -> None:
  """Raises where a checkpoint cannot be imported to without touching what is there."""
  if saved_steps(workdir.checkpoints):
    raise InputError(f"{workdir.path}: holds a run already; choose another work directory")
  is_ours = (workdir.path / ".lock").exists()
  if workdir.path.exists() and not is_ours and any(workdir.path.iterdir()):
    raise InputError(f"{workdir.path}: is not empty; expected a new work directory")


def import_checkpoint(checkpoint: Checkpoint, workdir: WorkDir) -> None:
  """Writes a checkpoint of step 0 into a work directory, for `config.init_from` to start from.

  Raises:
    InputError: a run lies there already, or something else.
    RunError: it cannot be written.
  """
  check_target(workdir)
  tokenizer = str(workdir.path.absolute() / "tokenizer.json")
  with workdir.lock():
    config = checkpoint.config.changed({"data.tokenizer": tokenizer})
    workdir.describe(config, checkpoint.streams, checkpoint.tokenizer)
    workdir.write_hub_files(checkpoint.files)
    save_params(workdir.checkpoints, checkpoint.params)


def _known_streams(hf: Mapping[str, Any], source: pathlib.Path) -> Streams | None:
  """The streams of an export by msjax."""
  try:
    return Streams.from_json(hf["msjax"]) if "msjax" in hf else None
  except (InputError, TypeError, AttributeError) as error:
    raise InputError(f"{source / 'config.json'}: msjax: {error}") from None


def _default_streams(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
  if STREAM_EMBEDDING not in shapes:
    return ("text:output",)
  return tuple(f"s{i}:output" for i in range(shapes[STREAM_EMBEDDING][0]))


def _tokenizer(opened: Folder | Gguf, silence, end: str | None, vocab_size: int) -> Tokenizer:
  try:
    return tokenizer_file.parse(opened.tokenizer_json(), silence, end, vocab_size)
  except InputError as error:
    raise InputError(f"{opened}: {error}") from None


def _stream_embed(like: jax.ShapeDtypeStruct, stream_init: str, seed: int) -> jax.Array:
  """Makes a stream embedding [S, D]."""
  new = jnp.zeros(like.shape)
  if stream_init == "normal":
    new = 0.02 * jax.random.normal(jax.random.key(seed), like.shape)
  return jax.device_put(new, like.sharding)
