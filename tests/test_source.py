import json
import pickle
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.data import chitchat
from msjax.data.formats import Conversation, Message, Table, write
from msjax.data.layout import Layout, to_table
from msjax.data.source import JsonlSource, RecordSource
from msjax.errors import InputError, RecordError
from msjax.streams import Stream, Streams
from msjax.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
RUN = Streams((Stream.parse("user:input"), Stream.parse("output:output")), BYTES.silence_id)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
SCRIPT = {"id": "s", "streams": ["user"], "spans": [{"stream": "user", "row": 0, "text": "hi"}]}
TABLE = {"num_rows": 3, "token_ids": [[1, 2, 3], [4, None, 6]], "loss_mask": [0, 0.5]}


def file_of(tmp_path, *records, name="data.jsonl"):
  path = tmp_path / name
  path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
  return path


def jsonl(paths, max_rows=64, **options):
  return JsonlSource(paths, RUN, BYTES, Layout(), max_rows, **options)


def test_records_of_every_level_become_examples(tmp_path):
  path = file_of(tmp_path, CHAT, "", SCRIPT, TABLE)
  source = jsonl(path)
  assert [source.record_id(i) for i in range(len(source))] == [f"{path}:1", "s", f"{path}:4"]
  chat, script, table = source
  assert bytes(chat.tokens[:2, 0].tolist()) == b"hi"
  np.testing.assert_array_equal(script.tokens, [[ord("h"), -1], [ord("i"), -1]])
  np.testing.assert_array_equal(table.tokens, [[1, 4], [2, -1], [3, 6]])
  np.testing.assert_array_equal(table.weights, [[0, 0.5]] * 3)
  assert (table.tokens.dtype, table.weights.dtype) == (np.int32, np.float32)


def test_several_files_are_one_source(tmp_path):
  paths = [file_of(tmp_path, TABLE, name="a.jsonl"), file_of(tmp_path, CHAT, name="b.jsonl")]
  source = jsonl(paths)
  assert [source.record_id(i) for i in range(2)] == [f"{path}:1" for path in paths]


def test_a_fingerprint_goes_by_what_is_trained_on(tmp_path):
  of = lambda *records, **options: jsonl(file_of(tmp_path, *records), **options).fingerprint
  first = of(CHAT, TABLE)
  moved = file_of(tmp_path, CHAT, "", {**TABLE, "id": "named"}, name="moved.jsonl")
  assert jsonl(moved).fingerprint == first
  assert len({first, of(TABLE, CHAT), of(CHAT), of(CHAT, TABLE, max_rows=3)}) == 4
  assert of(CHAT, {**TABLE, "token_ids": [[1, 2, 3], [4, None, 7]]}) != first
  assert of(CHAT, {**TABLE, "loss_mask": [0, 0.25]}) != first


@given(
  st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(2, 6), st.integers(0, 2**32)
)
def test_windows_hold_every_row_once_and_in_order(lengths, max_rows, seed):
  rng = np.random.default_rng(seed)
  tables = [
    Table(rng.integers(0, 99, (n, 2), np.int32), rng.random((n, 2), np.float32), id=str(i))
    for i, n in enumerate(lengths)
  ]
  source = RecordSource(tables, RUN, BYTES, Layout(), max_rows)
  examples = {source.record_id(i): source[i] for i in range(len(source))}
  assert len(examples) == len(source)
  assert all(len(tokens) <= max_rows for tokens, _ in examples.values())
  assert list(map(source.length, range(len(source)))) == [len(e.tokens) for e in source]
  for table in tables:
    count = -(-len(table.tokens) // max_rows)
    windows = [examples.pop(table.id)]
    windows += [examples.pop(f"{table.id}#{window}") for window in range(2, count + 1)]
    np.testing.assert_array_equal(np.concatenate([w.tokens for w in windows]), table.tokens)
    np.testing.assert_array_equal(np.concatenate([w.weights for w in windows]), table.weights)
  assert not examples


def test_indices_are_those_of_a_list(tmp_path):
  source = jsonl(file_of(tmp_path, SCRIPT, TABLE))
  np.testing.assert_array_equal(source[-1].tokens, source[np.int64(1)].tokens)
  with pytest.raises(IndexError):
    source[2]


def test_examples_cannot_be_overwritten(tmp_path):
  source = jsonl(file_of(tmp_path, TABLE))
  with pytest.raises(ValueError, match="read-only"):
    source[0].tokens[0, 0] = 5


def test_a_source_goes_to_worker_processes_and_is_named_alike(tmp_path):
  source = jsonl(file_of(tmp_path, CHAT, TABLE))
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[1].tokens, source[1].tokens)
  assert copy.fingerprint == source.fingerprint


