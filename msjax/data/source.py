"""Random access to examples: every record of files or of memory, checked and tokenised at once.

Tokens are held as one int32 array, so a corpus takes eight bytes a cell, and a record that is wrong
shows before training starts.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from msjax.data.formats import BadRecords, Record, read
from msjax.data.layout import Layout, to_table
from msjax.errors import InputError
from msjax.streams import Streams
from msjax.text.tokenizer import Tokenizer


class Example(NamedTuple):
  """One grid.

  Attributes:
    tokens: int32 [R, S] by stream id, -1 is a hole.
    weights: float32 [R, S], the data's own loss weight of the cell that is predicted.
  """

  tokens: np.ndarray
  weights: np.ndarray


class RecordSource:
  """Examples made of records of any level; `source[i]` is an `Example` of at most `max_rows` rows.

  Records longer than that are cut into successive windows.

  Attributes:
    bad: the records that were left out, and why.
  """

  def __init__(
    self,
    records: Iterable[Record],
    streams: Streams,
    tokenizer: Tokenizer,
    layout: Layout,
    max_rows: int,
    bad: BadRecords | None = None,
    name: str = "data",
  ):
    """Reads, checks and tokenises every record.

    Args:
      records: of any level, mixed as they come.
      streams: of the run; they order the columns.
      tokenizer: for messages and spans; its vocabulary bounds the ids of tables.
      layout: of messages.
      max_rows: the longest example, 2 or more.
      bad: what to do with wrong records; by default the first raises `RecordError`.
      name: of the whole, for messages.

    Raises:
      RecordError: a record is wrong.
      InputError: no record is left.
    """
    if max_rows < 2:
      raise InputError(f"max_rows: {max_rows}; expected 2 or more, a row and one that it predicts")
    self.bad = bad or BadRecords()
    tokens, weights, lengths, self._ids, long = [], [], [], [], 0
    for record in records:
      with self.bad.caught():
        table = to_table(record, streams, tokenizer, layout)
        id = record.id or str(record.where)
        starts = range(0, len(table.tokens), max_rows)
        tokens.append(table.tokens)
        weights.append(table.weights)
        lengths += [min(max_rows, len(table.tokens) - start) for start in starts]
        self._ids += [id, *(f"{id}#{window}" for window in range(2, len(starts) + 1))]
        long += len(starts) > 1
    if not tokens:
      raise InputError(f"{name}: no record is left, {len(self.bad.messages)} were bad")
    if self.bad.messages:
      logging.warning("%d bad records are left out", len(self.bad.messages))
    if long:
      logging.info("%d of %d records are cut into windows of %d rows", long, len(tokens), max_rows)
    self._tokens, self._weights = np.concatenate(tokens), np.concatenate(weights)
    self._tokens.flags.writeable = self._weights.flags.writeable = False
    self._bounds = np.cumsum([0, *lengths])

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self._ids)

  def __getitem__(self, index: int) -> Example:
    """Returns one example; a view that cannot be written to."""
    index = range(len(self))[index]
    rows = slice(self._bounds[index], self._bounds[index + 1])
    return Example(self._tokens[rows], self._weights[rows])

  def length(self, index: int) -> int:
    """Returns the number of rows of an example."""
    return int(self._bounds[index + 1] - self._bounds[index])

  def record_id(self, index: int) -> str:
    """Names an example: the record's id or `file:line`, with `#2` for its second window."""
    return self._ids[index]

  @property
  def fingerprint(self) -> str:
    """Digest of every example: the same where the data is the same, in whatever file it lies."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (self._bounds, self._tokens, self._weights):
      digest.update(array)
    return digest.hexdigest()


class JsonlSource(RecordSource):
  """Examples of JSONL files."""

  def __init__(
    self,
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    streams: Streams,
    tokenizer: Tokenizer,
    layout: Layout,
    max_rows: int,
    on_bad_record: str = "stop",
  ):
    """Reads one file or several; the other arguments as for `RecordSource`."""
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    bad, name = BadRecords(on_bad_record), ", ".join(map(str, paths))
    super().__init__(_read_all(paths, bad), streams, tokenizer, layout, max_rows, bad, name)


def _read_all(paths: Sequence[str | os.PathLike], bad: BadRecords) -> Iterator[Record]:
  for path in paths:
    for _, record in read(path, bad):
      yield record
