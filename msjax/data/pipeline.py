"""From a source of examples to batches: shuffled by seed, sharded by process, padded or packed.

The iterator's position is a checkpointable; restored, it goes on with the very next batch.
"""

from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from msjax.data.source import Example
from msjax.errors import InputError
from msjax.streams import HOLE

Batch = dict[str, np.ndarray]
SPLITS = ("train", "valid")


class Source(Protocol):
  """Random access to examples."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def __getitem__(self, index: int) -> Example:
    """Returns one example."""
    ...

  def record_id(self, index: int) -> str:
    """Names an example for messages."""
    ...

  @property
  def fingerprint(self) -> str:
    """Tells one set of examples from another, as far as the config does not."""
    ...


class OneStream:
  """Every example of a source once for each stream, all other streams turned into holes."""

  def __init__(self, source: Source, streams: int):
    """Wraps a source of examples with so many streams."""
    self.source, self.streams = source, streams

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.source) * self.streams

  def __getitem__(self, index: int) -> Example:
    """Returns one stream of one example."""
    example, stream = divmod(index, self.streams)
    tokens, weights = self.source[example]
    alone = np.full_like(tokens, HOLE)
    alone[:, stream] = tokens[:, stream]
    return Example(alone, weights)

  def record_id(self, index: int) -> str:
    """Names an example for messages."""
    return self.source.record_id(index // self.streams)

  @property
  def fingerprint(self) -> str:
    """That of the source."""
    return self.source.fingerprint


def training_batches(
  source: Source,
  *,
  rows: int,
  batch: int,
  micro_batches: int,
  pack: bool,
  seed: int,
  threads: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless iterator of this process's part of every batch.

  Args:
    source: of examples of at most `rows` rows.
    rows: R; shorter examples are filled up with holes.
    batch: sequences over all processes and micro-batches.
    micro_batches: A; the leading axis.
    pack: put several whole examples into one sequence, as segments.
    seed: of the shuffle, which differs every epoch.
    threads: that read ahead.
    process_index: of this process.
    process_count: a divisor of `batch`.

  Returns:
    Iterator of dicts: tokens int32 and weights float32 [A, B, R, S], segments int32 and record
    int32 [A, B, R] (index in the source, -1 in padding). It is an Orbax checkpointable.
  """
  if batch % (process_count * micro_batches):
    raise InputError(
      f"config.train.batch: {batch} sequences do not divide over {process_count} processes "
      f"x {micro_batches} micro-batches"
    )
  if len(source) < process_count:
    raise InputError(
      f"training data: {len(source)} examples for {process_count} processes; need one each"
    )
  local = batch // process_count
  dataset = _elements(source, rows).seed(seed).shuffle()[process_index::process_count].repeat()
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
  stream = _sequences(dataset.to_iter_dataset(read), rows, local, pack)
  stream = stream.batch(local, drop_remainder=True)
  cut = lambda x: x.reshape(micro_batches, -1, *x.shape[1:])
  return iter(stream.map(lambda b: {k: cut(v) for k, v in b.items()}))


def held_out_batches(source: Source, *, rows: int, batch: int, pack: bool) -> Iterator[Batch]:
  """Yields every example of a source once, in order, as [B, R, S] batches; the last is filled up
  with sequences of holes."""
  read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  stream = _sequences(_elements(source, rows).to_iter_dataset(read), rows, batch, pack)
  for part in stream.batch(batch, drop_remainder=False):
    short = batch - len(part["tokens"])
    yield {
      name: np.concatenate([x, np.full((short, *x.shape[1:]), _PADDING[name], x.dtype)])
      for name, x in part.items()
    }


_PADDING = {"tokens": HOLE, "weights": 0, "segments": 0, "record": -1}


def _elements(source: Source, rows: int) -> grain.MapDataset:
  """Dataset of one dict an example, not yet filled up."""

  def element(index: int) -> Batch:
    tokens, weights = source[index]
    if len(tokens) > rows:
      raise InputError(
        f"{source.record_id(index)}: {len(tokens)} rows; config.data.rows allows {rows}"
      )
    record = np.full(len(tokens), index, np.int32)
    return {"tokens": tokens, "weights": weights, "record": record}

  return grain.MapDataset.range(len(source)).map(element)


def _sequences(stream: grain.IterDataset, rows: int, bins: int, pack: bool) -> grain.IterDataset:
  """Dataset of sequences of exactly `rows` rows, each with its segments."""
  if not pack:
    return stream.map(lambda e: _filled_up(e, rows))
  names = ("tokens", "weights", "record")
  packed = grain.experimental.FirstFitPackIterDataset(
    stream,
    length_struct=dict.fromkeys(names, rows),
    padding_struct={name: _PADDING[name] for name in names},
    num_packing_bins=bins,
    shuffle_bins=False,
  )
  return packed.map(
    lambda e: {"segments": e["tokens_segment_ids"], **{name: e[name] for name in names}}
  )


def _filled_up(element: Batch, rows: int) -> Batch:
  """Adds padding rows and the segment numbers (1, and 0 in padding)."""
  element = {"segments": np.ones(len(element["record"]), np.int32), **element}
  short = rows - len(element["record"])
  return {
    name: np.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1), constant_values=_PADDING[name])
    for name, x in element.items()
  }
