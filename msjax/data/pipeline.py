"""From a source of examples to batches: shuffled by seed, padded or packed, any part of each.

Which example goes where is decided by lengths alone, so every process plans the whole batch and
reads only the sequences it holds. The same batches come up on any number of processes.
"""

import asyncio
import collections
import json
import os
from collections.abc import Awaitable, Iterator, Sequence
from concurrent import futures
from typing import Protocol

import grain
import jax
import numpy as np

from msjax.data.source import Example
from msjax.errors import InputError
from msjax.streams import HOLE

Batch = dict[str, np.ndarray]
Plan = list[list[int]]  # of each sequence of a batch, its examples in order
SPLITS = ("train", "valid")
POSITION_VERSION = 1
_POSITION = "position.json"


class Source(Protocol):
  """Random access to examples."""

  def __len__(self) -> int:
    """Returns the number of examples."""
    ...

  def __getitem__(self, index: int) -> Example:
    """Returns one example."""
    ...

  def length(self, index: int) -> int:
    """Returns the number of rows of an example, without the cost of its cells."""
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

  def length(self, index: int) -> int:
    """Returns the number of rows of an example."""
    return self.source.length(index // self.streams)

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
  local: slice | Sequence[int] = slice(None),
) -> "TrainingBatches":
  """Returns an endless iterator of this process's part of every batch.

  Args:
    source: of examples of at most `rows` rows.
    rows: R; shorter examples are filled up with holes.
    batch: sequences over all processes and micro-batches.
    micro_batches: A; the leading axis.
    pack: put several whole examples into one sequence, as segments.
    seed: of the shuffle, which differs every epoch.
    threads: that read ahead.
    local: the sequences of each micro-batch that this process holds, by default all of them.

  Returns:
    Iterator of dicts: tokens int32 and weights float32 [A, B, R, S], segments int32 and record
    int32 [A, B, R] (index in the source, -1 in padding), where B counts local sequences.
  """
  if batch % micro_batches:
    raise InputError(
      f"config.train.batch: {batch} sequences do not divide into {micro_batches} micro-batches"
    )
  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  numbers = np.arange(batch).reshape(micro_batches, -1)[:, local]
  return TrainingBatches(_Packer(source, order, rows, batch, pack), numbers, threads)


def held_out_batches(
  source: Source, *, rows: int, batch: int, pack: bool, local: slice | Sequence[int] = slice(None)
) -> Iterator[Batch]:
  """Yields every example of a source once, in order, as [B, R, S] batches; the last is filled up
  with sequences of holes. Of each, `local` names the sequences that this process holds."""
  order, numbers = range(len(source)), np.arange(batch)[local]
  packer, position = _Packer(source, order, rows, batch, pack), 0
  while position < len(order):
    plan, position = packer.plan(position)
    yield packer.read(plan, numbers)


class TrainingBatches(Iterator[Batch]):
  """Batches without end, read ahead by threads; an Orbax checkpointable.

  Attributes:
    position: examples in the batches handed out so far. It is all that a checkpoint holds, and
      means the same to any number of processes.
  """

  def __init__(self, packer: "_Packer", numbers: np.ndarray, threads: int):
    """Starts at position 0; `numbers` [A, B] are the sequences of each batch that are read."""
    self._packer, self._numbers, self._threads = packer, numbers, threads
    self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    self._go_to(0)

  def _go_to(self, position: int) -> None:
    self.position = position
    self._ahead: collections.deque[futures.Future[tuple[Batch, int]]] = collections.deque()
    self._planned = self._pool.submit(lambda: ([], position))

  def __next__(self) -> Batch:
    """Returns the next batch."""
    while len(self._ahead) <= self._threads:
      # Each waits only for what was put into the pool before it, so the pool cannot lock up.
      self._planned = self._pool.submit(self._plan_after, self._planned)
      self._ahead.append(self._pool.submit(self._read, self._planned))
    batch, self.position = self._ahead.popleft().result()
    return batch

  def _plan_after(self, planned: futures.Future[tuple[Plan, int]]) -> tuple[Plan, int]:
    return self._packer.plan(planned.result()[1])

  def _read(self, planned: futures.Future[tuple[Plan, int]]) -> tuple[Batch, int]:
    plan, position = planned.result()
    return self._packer.read(plan, self._numbers), position

  async def save(self, directory) -> Awaitable[None]:
    """Takes down the position; awaiting what is returned writes it, on the first process alone."""
    return _write_position(directory, self.position)

  async def load(self, directory: os.PathLike) -> Awaitable[None]:
    """Awaiting what is returned goes to the position that was saved in a directory.

    Raises:
      InputError: there is none, or none that this msjax reads.
    """
    position = _read_position(directory)  # at once: Orbax would bury an error of the awaitable

    async def go() -> None:
      self._go_to(position)

    return go()


