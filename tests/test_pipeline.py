import collections
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

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

  def length(self, index):
    return self.lengths[index]

  def record_id(self, index):
    return f"record-{index}"


MIXED = Numbered([3, 8, 1, 5, 2, 7, 4, 4, 6, 1, 8, 2, 3])
MANY = Numbered(np.random.default_rng(0).integers(1, ROWS + 1, 150).tolist())


def batches(source=MIXED, **changes):
  options = {"rows": ROWS, "batch": 4, "micro_batches": 1, "pack": False, "seed": 0, "threads": 2}
  return training_batches(source, **{**options, **changes})


def examples(batch, of=MIXED):
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
      np.testing.assert_array_equal(tokens[sequence, rows], of[index].tokens)
      np.testing.assert_array_equal(weights[sequence, rows], of[index].weights)
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


@given(st.lists(st.integers(1, ROWS), min_size=1, max_size=40), st.integers(1, 4), st.integers(0))
@settings(max_examples=15, deadline=None)
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


# Digests of the first 40 batches and of all held-out ones, as they have been since the first runs.
RECORDED = {
  (False, 0): "bbc75dafa1965c50",
  (False, 7): "d8c3b654c2da7ad9",
  (True, 0): "e0aad6eb39756ac1",
  (True, 7): "eff8fee5224de757",
}
RECORDED_HELD_OUT = {False: "4a40246d4f4a6816", True: "4707b6bc25e82cfe"}


def digest(stream):
  found = hashlib.blake2b(digest_size=8)
  for batch in stream:
    for name in ("tokens", "weights", "segments", "record"):
      array = np.ascontiguousarray(batch[name])
      found.update(repr((array.dtype.str, array.shape)).encode())
      found.update(array)
  return found.hexdigest()


@pytest.mark.parametrize("pack, seed", RECORDED)
def test_batches_are_those_that_they_have_always_been(pack, seed):
  stream = batches(micro_batches=2, pack=pack, seed=seed)
  assert digest(itertools.islice(stream, 40)) == RECORDED[pack, seed]
  assert digest(held_out_batches(MIXED, rows=ROWS, batch=4, pack=pack)) == RECORDED_HELD_OUT[pack]


# The parts of processes.


def same(batch, other):
  for name in batch | other:
    np.testing.assert_array_equal(batch[name], other[name])


def part(batch, local, axis=1):
  """What a process that holds some sequences of each micro-batch has of a batch."""
  return {name: np.take(x, local, axis) for name, x in batch.items()}


@st.composite
def shares(draw, sequences):
  """Splits sequences over processes, at random and unevenly; some may go to nobody."""
  owners = draw(st.lists(st.integers(0, 4), min_size=sequences, max_size=sequences))
  return [[i for i, owner in enumerate(owners) if owner == process] for process in range(5)]


