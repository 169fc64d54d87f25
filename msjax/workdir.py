"""What lies in a run's work directory, and who may write there.

config.json  streams.json  tokenizer.json  data.json  .lock  .mark
checkpoints/  metrics.jsonl  tensorboard/  report.json  baseline/  hub/
goodput.json  stalls/  profile/
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from msjax.config import Config
from msjax.errors import InputError
from msjax.files import replacing
from msjax.streams import Streams
from msjax.text import tokenizer_file
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import saved_steps

REPORT_VERSION = DATA_VERSION = 1

# Fields that make a run what it is: going on with another value would be another run.
_IDENTITY = (
  "model.",
  "data.",
  "streams",
  "same_row",
  "skip_silence",
  "init_from",
  "train.batch",
  "train.seed",
)
# Fields that may change without a word: how computation is cut, where things lie (data.json tells
# whether the data is the same).
_FREE = (
  "model.remat",
  "mesh.slices",
  "mesh.data",
  "mesh.fsdp",
  "mesh.model",
  "data.on_bad_record",
  "data.train",
  "data.valid",
  "workdir",
)


class WorkDir:
  """Reads and writes the files of a run; checkpoints are Orbax's."""

  def __init__(self, path: str | os.PathLike):
    """Names a directory; nothing is touched yet."""
    if "://" in str(path):
      raise InputError(f"--workdir {path}: expected a directory; other storage is to be mounted")
    self.path = pathlib.Path(path).expanduser()

  @property
  def checkpoints(self) -> pathlib.Path:
    """Where Orbax keeps its steps."""
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    """JSON lines of training and evaluation."""
    return self.path / "metrics.jsonl"

  @property
  def goodput(self) -> pathlib.Path:
    """Where the time went."""
    return self.path / "goodput.json"

  @property
  def stalls(self) -> pathlib.Path:
    """Stacks of processes that hung."""
    return self.path / "stalls"

  @property
  def profile(self) -> pathlib.Path:
    """Traces of the profiler."""
    return self.path / "profile"

  @property
  def _mark(self) -> pathlib.Path:
    return self.path / ".mark"

  @property
  def baseline(self) -> "WorkDir":
    """The work directory of the baseline run."""
    return WorkDir(self.path / "baseline")

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the directory against other trainers; the system lets go when the process ends."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
      raise InputError(f"--workdir {self.path}: is a file; expected a directory") from None
    with open(self.path / ".lock", "a+") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise InputError(
          f"{self.path}: process {owner} is at work there; wait for it or use another directory"
        ) from None
      file.truncate(0)
      file.write(str(os.getpid()))
      file.flush()
      yield

  def mark(self) -> str:
    """Leaves a mark that was never here before, and returns it."""
    mark = uuid.uuid4().hex
    with replacing(self._mark) as file:
      file.write(mark.encode())
    return mark

  def check_shared(self, mark: str, timeout: float = 60) -> None:
    """Checks that this process sees the mark that process 0 has left here.

    Args:
      mark: what `mark` returned there.
      timeout: seconds until what one host writes must be seen by another.
    """
    deadline = time.monotonic() + timeout
    while not self._mark.exists() or self._mark.read_text() != mark:
      if time.monotonic() > deadline:
        raise InputError(
          f"--workdir {self.path}: not the directory in which process 0 has left a mark; expected "
          "one that all hosts share, such as a mounted bucket"
        )
      time.sleep(0.1)

  @property
  def steps_taken(self) -> int:
    """At the latest checkpoint; 0 without one: there is nothing that another run would spoil."""
    return max(saved_steps(self.checkpoints), default=0)

  def claim(
    self,
    config: Config,
    streams: Streams,
    tokenizer: Tokenizer,
    fingerprints: Mapping[str, str],
  ) -> None:
    """Writes what the run is, or checks that it is the run that has begun here.

    Args:
      config: valid.
      streams: with the tokenizer's silence token.
      tokenizer: of the data.
      fingerprints: of the data, by split.
    """
    if 0 in saved_steps(self.checkpoints):
      raise InputError(
        f"--workdir {self.path}: holds an imported model; train in another --workdir, with "
        f"--config.init_from={self.path}"
      )
    data = {"format_version": DATA_VERSION, **fingerprints}
    if self.steps_taken:
      self._check_same(config, streams, tokenizer, data)
    write_json(self.path / "data.json", data)
    self.describe(config, streams, tokenizer)

  def describe(self, config: Config, streams: Streams, tokenizer: Tokenizer) -> None:
    """Writes what a model is, beside its parameters."""
    tokenizer.save(self.path / "tokenizer.json")
    write_json(self.path / "streams.json", streams.to_json())
    write_json(self.path / "config.json", config.to_json())

  def hub_files(self) -> dict[str, bytes]:
    """What came along with the Hugging Face checkpoint that this model was made of, by name."""
    folder = self.path / "hub"
    paths = folder.iterdir() if folder.is_dir() else ()
    return {p.name: p.read_bytes() for p in paths if p.suffix != ".tmp"}  # left by a killed write

  def write_hub_files(self, files: Mapping[str, bytes]) -> None:
    """Keeps these files byte for byte, for an export."""
    for name, content in files.items():
      (self.path / "hub").mkdir(exist_ok=True)
      with replacing(self.path / "hub" / name) as file:
        file.write(content)

  def _check_same(self, config, streams, tokenizer, data) -> None:
    before, now = (_flat(c.to_json()) for c in (self.config(), config))
    for name in sorted(before | now):
      was, value = before.get(name), now.get(name)
      if was == value or name in _FREE:
        continue
      if name.startswith(_IDENTITY):
        raise InputError(
          f"--workdir {self.path}: holds a run with config.{name} = {was!r}, this one has "
          f"{value!r}; use another --workdir, or --config.init_from to start from its parameters"
        )
      logging.info("config.%s: %r until now, %r from here on", name, was, value)
    if self.streams() != streams or self.tokenizer().to_json() != tokenizer.to_json():
      raise InputError(
        f"--workdir {self.path}: its streams.json or tokenizer.json is not this run's; the "
        "training text or the tokenizer file has changed; use another --workdir"
      )
    if config.train.steps < self.steps_taken:
      raise InputError(
        f"config.train.steps: {config.train.steps}, but {self.path} has taken {self.steps_taken}; "
        "expected as many or more"
      )
    before = self._read("data.json")
    if before.get("format_version") != DATA_VERSION:
      raise InputError(
        f"{self.path / 'data.json'}: format_version {before.get('format_version')}, this msjax "
        f"reads {DATA_VERSION}"
      )
    for split in sorted(before | data):
      if before.get(split) != data.get(split):
        raise InputError(
          f"config.data.{split}: not the data with which the run in {self.path} began; use another "
          "--workdir, or --config.init_from to start from its parameters"
        )

  def config(self) -> Config:
    """Reads config.json."""
    return Config.from_json(self._read("config.json"))

  def streams(self) -> Streams:
    """Reads streams.json."""
    return Streams.from_json(self._read("streams.json"))

  def tokenizer(self) -> Tokenizer:
    """Reads tokenizer.json; its silence token is the one in streams.json."""
    return tokenizer_file.load(
      self.path / "tokenizer.json",
      silence=self.streams().silence_id,
      end=self.config().data.end or None,
      vocab_size=self.config().model.vocab_size,
    )

  def report(self) -> dict[str, Any]:
    """Reads report.json."""
    return self._read("report.json")

  def write_report(self, figures: dict[str, Any]) -> None:
    """Writes report.json."""
    write_json(self.path / "report.json", {"format_version": REPORT_VERSION, **figures})

  def _read(self, name: str) -> dict[str, Any]:
    path = self.path / name
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
      raise InputError(f"{path}: not found; is {self.path} the work directory of a run?") from None
    except json.JSONDecodeError as error:
      raise InputError(f"{path}:{error.lineno}: is no JSON: {error.msg}") from None


def write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  with replacing(path) as file:
    file.write(json.dumps(data, indent=2).encode() + b"\n")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts -> dotted names; lists -> tuples."""
  flat = {}
  for name, value in data.items():
    if isinstance(value, dict):
      flat.update(_flat(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = tuple(value) if isinstance(value, list) else value
  return flat
