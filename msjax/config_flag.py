"""The flag `--config=FILE --config.FIELD=VALUE`, and plain words about what is wrong with it."""

import dataclasses
import os
import typing

from absl import flags
from ml_collections import config_flags

from msjax.config import Config, nested_dataclass
from msjax.errors import InputError, nearest

_PREFIX = "--config."
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


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
    value = value if given else following
    if name == "--config" and not os.path.isfile(value.partition(":")[0]):
      raise InputError(
        f"--config: {value!r} is no file; expected one such as configs/quickstart.py"
      )
    if name.startswith(_PREFIX):
      _check_field(name.removeprefix(_PREFIX), value)


def _check_field(name: str, value: str) -> None:
  """Walks down the config tree along a dotted name; checks the value against the leaf's type."""
  owner, hint = Config, Config
  parts = name.split(".")
  for depth, part in enumerate(parts):
    owner = nested_dataclass(hint)
    if owner is None:
      raise InputError(f"--config.{name}: config.{'.'.join(parts[:depth])} has no fields")
    hints = typing.get_type_hints(owner)
    if part not in hints:
      fields = [f.name for f in dataclasses.fields(owner)]
      known = nearest(part, fields) or f"; there are {', '.join(fields)}"
      raise InputError(f"--config.{name}: no such field as {part!r}{known}")
    hint = hints[part]
  if hint not in (int, float, bool, str) and typing.get_origin(hint) is not tuple:
    raise InputError(f"--config.{name}: can only be set in the config file")
  if hint is not str and not _is_a(hint, value):
    raise InputError(
      f"--config.{name}: {value!r} is not {_EXPECTED.get(hint, 'a tuple')}"
      + ("" if hint in _EXPECTED else "; expected words in quotes, as in \"('a', 'b')\"")
    )


def _is_a(hint, value: str) -> bool:
  if hint is bool:
    return value.lower() in ("true", "false", "t", "f", "1", "0") or value.startswith("--")
  if hint in (int, float):
    try:
      hint(value)
    except ValueError:
      return False
    return True
  return value.startswith("(") and value.endswith(")")
