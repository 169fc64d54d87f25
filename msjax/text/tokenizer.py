"""Text to cells and back: one cell is one token, and no text ever becomes a special token.

`Tokenizer` is the face of them all. A tokenizer says which UTF-8 bytes a token stands for, and
everything that shows text is made of those bytes, so a stream decoded token by token reads exactly
as if decoded at once. `ByteTokenizer` is the one built in.
"""

import abc
import codecs
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from msjax.errors import InputError
from msjax.files import replacing
from msjax.streams import HOLE

FORMAT_VERSION = 1
BYTES_TYPE = "msjax-bytes"
SILENCE, PAD, END = SPECIALS = ("<silence>", "<pad>", "<end>")
SILENCE_CELL = "·"  # unlike the "-" of the official release, nobody types it


def printable(text: str) -> str:
  """Returns a text with all that is not printable escaped, as `\\n`."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unicode_text(text: str) -> str:
  """Returns the text; InputError if it holds half a surrogate pair, as text from JSON can."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise InputError(
      f"text has {text[e.start]!r} at character {e.start}, half of a surrogate pair; "
      f"expected Unicode text"
    ) from None
  return text


def json_path(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a file, or of tokenizer.json in a directory."""
  path = pathlib.Path(path)
  return path / "tokenizer.json" if path.is_dir() else path


class StreamDecoder:
  """Text of one stream, token by token: a character comes out once all its bytes are in."""

  # tokenizers.decoders.DecodeStream cannot end a text, and keeps back a U+FFFD that belongs to it.

  def __init__(self, tokenizer: "Tokenizer"):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._first = True

  def push(self, id: int) -> str:
    """Returns the text that this cell completes: "" for a hole, a special or half a character."""
    if not self._tokenizer.is_text(id):
      return ""
    text = self._utf8.decode(self._tokenizer.text_bytes(id, self._first))
    self._first = False
    return text

  def flush(self) -> str:
    """Ends the text: returns U+FFFD for a character that was left incomplete, else ""."""
    return self._utf8.decode(b"", final=True)


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  Attributes:
    vocab_size: every id is below it; tokens added to the vocabulary count.
    silence_id: "nothing said in this row"; no text encodes to it.
    pad_id: fills what is no part of any text.
    end_id: ends a message.
    special_ids: ids that stand for no text: these three, further specials, ids without a token.
    silence_collisions: how often text held the silence token and was encoded around it.
  """

  vocab_size: int
  silence_id: int
  pad_id: int
  end_id: int
  special_ids: frozenset[int]
  silence_collisions: int = 0

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, none of them special; InputError if there are none for it."""

  @abc.abstractmethod
  def text_bytes(self, id: int, first: bool = False) -> bytes:
    """Returns the UTF-8 bytes of a text token; `first`: as the first of its stream."""

  @abc.abstractmethod
  def name(self, id: int) -> str:
    """Returns what the vocabulary calls a token."""

  @abc.abstractmethod
  def to_json(self) -> str:
    """Returns what `tokenizer.json` holds, for `tokenizer_file` to read."""

  def is_text(self, id: int) -> bool:
    """Whether a cell holds text: no hole, no special token. InputError outside the vocabulary."""
    if not HOLE <= id < self.vocab_size:
      raise InputError(
        f"token id {id} is outside the vocabulary of size {self.vocab_size}; "
        f"expected 0 to {self.vocab_size - 1}, or {HOLE} for a hole"
      )
    return id != HOLE and operator.index(id) not in self.special_ids

  def stream_decoder(self) -> StreamDecoder:
    """Returns what turns one stream's cells into text as they come."""
    return StreamDecoder(self)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of one stream's cells, holes and special tokens skipped."""
    decoder = self.stream_decoder()
    return "".join(map(decoder.push, ids)) + decoder.flush()

  def byte_length(self, id: int) -> int:
    """Returns how many UTF-8 bytes of text a cell stands for: 0 for holes and special tokens."""
    return len(self.text_bytes(id)) if self.is_text(id) else 0

  def cell_text(self, id: int) -> str:
    """Returns a cell as a table shows it: printable, "" only for a hole, "·" for silence."""
    if self.is_text(id):
      text = self.text_bytes(id).decode(errors="backslashreplace")
      text = text if text.strip(" ") else text.replace(" ", "␣")
    elif id == HOLE:
      text = ""
    else:
      text = SILENCE_CELL if id == self.silence_id else self.name(id)
    return printable(text)

  def save(self, path: str | os.PathLike) -> None:
    """Writes `to_json` to a file, or to tokenizer.json in a directory; all of it or nothing."""
    path = json_path(path)
    with replacing(path) as file:
      file.write(self.to_json().encode())


class ByteTokenizer(Tokenizer):
  """256 bytes, then <silence>, <pad>, <end>, then the added tokens.

  An added token is one cell wherever its text occurs: leftmost first, of several the longest.
  """

  silence_id, pad_id, end_id = range(256, 259)
  special_ids = frozenset((silence_id, pad_id, end_id))

  def __init__(self, added: Sequence[str] = ()):
    """Raises InputError for an added token that is empty, doubled or special."""
    for i, token in enumerate(added):
      if not token or token in SPECIALS or token in added[:i]:
        raise InputError(
          f"added token {token!r}: expected text that is not empty, stands once, "
          f"and is none of {', '.join(SPECIALS)}"
        )
    self.added = tuple(added)
    self._bytes = [bytes([b]) for b in range(256)]
    self._bytes += [s.encode() for s in (*SPECIALS, *map(unicode_text, added))]
    self.vocab_size = len(self._bytes)
    self._ids = {token: self.end_id + 1 + i for i, token in enumerate(added)}
    longest_first = sorted(map(re.escape, added), key=len, reverse=True)
    self._added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

  def encode(self, text: str) -> list[int]:
    """Returns one id a byte, or one an added token."""
    ids = []
    for part in self._added_pattern.split(unicode_text(text)):
      ids += [self._ids[part]] if part in self._ids else part.encode()
    return ids

  def text_bytes(self, id: int, first: bool = False) -> bytes:
    """Returns the bytes of a token, the same wherever it stands."""
    return self._bytes[id]

  def name(self, id: int) -> str:
    """Returns a token as text."""
    return self._bytes[id].decode(errors="backslashreplace")

  def to_json(self) -> str:
    """Returns the added tokens as JSON of msjax's own."""
    return json.dumps(
      {"format_version": FORMAT_VERSION, "type": BYTES_TYPE, "added": list(self.added)}
    )

  @classmethod
  def from_json(cls, data: dict) -> "ByteTokenizer":
    """Reads what `to_json` wrote, parsed."""
    version, added = data.get("format_version"), data.get("added")
    if version != FORMAT_VERSION:
      raise InputError(
        f"format_version {json.dumps(version)}, this msjax reads {FORMAT_VERSION} of {BYTES_TYPE}"
      )
    if not isinstance(added, list) or not all(isinstance(token, str) for token in added):
      raise InputError(f"added: {json.dumps(added)}; expected a list of texts")
    return cls(added)
