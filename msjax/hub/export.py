"""A trained run becomes a Hugging Face folder, one tensor in memory at a time."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import tokenizers

import msjax
from msjax.config import Config
from msjax.errors import InputError, RunError, nearest
from msjax.hub import card
from msjax.hub.config import to_hf
from msjax.hub.names import EMBEDDING, HEAD, STREAM_EMBEDDING, part_of, tensors
from msjax.hub.weights import INDEX, Part, write_safetensors
from msjax.streams import Streams
from msjax.text.hf_tokenizer import HfTokenizer, hf_json, release_silence
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import chosen, open_params
from msjax.training.state import Params
from msjax.workdir import WorkDir, write_json

LAYOUTS = ("stream", "folded", "reference")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FORMAT_VERSION = 1
MANIFEST = "msjax_manifest.json"
_REMOTE_CODE = pathlib.Path(__file__).with_name("modeling_msjax.py")
# Of the config.json of what the run was made of.
_KEPT = ("max_position_embeddings", "bos_token_id", "initializer_range")


class Exportable(Protocol):
  """A run: a `Model`, or a `Run` whose parameters still lie on disk."""

  config: Config
  streams: Streams
  tokenizer: Tokenizer
  params: Params


class Run(NamedTuple):
  """A run on disk, at a checkpoint of so many steps."""

  step: int
  config: Config
  streams: Streams
  tokenizer: Tokenizer
  params: Params


def open_run(workdir: WorkDir, step: int | str = "latest") -> Run:
  """Opens a run; its parameters are read as they are asked for."""
  step = chosen(workdir.checkpoints, step)
  params = open_params(workdir.checkpoints, step)
  return Run(step, workdir.config(), workdir.streams(), workdir.tokenizer(), params)


def export(
  run: Exportable,
  target: pathlib.Path,
  *,
  layout: str = "stream",
  stream: str | None = None,
  dtype: str = "bfloat16",
  shard_bytes: int = 5 * 10**9,
  files: Mapping[str, bytes] = types.MappingProxyType({}),
  step: int | None = None,
) -> None:
  """Writes a folder; it gets its name when all of it is written.

  Args:
    run: what to export.
    target: a folder that does not exist.
    layout: `stream`: every family's own tensors and the stream embedding beside them, which loads
      in transformers as a plain model, and with `trust_remote_code` as one that has streams;
      `folded`: a plain model that speaks one stream; `reference`: what the official release loads.
    stream: that of `folded`.
    dtype: of the tensors, `float32` or `bfloat16`.
    shard_bytes: of one file, at most; a tensor is never cut.
    files: what lay beside the tensors that the run was made of, by name; kept as it was.
    step: steps taken, for the manifest.

  Raises:
    InputError: the target exists, or no folder of this layout computes what the run does.
    RunError: the folder cannot be written; nothing is left of it.
  """
  if target.exists():
    raise InputError(f"{target}: exists; expected the name of a folder to make")
  if dtype not in DTYPES:
    raise InputError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}{nearest(dtype, DTYPES)}")
  _check_layout(run, layout, stream)
  parts, hf = _parts(run, layout, stream), _config(run, layout, files)
  temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
  temporary.mkdir(parents=True)
  try:
    _write_weights(parts, temporary, DTYPES[dtype], shard_bytes)
    write_json(temporary / "config.json", hf | {"dtype": dtype, "torch_dtype": dtype})
    write_json(temporary / "generation_config.json", _generation(run.tokenizer, files))
    for name, content in _tokenizer_files(run.tokenizer, files).items():
      (temporary / name).write_bytes(content)
    if layout == "stream":
      shutil.copyfile(_REMOTE_CODE, temporary / _REMOTE_CODE.name)
    (temporary / "README.md").write_text(_card(run, layout, stream, files, step), encoding="utf-8")
    made = {"layout": layout, "stream": stream, "dtype": dtype, "step": step}
    write_json(temporary / MANIFEST, _manifest(temporary, made))
    os.rename(temporary, target)
  except BaseException as error:
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(error, OSError):
      raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error
    raise


def _parts(run: Exportable, layout: str, stream: str | None) -> list[Part]:
  """The tensors of a layout, by name."""
  parts = {
    t.name: Part(t.name, t.shape, functools.partial(_tensor, run.params, t))
    for t in tensors(run.params)
  }
  if layout == "folded":
    row = np.asarray(run.params["stream_embed"][run.streams.id(stream)])
    embed = parts[EMBEDDING]
    parts.setdefault(HEAD, embed._replace(name=HEAD))  # a tied head is not folded into
    parts[EMBEDDING] = embed._replace(read=lambda: embed.read() + row)
    del parts[STREAM_EMBEDDING]
  if layout == "reference":  # the release has a norm there whatever it computes
    for i in range(run.config.model.layers):
      name, D = f"model.layers.{i}.self_attn.gate_in_norm.weight", run.config.model.dim
      parts[name] = Part(name, (D,), lambda D=D: np.ones(D, np.float32))
  return sorted(parts.values(), key=lambda part: part.name)


def _tensor(params: Params, tensor) -> np.ndarray:
  return tensor.to_hf(part_of(params, tensor))


def _config(run: Exportable, layout: str, files: Mapping[str, bytes]) -> dict[str, Any]:
  """config.json, but for the dtype."""
  source = _json(files, "config.json")
  hf = to_hf(run.config.model, run.tokenizer.vocab_size)
  hf |= {name: source[name] for name in _KEPT if source.get(name) is not None}
  hf |= {"eos_token_id": run.tokenizer.end_id, "pad_token_id": run.tokenizer.pad_id}
  if layout == "folded":
    return hf | {"tie_word_embeddings": False}
  hf |= {"num_channels": len(run.streams), "channel_embedding_method": "additive"}
  hf |= {"msjax": {**run.streams.to_json(), "end_token": run.config.data.end_token}}
  if layout == "reference":
    return hf | {"role_gating_enabled": False, "medusa_num_heads": 0, "medusa_num_layers": 0}
  stream_class = f"{_REMOTE_CODE.stem}.Stream{hf['architectures'][0]}"
  return hf | {"auto_map": {"AutoModelForCausalLM": stream_class}}


def _check_layout(run: Exportable, layout: str, stream: str | None) -> None:
  """Raises where a folder of this layout would be another model than the run."""
  if layout not in LAYOUTS:
    raise InputError(f"layout {layout!r}: expected {', '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
  if (stream is not None) != (layout == "folded"):
    names = ", ".join(run.streams.names)
    raise InputError(
      f"--stream: not given; layout folded speaks one of {names}"
      if stream is None
      else f"--stream: {stream!r}, but layout {layout} holds all streams; leave it out"
    )
  if layout == "folded" and run.streams.skip_silence:
    raise InputError("layout folded: the run has skip_silence; no plain model hides silence")
  if layout == "reference":
    _check_reference(run)


def _check_reference(run: Exportable) -> None:
  """Raises where the official release would load the folder and compute something else."""
  family = to_hf(run.config.model, run.tokenizer.vocab_size)["model_type"]
  if family != "qwen3":
    raise InputError(f"layout reference: a {family} model; the official release loads qwen3 only")
  if run.streams.same_row != "hidden" or run.streams.skip_silence:
    raise InputError(
      f"layout reference: same_row={run.streams.same_row}, skip_silence="
      f"{run.streams.skip_silence}; the official release computes hidden and False; "
      "train with --config.same_row=hidden"
    )
  silence, tokenizer = run.tokenizer.silence_id, run.tokenizer
  is_hf = isinstance(tokenizer, HfTokenizer)
  if not is_hf or release_silence(tokenizers.Tokenizer.from_str(tokenizer.to_json())) != silence:
    raise InputError(
      f"layout reference: silence is {tokenizer.name(silence)!r}, but the official release takes "
      "the first token of ' -' or '-'; expected a model trained with that"
    )


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """What a file of the source says; nothing where there is none."""
  try:
    return json.loads(files.get(name, b"{}"))
  except ValueError as error:
    raise InputError(
      f"{name} of the imported checkpoint is no JSON: {error}; mend it in the work directory's hub/"
    ) from None


def _generation(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, Any]:
  """generation_config.json: the source's, and what ended messages in training ends a text."""
  source = _json(files, "generation_config.json")
  before = source.get("eos_token_id", _json(files, "config.json").get("eos_token_id"))
  before = before if isinstance(before, list) else [] if before is None else [before]
  ends = dict.fromkeys([tokenizer.end_id, *before])
  return {**source, "eos_token_id": list(ends), "pad_token_id": tokenizer.pad_id}