@given(shares(sequences=4), st.booleans(), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_each_process_has_its_part_of_the_one_batch(shares, pack, count):
  options = {"batch": 8, "micro_batches": 2, "pack": pack, "threads": 1}
  whole = batches(MANY, **options)
  parts = [batches(MANY, **options, local=local) for local in shares]
  for _ in range(count):
    batch = next(whole)
    for local, stream in zip(shares, parts):
      same(next(stream), part(batch, local))
      assert stream.position == whole.position


@given(st.integers(1, 6), st.booleans(), st.integers(0))
@settings(max_examples=10, deadline=None)
def test_any_number_of_processes_sees_every_example_once_an_epoch(processes, pack, seed):
  sequences = np.array_split(np.arange(48), processes)
  options = {"batch": 48, "pack": pack, "seed": seed % 2**31, "threads": 1}
  streams = [batches(MANY, **options, local=local) for local in sequences]
  counts = collections.Counter(dict.fromkeys(range(len(MANY)), 0))
  for _ in range(4):
    counts.update(index for stream in streams for index in examples(next(stream), MANY))
    assert counts.total() == streams[0].position
    assert max(counts.values()) - min(counts.values()) <= 1
  assert min(counts.values()) >= 1


@pytest.mark.parametrize("pack", [False, True])
def test_only_the_examples_of_local_sequences_are_read(pack):
  class Read(Numbered):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  read = []
  stream = batches(Read(MIXED.lengths), pack=pack, threads=1, local=[2])
  read.clear()  # the number of streams is asked of the first example
  first = set(itertools.chain.from_iterable(examples(next(stream)) for _ in range(2)))
  so_far = set(read)
  assert first <= so_far <= first | set(examples(next(stream)))  # which may be read ahead


@pytest.mark.parametrize("pack", [False, True])
def test_held_out_batches_have_parts_too(pack):
  options = {"rows": ROWS, "batch": 4, "pack": pack}
  for local in ([0, 2], [3], slice(1, 3)):
    parts = list(held_out_batches(MIXED, **options, local=local))
    whole = list(held_out_batches(MIXED, **options))
    assert len(parts) == len(whole)
    for mine, batch in zip(parts, whole):
      same(mine, part(batch, np.arange(4)[local], axis=0))


# Going on.


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 3, 7, 20])
def test_a_restored_position_goes_on_with_the_very_next_batch(tmp_path, pack, taken):
  original = batches(pack=pack, threads=4)
  for _ in range(taken):
    next(original)
  ocp.save_checkpointables(tmp_path / "1", {"data": original})
  expected = [next(original) for _ in range(6)]
  for threads, local in ((1, slice(None)), (4, [1, 3]), (2, [0])):
    restored = batches(pack=pack, threads=threads, local=local)
    next(restored)  # that it has been used already makes no difference
    ocp.load_checkpointables(tmp_path / "1", {"data": restored})
    for batch in expected:
      same(next(restored), part(batch, np.arange(4)[local]))


def test_what_is_written_while_the_run_goes_on_is_where_it_was(tmp_path):
  original = batches(pack=True)
  next(original)
  position = original.position
  writing = ocp.save_checkpointables_async(tmp_path / "1", {"data": original})
  next(original)
  writing.result()
  restored = batches(pack=True)
  ocp.load_checkpointables(tmp_path / "1", {"data": restored})
  assert restored.position == position < original.position
  (file,) = (tmp_path / "1" / "data").iterdir()
  assert file.read_text() == f'{{"format_version": 1, "examples": {position}}}\n'


@pytest.mark.parametrize(
  "content, problem",
  [
    (None, "not found"),
    ("{", "holds no position"),
    ('{"next_index": 3}', "holds no position"),
    ("[3]", "holds no position"),
    ('{"format_version": 1, "examples": null}', "holds no position"),
    ('{"format_version": 2, "examples": 3}', "format_version 2; this msjax reads 1"),
  ],
)
def test_a_position_that_cannot_be_read_is_one_sentence(tmp_path, content, problem):
  ocp.save_checkpointables(tmp_path / "1", {"data": batches()})
  path = tmp_path / "1" / "data" / "position.json"
  path.unlink() if content is None else path.write_text(content)
  with pytest.raises(InputError, match=f"^{path}: {problem}.*; use another --workdir, with --conf"):
    ocp.load_checkpointables(tmp_path / "1", {"data": batches()})


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
  with pytest.raises(InputError, match="6 sequences do not divide into 4 micro-batches"):
    batches(batch=6, micro_batches=4)


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
    assert source.length(index) == len(tokens)
    assert source.record_id(index) == f"record-{index // 2}"


def test_batches_can_be_made_where_nobody_parsed_flags():
  program = """
import numpy as np
from msjax.data.pipeline import held_out_batches, training_batches
from msjax.data.source import Example

class Source:
  __len__ = lambda self: 3
  __getitem__ = lambda self, index: Example(np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))
  length = lambda self, index: 2

next(training_batches(
  Source(), rows=4, batch=2, micro_batches=1, pack=True, seed=0, threads=2))
print(len(list(held_out_batches(Source(), rows=4, batch=2, pack=False))))
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
