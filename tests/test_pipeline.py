import collections
import copy
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.data.pipeline import OneStream, held_out_batches, training_batches
from msjax.data.source import Example
from msjax.errors import InputError

ROWS = 8


class Numbered:
  """Examples of given lengths and two streams; every cell tells example, row and stream."""

  def __init__(self, lengths):
    self.lengths = lengths

  def __len__(self):
    return len(self.lengths)

  def __getitem__(self, index):
    rows = self.lengths[index]
    cells = 100 * index + 2 * np.arange(rows)[:, None] + np.arange(2)
    return Example(cells.astype(np.int32), np.full((rows, 2), 1 / (1 + index), np.float32))

  def record_id(self, index):
    return f"record-{index}"


MIXED = Numbered([3, 8, 1, 5, 2, 7, 4, 4, 6, 1, 8, 2, 3])


def batches(source=MIXED, **changes):
  options = {"rows": ROWS, "batch": 4, "micro_batches": 1, "pack": False, "seed": 0, "threads": 2}
  return training_batches(source, **{**options, **changes})


def examples(batch):
  """Indices of the examples in a batch, each checked to be there whole, and nothing besides."""
  tokens, weights, segments, record = (
    batch[name].reshape(-1, *batch[name].shape[-n:])
    for name, n in (("tokens", 2), ("weights", 2), ("segments", 1), ("record", 1))
  )
  found = []
  for sequence in range(len(tokens)):
    padding = segments[sequence] == 0
    assert (tokens[sequence, padding] == -1).all()
    assert (weights[sequence, padding] == 0).all()
    assert (record[sequence, padding] == -1).all()
    assert (np.diff(padding.astype(int)) >= 0).all()  # it stands at the end
    for segment in range(1, segments[sequence].max() + 1):
      rows = segments[sequence] == segment
      (index,) = set(record[sequence, rows].tolist())
      source = MIXED[index]
      np.testing.assert_array_equal(tokens[sequence, rows], source.tokens)
      np.testing.assert_array_equal(weights[sequence, rows], source.weights)
      found.append(index)
  return found


def order(iterator, count):
  """Indices of the first `count` examples."""
  drawn = itertools.chain.from_iterable(examples(batch) for batch in iterator)
  return list(itertools.islice(drawn, count))


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_has_the_shapes_and_types_that_a_step_takes(pack):
  batch = next(batches(batch=6, micro_batches=2, pack=pack))
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    "tokens": ((2, 3, ROWS, 2), np.int32),
    "weights": ((2, 3, ROWS, 2), np.float32),
    "segments": ((2, 3, ROWS), np.int32),
    "record": ((2, 3, ROWS), np.int32),
  }


@pytest.mark.parametrize("pack", [False, True])
def test_the_seed_decides_the_order(pack):
  first = order(batches(pack=pack), 60)
  assert order(batches(pack=pack), 60) == first
  assert order(batches(pack=pack, threads=1), 60) == first
  assert order(batches(pack=pack, seed=1), 60) != first


def test_each_epoch_holds_every_example_once_in_an_order_of_its_own():
  count, epochs = len(MIXED), 5
  drawn = order(batches(), epochs * count)
  parts = [drawn[i * count : (i + 1) * count] for i in range(epochs)]
  assert all(sorted(part) == list(range(count)) for part in parts)
  assert len(set(map(tuple, parts))) == epochs


@given(st.lists(st.integers(1, ROWS), min_size=1, max_size=12), st.integers(1, 4), st.integers(0))
@settings(max_examples=25, deadline=None)
def test_packing_loses_and_doubles_nothing(lengths, batch, seed):
  source = Numbered(lengths)
  counts = collections.Counter(dict.fromkeys(range(len(lengths)), 0))
  stream = batches(source, batch=batch, pack=True, seed=seed % 2**31)
  for _ in range(8):
    packed = next(stream)
    for tokens, segments, record in zip(*(packed[n][0] for n in ("tokens", "segments", "record"))):
      for segment in range(1, segments.max() + 1):
        (index,) = set(record[segments == segment].tolist())
        np.testing.assert_array_equal(tokens[segments == segment], source[index].tokens)
        counts[index] += 1
    # What was packed is a beginning of the stream of epochs, so counts differ by one at most.
    assert max(counts.values()) - min(counts.values()) <= 1


