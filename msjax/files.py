"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from msjax.errors import InputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a file that takes the name `path` when the block ends well, and vanishes otherwise."""
  final = os.path.realpath(path)
  if os.path.exists(final) and not os.path.isfile(final):
    raise InputError(f"{path}: is no regular file; expected the name of a file to write")
  temporary = f"{final}.{os.getpid()}.tmp"
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, final)
  except OSError as error:
    raise InputError(f"{path}: cannot be written: {error.strerror}") from error
  finally:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.unlink(temporary)