def test_a_bad_record_stops_before_there_is_a_source(tmp_path):
  overlap = {**SCRIPT, "spans": SCRIPT["spans"] * 2}
  with pytest.raises(RecordError, match=r"data.jsonl:2: spans\[1\]: rows 0 to 1"):
    jsonl(file_of(tmp_path, CHAT, overlap))


def test_skip_leaves_out_what_cannot_be_read_or_laid_out(tmp_path):
  overlap = {**SCRIPT, "spans": SCRIPT["spans"] * 2}
  outside = {"num_rows": 1, "token_ids": [[1], [BYTES.vocab_size]]}
  path = file_of(tmp_path, "{", CHAT, overlap, outside, TABLE)
  source = jsonl(path, on_bad_record="skip")
  assert [source.record_id(i) for i in range(len(source))] == [f"{path}:2", f"{path}:5"]
  assert [m.split(": ")[0] for m in source.bad.messages] == [f"{path}:{n}" for n in (1, 3, 4)]


def test_a_source_without_examples_is_an_error(tmp_path):
  with pytest.raises(InputError, match="no record is left, 2 were bad"):
    jsonl(file_of(tmp_path, "{", "[]"), on_bad_record="skip")
  with pytest.raises(InputError, match="has no records"):
    jsonl([file_of(tmp_path, CHAT, name="a.jsonl"), file_of(tmp_path, name="b.jsonl")])


def test_an_example_needs_a_row_and_one_it_predicts(tmp_path):
  with pytest.raises(InputError, match="max_rows: 1; expected 2 or more"):
    jsonl(file_of(tmp_path, CHAT), max_rows=1)


def test_what_was_written_as_tables_gives_the_same_examples(tmp_path):
  chat = Conversation((Message("user", "hello"), Message("assistant", "world")))
  write(tmp_path / "tables.jsonl", [to_table(chat, RUN, BYTES, Layout())])
  direct = RecordSource([chat], RUN, BYTES, Layout(), 4)
  stored = jsonl(tmp_path / "tables.jsonl", max_rows=4)
  assert len(direct) == len(stored) > 1
  for a, b in zip(direct, stored):
    np.testing.assert_array_equal(a.tokens, b.tokens)


# Chats of the package.


def package(raw):
  return types.SimpleNamespace(Dataset=lambda: raw)


def said(sender, second, text):
  return {"sender": sender, "timestamp": f"2018-05-02T19:38:{second:02}Z", "text": text}


def test_chats_of_two_are_read_and_blank_messages_left_out(monkeypatch):
  raw = {
    "alone": {"messages": [[said("a", 1, "hello?")]]},
    "pair": {"messages": [[said("b", 1, "hi"), said("b", 3, " ")], [said("a", 9, "ho")]]},
  }
  monkeypatch.setitem(sys.modules, "chitchat_dataset", package(raw))
  (found,) = chitchat.conversations()
  assert found.id == "pair"
  assert str(found.where) == "chitchat-dataset:1"  # numbered among the chats of two
  assert [(m.role, m.content) for m in found.messages] == [("user", "hi"), ("assistant", "ho")]
  assert found.messages[1].time - found.messages[0].time == 8


def test_a_missing_package_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
  with pytest.raises(InputError, match=r"pip install -e '.\[demo\]'"):
    chitchat.conversations()


def test_the_split_stays_and_holds_out_one_in_twenty():
  ids = [f"{i:08x}-6b91" for i in range(4000)]
  splits = [chitchat.split(i) for i in ids]
  assert set(splits) == {"train", "valid"}
  assert 150 < splits.count("valid") < 250
  assert chitchat.split("cdf96a2c-1ba5-4375-a65e-917b151ce04e") == "train"


def test_the_package_holds_what_semantics_say():
  pytest.importorskip("chitchat_dataset")
  found = chitchat.conversations()
  assert len(found) == 4018
  assert sum(len(c.messages) for c in found) == 243_046 - 33
  for c in found:
    times = [m.time for m in c.messages]
    assert times == sorted(times)