def _tokenizer_files(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> dict[str, bytes]:
  """The tokenizer's files: the source's byte for byte; the chat template wherever it is sought."""
  others = ("README.md", "config.json", "generation_config.json")
  kept = {name: content for name, content in files.items() if name not in others}
  kept["tokenizer.json"] = hf_json(tokenizer).encode()
  config = _json(files, "tokenizer_config.json")
  template = kept.get("chat_template.jinja", b"").decode() or config.get("chat_template")
  changed = {}
  if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"  # which every version knows
  if not config:
    changed["eos_token"] = tokenizer.name(tokenizer.end_id)
    changed["pad_token"] = tokenizer.name(tokenizer.pad_id)
  if isinstance(template, str):
    kept["chat_template.jinja"] = template.encode()
    if config.get("chat_template") != template:
      changed["chat_template"] = template
  if changed:
    kept["tokenizer_config.json"] = json.dumps({**config, **changed}, indent=2).encode()
  return kept


def _card(
  run: Exportable, layout: str, stream: str | None, files: Mapping[str, bytes], step: int | None
) -> str:
  reading = [*run.streams.of_kind("input"), 0][0]
  training = run.config.to_json()
  parts = ("same_row", "skip_silence", "loss", "optim", "train") if step else ()
  return card.write(
    card.license_of(files.get("README.md", b"")),
    layout,
    run.streams,
    stream or run.streams.names[reading],
    {name: training[name] for name in parts},
  )


def _write_weights(
  parts: Sequence[Part], folder: pathlib.Path, dtype: np.dtype, shard_bytes: int
) -> None:
  """Writes shards and their index."""
  shards = list(_shards(parts, dtype, shard_bytes))
  where: dict[str, str] = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    write_safetensors(folder / file, shard, dtype)
    where |= dict.fromkeys((part.name for part in shard), file)
  total = sum(part.nbytes(dtype) for part in parts)
  metadata = {"total_size": total, "total_parameters": total // dtype.itemsize}
  write_json(folder / INDEX, {"metadata": metadata, "weight_map": where})


def _shards(parts: Sequence[Part], dtype: np.dtype, limit: int) -> Iterator[list[Part]]:
  """Deals tensors out in their order, each shard as large as it may be."""
  shard: list[Part] = []
  size = 0
  for part in parts:
    if shard and size + part.nbytes(dtype) > limit:
      yield shard
      shard, size = [], 0
    shard.append(part)
    size += part.nbytes(dtype)
  yield shard


def _manifest(folder: pathlib.Path, made: Mapping[str, Any]) -> dict[str, Any]:
  """What was written, how and by whom, with a digest of every file."""
  digests = {}
  for path in sorted(folder.iterdir()):
    with open(path, "rb") as file:
      digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return {
    "format_version": FORMAT_VERSION,
    "msjax": msjax.__version__,
    "commit": _commit(),
    **made,
    "sha256": digests,
  }


def _commit() -> str | None:
  """The commit of the checkout that this code lies in, if it does."""
  here = pathlib.Path(__file__)
  try:
    _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return _git(here.parent, "rev-parse", "HEAD")
  except (OSError, subprocess.CalledProcessError):
    return None


def _git(folder: pathlib.Path, *words: str) -> str:
  command = ["git", "-C", folder, *words]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
