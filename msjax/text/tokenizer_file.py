"""Reads a tokenizer.json of either kind: Hugging Face's or msjax's own."""

import json
import os

from msjax.errors import InputError
from msjax.text.hf_tokenizer import HfTokenizer
from msjax.text.tokenizer import BYTES_TYPE, END, SILENCE, ByteTokenizer, Tokenizer, json_path


def parse(
  text: str,
  silence: str | int | None = None,
  end: str | None = None,
  vocab_size: int = 0,
) -> Tokenizer:
  """Returns the tokenizer that a tokenizer.json describes.

  Args:
    text: what the file holds.
    silence: as for `HfTokenizer`; byte tokenizers have their own.
    end: as for `HfTokenizer`; byte tokenizers have their own.
    vocab_size: as for `HfTokenizer`; byte tokenizers have their own.

  Raises:
    InputError: the text is no tokenizer, or the choice of tokens does not fit it.
  """
  try:
    data = json.loads(text)
  except ValueError as e:
    raise InputError(f"not JSON: {e}") from None
  if not isinstance(data, dict) or data.get("type") != BYTES_TYPE:
    return HfTokenizer(text, silence, end, vocab_size)
  if silence not in (None, SILENCE, ByteTokenizer.silence_id) or end not in (None, END):
    raise InputError(f"silence={silence!r}, end={end!r}: byte tokenizers have {SILENCE}, {END}")
  return ByteTokenizer.from_json(data)


def load(
  path: str | os.PathLike,
  silence: str | int | None = None,
  end: str | None = None,
  vocab_size: int = 0,
) -> Tokenizer:
  """Reads a tokenizer from a file, or from tokenizer.json in a directory; the rest as for `parse`.

  Raises:
    InputError: names the file and what is wrong with it.
  """
  path = json_path(path)
  try:
    return parse(path.read_bytes().decode(), silence, end, vocab_size)
  except OSError as e:
    raise InputError(
      f"{path}: {e.strerror}; expected a tokenizer.json or a directory that holds one"
    ) from None
  except UnicodeDecodeError as e:
    raise InputError(f"{path}: not JSON: {e}") from None
  except InputError as e:
    raise InputError(f"{path}: {e}") from None
