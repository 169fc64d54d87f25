"""When a session ends."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax.decoding.sampling import Past
from msjax.errors import InputError
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import StreamDecoder

_NO_ID = -4  # of no token, hole, or mark
_NO_LIMIT = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Stop:
  """When a session ends; it ends with the row in which one of these first holds.

  Rows that were read as a block, such as a prompt, end nothing.

  Attributes:
    rows: it has so many; None: when the context is full.
    end_id: a token that ends it, in the streams of `end_streams`.
    end_streams: names.
    silent_rows: so many rows in a row in which no stream spoke; 0: never.
    tokens: a stream has spoken so many, by name.
    texts: a stream has said one of these, by name; tokens may cut them anywhere.
  """

  rows: int | None = None
  end_id: int | None = None
  end_streams: Sequence[str] = ()
  silent_rows: int = 0
  tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
  texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def check(self, who: str, streams: Streams) -> None:
    """Refuses unknown streams and what never or always holds."""
    if isinstance(self.end_streams, str):
      raise InputError(f"{who}: stop.end_streams: {self.end_streams!r}; expected a tuple of names")
    if (self.end_id is None) == bool(self.end_streams):
      raise InputError(
        f"{who}: stop.end_id: {self.end_id}, and stop.end_streams: {self.end_streams}; expected "
        "both or neither"
      )
    for name in (*self.end_streams, *self.tokens, *self.texts):
      streams.id(name)
    if self.rows is not None and self.rows < 1:
      raise InputError(f"{who}: stop.rows: {self.rows}; expected 1 or more")
    if self.silent_rows < 0:
      raise InputError(f"{who}: stop.silent_rows: {self.silent_rows}; expected 0 (never) or more")
    for name, most in self.tokens.items():
      if most < 1:
        raise InputError(f"{who}: stop.tokens: {most} of stream {name!r}; expected 1 or more")
    for name, texts in self.texts.items():
      if isinstance(texts, str) or not texts or not all(texts):
        raise InputError(
          f"{who}: stop.texts: {texts!r} of stream {name!r}; expected a list of texts, none empty"
        )


class Ending:
  """What a session's rows have said so far about its end."""

  def __init__(
    self, stop: Stop, streams: Streams, decoder: Callable[[], StreamDecoder] | None = None
  ):
    """Nothing has been said; `decoder` makes text of a stream's tokens, for `Stop.texts`."""
    self.stop, self._streams = stop, streams
    self.silent_rows = 0
    self.spoken = np.zeros(len(streams), int)
    # By stream: its decoder, and the last of its text, as much as a text to come may begin with.
    self._said = {streams.id(name): (decoder(), "") for name in stop.texts}

  def after(self, row: np.ndarray, rows: int) -> str | None:
    """Takes a row int32 [S], the last of so many; returns why the session ends, or None."""
    spoke = (row != self._streams.silence_id) & (row != HOLE)
    self.spoken += spoke
    self.silent_rows = 0 if spoke.any() else self.silent_rows + 1
    stop, id = self.stop, self._streams.id
    if any(row[id(name)] == stop.end_id for name in stop.end_streams):
      return "end token"
    if self._hears_text(row):
      return "text"
    if stop.silent_rows and self.silent_rows >= stop.silent_rows:
      return "silence"
    if any(self.spoken[id(name)] >= most for name, most in stop.tokens.items()):
      return "tokens"
    if stop.rows is not None and rows >= stop.rows:
      return "rows"
    return None

  def _hears_text(self, row: np.ndarray) -> bool:
    heard = False
    for s, (decoder, before) in self._said.items():
      texts = self.stop.texts[self._streams.names[s]]
      said = before + decoder.push(int(row[s]))
      heard |= any(text in said for text in texts)
      longest = max(map(len, texts))
      self._said[s] = decoder, said[len(said) - longest + 1 :] if len(said) >= longest else said
    return heard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
  """How far sessions may go without being looked at: what of `Stop` needs no text.

  Attributes:
    rows: int32 [B], how many they may be fed.
    end_id: int32 [B].
    end_streams: bool [B, S].
    silent: int32 [B], silent rows in a row so far.
    silent_rows: int32 [B], how many end it.
    tokens: int32 [B, S], how many a stream may still speak.
  """

  rows: Any
  end_id: Any
  end_streams: Any
  silent: Any
  silent_rows: Any
  tokens: Any

  @classmethod
  def of(cls, endings: Sequence[Ending | None], rows: np.ndarray, streams: Streams) -> "Limits":
    """Lines them up; None for a place without a session."""
    B, S = len(endings), len(streams)
    end_id, end_streams = np.full(B, _NO_ID, np.int32), np.zeros((B, S), bool)
    silent, silent_rows = np.zeros(B, np.int32), np.full(B, _NO_LIMIT, np.int32)
    tokens = np.full((B, S), _NO_LIMIT, np.int32)
    for b, ending in enumerate(endings):
      if ending is None:
        continue
      stop = ending.stop
      end_id[b] = _NO_ID if stop.end_id is None else stop.end_id
      end_streams[b, [streams.id(name) for name in stop.end_streams]] = True
      silent[b] = ending.silent_rows
      silent_rows[b] = stop.silent_rows or _NO_LIMIT
      for name, most in stop.tokens.items():
        s = streams.id(name)
        tokens[b, s] = most - ending.spoken[s]
    return cls(rows.astype(np.int32), end_id, end_streams, silent, silent_rows, tokens)

  def after(self, row: jax.Array, before: Past, past: Past) -> "Limits":
    """What is left after a row int32 [B, S] that turned one past into another; see `Past`."""
    spoke = past.spoken > before.spoken
    ended = (self.end_streams & (row == self.end_id[:, None])).any(1)
    silent = jnp.where(spoke.any(1), 0, self.silent + 1)
    tokens = self.tokens - spoke
    ended |= (silent >= self.silent_rows) | (tokens <= 0).any(1)
    rows = jnp.where(ended, 0, self.rows - 1)
    return dataclasses.replace(self, rows=rows, silent=silent, tokens=tokens)
