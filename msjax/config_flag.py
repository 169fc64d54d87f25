"""The flag `--config=FILE --config.FIELD=VALUE`, and plain words about what is wrong with it."""

import os
import pathlib
import types
from typing import Any

from absl import flags
from ml_collections import config_flags

from msjax.config import TYPE_WORDS, Config, field_type
from msjax.errors import InputError

_PREFIX = "--config."


def define() -> flags.FlagHolder:
  """Declares `--config`; call it where a command's module defines its flags."""
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Python file whose get_config() returns a msjax Config; --config.FIELD=VALUE changes a field",
    lock_config=True,
  )


def resolve(flag: flags.FlagHolder) -> Config:
  """Returns the parsed and validated config."""
  config = flag.value
  if config is None:
    raise InputError("--config: not given; expected a file, as in --config=configs/quickstart.py")
  if not isinstance(config, Config):
    raise InputError(
      f"--config: get_config() returned {type(config).__name__}; expected a msjax.config.Config"
    )
  config.validate()
  return config


def check(argv: list[str]) -> None:
  """Checks `--config=FILE` and every `--config.FIELD=VALUE` before anything is parsed.

  Raises:
    InputError: no such file, no such field (the nearest one is named), a value of another type.
  """
  for word, following in zip(argv[1:], [*argv[2:], ""]):
    name, given, value = word.partition("=")
    name = f"--{name.lstrip('-')}" if name.startswith("-") else name
    value = value if given else following
    if name == "--config":
      _check_file(value.partition(":")[0])
    if name.startswith(_PREFIX):
      hint = _settable_type(name.removeprefix(_PREFIX))
      if given or hint is not bool:  # such a flag alone means true
        _check_value(name, hint, value)


def _check_file(path: str) -> None:
  """Checks that a file is Python and defines get_config."""
  if not os.path.isfile(path):
    raise InputError(f"--config: {path!r} is no file; expected one such as configs/quickstart.py")
  source = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  try:
    compile(source, path, "exec")
  except SyntaxError as error:
    raise InputError(f"{path}:{error.lineno}: {error.msg}") from None
  if "get_config" not in source:
    raise InputError(f"--config: {path} has no get_config(); expected one that returns a Config")


def _settable_type(name: str) -> Any:
  """Returns the type of a dotted field; no group of fields, and in none that may be absent."""
  hint, owner = field_type(name), name.rpartition(".")[0]
  absent = owner and isinstance(field_type(owner), types.UnionType)
  if absent or hint not in TYPE_WORDS:
    raise InputError(f"--config.{name}: can only be set in the config file")
  return hint


def _check_value(flag: str, hint: Any, value: str) -> None:
  if not _reads_as(hint, value):
    raise InputError(f"{flag}: {value!r} is not {TYPE_WORDS[hint]}")


def _reads_as(hint: Any, value: str) -> bool:
  if hint is str:
    return True
  if hint is bool:
    return value.lower() in ("true", "false", "t", "f", "1", "0")
  if hint in (int, float):
    try:
      hint(value)
    except ValueError:
      return False
    return True
  return value.startswith("(") and value.endswith(")")