def test_packing_fills_sequences_better_than_one_example_each():
  packed, padded = (next(batches(pack=pack))["segments"] for pack in (True, False))
  assert (packed > 0).mean() > (padded > 0).mean()
  assert packed.max() > padded.max() == 1


def test_micro_batches_cut_the_very_same_batch():
  whole, cut = (next(batches(micro_batches=n)) for n in (1, 2))
  for name in whole:
    np.testing.assert_array_equal(whole[name][0], cut[name].reshape(whole[name][0].shape))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_processes_are_disjoint_and_complete(pack, processes):
  source_size = 12
  shares = [
    order(
      batches(
        Numbered(MIXED.lengths[:source_size]),
        pack=pack,
        process_index=index,
        process_count=processes,
      ),
      source_size // processes,
    )
    for index in range(processes)
  ]
  assert sorted(itertools.chain(*shares)) == list(range(source_size))


def test_each_process_makes_its_part_of_the_batch():
  part = next(batches(batch=8, micro_batches=2, process_index=1, process_count=2))
  assert part["tokens"].shape == (2, 2, ROWS, 2)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 3, 7, 20])
def test_a_restored_position_goes_on_with_the_very_next_batch(pack, taken):
  original = batches(pack=pack, threads=4)
  for _ in range(taken):
    next(original)
  state = pickle.loads(pickle.dumps(copy.deepcopy(original.get_state())))
  expected = [next(original) for _ in range(6)]
  for threads in (1, 4):
    restored = batches(pack=pack, threads=threads)
    next(restored)  # that it has been used already makes no difference
    restored.set_state(state)
    for batch in expected:
      again = next(restored)
      for name in batch:
        np.testing.assert_array_equal(again[name], batch[name])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 13, 20])
def test_held_out_batches_show_every_example_once_and_in_order(pack, batch):
  parts = list(held_out_batches(MIXED, rows=ROWS, batch=batch, pack=pack))
  assert {part["tokens"].shape for part in parts} == {(batch, ROWS, 2)}
  assert {part["record"].dtype for part in parts} == {np.dtype(np.int32)}
  shown = [index for part in parts for index in examples(part)]
  assert sorted(shown) == list(range(len(MIXED)))
  if not pack:
    assert shown == sorted(shown)


def test_a_batch_that_does_not_divide_is_an_error():
  with pytest.raises(InputError, match="6 sequences do not divide over 2 processes x 2 micro"):
    batches(batch=6, micro_batches=2, process_count=2)


def test_a_process_without_examples_is_an_error():
  with pytest.raises(InputError, match="1 examples for 2 processes"):
    batches(Numbered([3]), process_count=2)


@pytest.mark.parametrize("pack", [False, True])
def test_an_example_longer_than_a_sequence_is_an_error(pack):
  source = Numbered([3, ROWS + 1])
  expected = "record-1: 9 rows; config.data.rows allows 8"
  with pytest.raises(InputError, match=expected):
    list(itertools.islice(batches(source, pack=pack), 4))
  with pytest.raises(InputError, match=expected):
    list(held_out_batches(source, rows=ROWS, batch=2, pack=pack))


def test_one_stream_shows_each_stream_alone():
  source = OneStream(MIXED, streams=2)
  assert len(source) == 2 * len(MIXED)
  for index in range(len(source)):
    whole, stream = MIXED[index // 2], index % 2
    tokens, weights = source[index]
    np.testing.assert_array_equal(tokens[:, stream], whole.tokens[:, stream])
    assert (tokens[:, 1 - stream] == -1).all()
    np.testing.assert_array_equal(weights, whole.weights)
    assert source.record_id(index) == f"record-{index // 2}"


def test_batches_can_be_made_where_nobody_parsed_flags():
  program = """
import numpy as np
from msjax.data.pipeline import held_out_batches, training_batches
from msjax.data.source import Example

class Source:
  __len__ = lambda self: 3
  __getitem__ = lambda self, index: Example(np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))

next(training_batches(
  Source(), rows=4, batch=2, micro_batches=1, pack=True, seed=0, threads=2))
print(len(list(held_out_batches(Source(), rows=4, batch=2, pack=False))))
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