async def _write_position(directory, examples: int) -> None:
  """Writes a position into a directory that Orbax is still making, and renames when whole."""
  path = await directory.await_creation() / _POSITION
  content = json.dumps({"format_version": POSITION_VERSION, "examples": examples}).encode()
  if jax.process_index() == 0:
    await asyncio.to_thread(path.write_bytes, content + b"\n")


def _read_position(directory: os.PathLike) -> int:
  path = os.path.join(directory, _POSITION)
  try:
    with open(path, encoding="utf-8") as file:
      data = json.load(file)
    if data["format_version"] == POSITION_VERSION:
      return int(data["examples"])
    problem = f"format_version {data['format_version']}; this msjax reads {POSITION_VERSION}"
  except FileNotFoundError:
    problem = "not found"
  except (ValueError, KeyError, TypeError):
    problem = "holds no position in the data that msjax wrote"
  raise InputError(
    f"{path}: {problem}; use another --workdir, with --config.init_from to keep the parameters"
  )


class _Packer:
  """Decides which examples make up a batch, and lays them out."""

  def __init__(self, source: Source, order: Sequence[int], rows: int, batch: int, pack: bool):
    """Takes examples in `order`, for batches of `batch` sequences of `rows` rows."""
    self.source, self.order, self.rows, self.batch, self.pack = source, order, rows, batch, pack
    self._streams = source[0].tokens.shape[1]

  def plan(self, position: int) -> tuple[Plan, int]:
    """Returns the batch that begins with the example at a position, and where the next begins.

    Each example goes into the first sequence with room for it; one that finds none ends the batch.
    """
    plan: Plan = [[] for _ in range(self.batch)]
    room = np.full(self.batch, self.rows)
    while position < len(self.order):
      index = int(self.order[position])
      # One that is too long is told when it is read.
      length = min(self.source.length(index), self.rows) if self.pack else self.rows
      first = int(np.argmax(room >= length))
      if room[first] < length:
        break
      plan[first].append(index)
      room[first] -= length
      position += 1
    return plan, position

  def read(self, plan: Plan, numbers: np.ndarray) -> Batch:
    """Returns the sequences of a plan with these numbers [...], as arrays [..., R, S] and
    [..., R]."""
    shape = (numbers.size, self.rows)
    batch = {
      "tokens": np.full((*shape, self._streams), HOLE, np.int32),
      "weights": np.zeros((*shape, self._streams), np.float32),
      "segments": np.zeros(shape, np.int32),
      "record": np.full(shape, -1, np.int32),
    }
    for sequence, number in enumerate(numbers.flat):
      start = 0
      for segment, index in enumerate(plan[number], start=1):
        tokens, weights = self.source[index]
        if len(tokens) > self.rows:
          raise InputError(
            f"{self.source.record_id(index)}: {len(tokens)} rows; "
            f"config.data.rows allows {self.rows}"
          )
        cells = sequence, slice(start, start + len(tokens))
        batch["tokens"][cells], batch["weights"][cells] = tokens, weights
        batch["segments"][cells], batch["record"][cells] = segment, index
        start += len(tokens)
    return {name: x.reshape(*numbers.shape, *x.shape[1:]) for name, x in batch.items()}
