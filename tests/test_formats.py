import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.data.formats import (
  BadRecords,
  Conversation,
  Message,
  RecordStream,
  Script,
  Span,
  Table,
  level_of,
  read,
  write,
)
from msjax.errors import InputError, RecordError
from msjax.files import replacing

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SCRIPT = {"streams": ["user"], "spans": [{"stream": "user", "row": 0, "text": "hi"}]}
TABLE = {"num_rows": 2, "token_ids": [[1, 2], [3, None]]}

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
metas = st.dictionaries(names, st.integers() | names, max_size=2)
seconds = st.none() | st.floats(-1e9, 1e9)
messages = st.builds(Message, names, names, st.none() | names, seconds)
conversations = st.builds(
  Conversation, st.lists(messages, min_size=1, max_size=4).map(tuple), st.none() | names, metas
)
kinds = st.none() | st.sampled_from(["input", "output", "internal"])


@st.composite
def record_streams(draw, least=1):
  found = draw(st.lists(names, min_size=least, max_size=3, unique=True))
  return tuple(RecordStream(name, draw(kinds), draw(st.none() | names)) for name in found)


@st.composite
def scripts(draw):
  streams = draw(record_streams())
  stream = st.sampled_from([s.name for s in streams])
  spans = st.builds(Span, stream, st.integers(0, 9), names, st.floats(0, 9), st.booleans())
  return Script(streams, tuple(draw(st.lists(spans, min_size=1, max_size=3))), meta=draw(metas))


@st.composite
def tables(draw):
  streams = draw(record_streams())
  rows = draw(st.integers(1, 4))

  def grid(cell):
    row = st.lists(cell, min_size=len(streams), max_size=len(streams))
    return draw(st.lists(row, min_size=rows, max_size=rows))

  tokens = np.array(grid(st.integers(-1, 2**31 - 1)), np.int32)
  weights = np.array(grid(st.floats(0, 1, width=32)), np.float32)
  return Table(tokens, weights, streams if draw(st.booleans()) else (), draw(st.none() | names))


def file_of(tmp_path, *lines):
  path = tmp_path / "data.jsonl"
  path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
  return path


def error_of(tmp_path, line) -> RecordError:
  path = file_of(tmp_path, CHAT, line)
  with pytest.raises(RecordError) as caught:
    list(read(path))
  assert str(caught.value).startswith(f"{path}:2: ")
  assert "\n" not in str(caught.value)
  return caught.value


def with_message(**fields):
  return {"messages": [*CHAT["messages"], {"role": "user", "content": "hi", **fields}]}


def with_span(**fields):
  return {**SCRIPT, "spans": [{**SCRIPT["spans"][0], **fields}]}


@given(st.lists(conversations | scripts() | tables(), min_size=1, max_size=3))
def test_what_is_written_is_read_again(tmp_path_factory, records):
  path = tmp_path_factory.mktemp("round") / "data.jsonl"
  assert write(path, records) == len(records)
  assert path.read_bytes().count(b"\n") == len(records)
  again = list(read(path))
  assert [line for line, _ in again] == list(range(1, len(records) + 1))
  for before, (_, after) in zip(records, again):
    assert after.to_json() == before.to_json()
    assert after.level == before.level
    assert isinstance(after, Table) or after == before


def test_levels_are_told_by_their_fields():
  assert [level_of(x) for x in (CHAT, SCRIPT, TABLE)] == ["messages", "spans", "table"]


def test_optional_fields_have_defaults_and_null_is_absent(tmp_path):
  message = {"role": "user", "content": "hi", "time": None, "stream": None}
  path = file_of(tmp_path, {"messages": [message], "id": None}, with_span(loss=False), TABLE)
  (_, chat), (_, script), (_, table) = read(path)
  assert chat == Conversation((Message("user", "hi"),))
  assert script.spans == (Span("user", 0, "hi", 0.0, False),)
  assert table.streams == ()
  np.testing.assert_array_equal(table.tokens, [[1, 3], [2, -1]])
  np.testing.assert_array_equal(table.weights, np.ones((2, 2)))
  assert (table.tokens.dtype, table.weights.dtype) == (np.int32, np.float32)


def test_a_loss_mask_has_weights_by_stream_or_by_cell(tmp_path):
  path = file_of(tmp_path, {**TABLE, "loss_mask": [False, [0.5, True]]})
  ((_, table),) = read(path)
  np.testing.assert_array_equal(table.weights, [[0, 0.5], [0, 1]])


def test_the_official_release_finds_its_fields_in_our_tables():
  table = Table(np.array([[5, 6], [7, 8], [9, 9]], np.int32), np.ones((3, 2), np.float32))
  assert table.to_json() == {"num_rows": 3, "token_ids": [[5, 7, 9], [6, 8, 9]]}


def test_only_line_feeds_end_lines(tmp_path):
  said = "a\u2028b\u2029c\x85d\x0ce"
  path = tmp_path / "data.jsonl"
  write(path, [Conversation((Message("user", said),))] * 2)
  assert "\u2028".encode() in path.read_bytes()
  assert [record.messages[0].content for _, record in read(path)] == [said, said]


def test_bom_crlf_blank_lines_and_a_last_line_without_end_are_read(tmp_path):
  line = json.dumps(CHAT).encode()
  path = file_of(tmp_path, b"\xef\xbb\xbf" + line + b"\r", b"", b"  \r", line)
  assert [number for number, _ in read(path)] == [1, 4]


@pytest.mark.parametrize(
  "line, field, problem",
  [
    (b'{"messages": [', "json", "Expecting"),
    (b"\xff\xfe{", "json", "utf-8"),
    (b"[" * 100_000, "json", "recursion"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "json", "surrogates"),
    (["hi"], "record", '["hi"]; expected one JSON object'),
    ({"text": "hi"}, "record", "has none of messages, spans, token_ids"),
    ({**CHAT, **TABLE}, "record", "has more than one"),
    ({"messages": []}, "messages", "[]; expected a list that is not empty"),
    ({"messages": ["hi"]}, "messages[0]", '"hi"; expected an object'),
    ({**CHAT, "id": ""}, "id", '""; expected text or a whole number'),
    ({**CHAT, "meta": 3}, "meta", "3; expected an object"),
    (with_message(role=3), "messages[1].role", "3; expected a name"),
    (with_message(content=None), "messages[1].content", "null; expected text"),
    (with_message(content=" \n"), "messages[1].content", "expected text that is not blank"),
    (with_message(content=["a"]), "messages[1].content", '["a"]; expected text'),
    (with_message(stream=1), "messages[1].stream", "1; expected a name"),
    (with_message(time="12:00"), "messages[1].time", '"12:00"; expected a finite number'),
    (with_message(time=True), "messages[1].time", "true; expected a finite number"),
    (with_message(time=float("nan")), "messages[1].time", "NaN; expected a finite number"),
    (with_message(time=10**400), "messages[1].time", "expected a finite number"),
    (with_message(steam="x"), "messages[1].steam", "did you mean 'stream'?"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing; expected text"),
    ({"spans": SCRIPT["spans"]}, "streams", "missing; expected a list"),
    ({**SCRIPT, "streams": ["user", "user"]}, "streams[1]", "'user' stands twice"),
    (
      {**SCRIPT, "streams": [{"name": "user", "kind": "in"}]},
      "streams[0].kind",
      '"in"; expected one',
    ),
    (with_span(stream="usr"), "spans[0].stream", "did you mean 'user'?"),
    (with_span(row=-1), "spans[0].row", "-1; expected a whole number"),
    (with_span(row=True), "spans[0].row", "true; expected a whole number"),
    (with_span(row=1.0), "spans[0].row", "1.0; expected a whole number"),
    (with_span(text=""), "spans[0].text", '""; expected text that is not empty'),
    (with_span(loss=-1), "spans[0].loss", "-1; expected true, false or"),
    (with_span(loss=float("nan")), "spans[0].loss", "NaN; expected true, false or"),
    (with_span(end=1), "spans[0].end", "1; expected true or false"),
    ({"token_ids": [[1]]}, "num_rows", "missing; expected a whole number"),
    ({**TABLE, "num_rows": 0}, "num_rows", "0; expected a whole number, 1 or more"),
    ({**TABLE, "num_rows": 3}, "token_ids[0]", "2 entries; expected 3"),
    ({**TABLE, "token_ids": [[1, 2], [3]]}, "token_ids[1]", "1 entries; expected 2"),
    ({**TABLE, "token_ids": [1, 2]}, "token_ids[0]", "1; expected a list"),
    ({**TABLE, "token_ids": [[1, True]]}, "token_ids[0][1]", "true; expected a token id"),
    ({**TABLE, "token_ids": [[1, -1]]}, "token_ids[0][1]", "-1; expected a token id"),
    ({**TABLE, "token_ids": [[1, 2**31]]}, "token_ids[0][1]", "expected a token id"),
    ({**TABLE, "loss_mask": [1]}, "loss_mask", "1 entries; expected 2, one entry a stream"),
    ({**TABLE, "loss_mask": [1, [1]]}, "loss_mask[1]", "1 entries; expected 2"),
    ({**TABLE, "loss_mask": [1, [1, -2]]}, "loss_mask[1][1]", "-2; expected true, false or"),
    ({**TABLE, "loss_mask": [1, [1, 1e300]]}, "loss_mask[1][1]", "1e+300; expected"),
    ({**TABLE, "loss_masks": [1, 1]}, "loss_masks", "did you mean 'loss_mask'?"),
    ({**TABLE, "streams": ["user"]}, "streams", "1 entries; expected 2, one name for each"),
  ],
)
def test_a_bad_record_names_file_line_and_field(tmp_path, line, field, problem):
  error = error_of(tmp_path, line)
  assert (error.line, error.field) == (2, field)
  assert problem in error.problem


def test_fields_of_others_are_left_alone(tmp_path):
  path = file_of(tmp_path, {**with_message(name="Ann"), "source": "web"}, {**TABLE, "topic": "x"})
  assert len(list(read(path))) == 2


def test_skip_counts_lists_and_goes_on(tmp_path):
  path = file_of(tmp_path, b"{", CHAT, {"messages": []}, TABLE)
  bad = BadRecords("skip")
  assert [number for number, _ in read(path, bad)] == [2, 4]
  assert [m.split(": ")[0] for m in bad.messages] == [f"{path}:1", f"{path}:3"]


def test_the_policy_for_bad_records_is_one_of_two():
  with pytest.raises(InputError, match="'skipp' is none of stop, skip; did you mean 'skip'"):
    BadRecords("skipp")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_an_error(tmp_path, content):
  path = tmp_path / "empty.jsonl"
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"empty\.jsonl: the file has no records"):
    list(read(path))


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
    list(read(tmp_path / "none.jsonl"))
  with pytest.raises(InputError, match="cannot be read: Is a directory"):
    list(read(tmp_path))


def test_a_file_is_read_as_it_goes(tmp_path):
  records = read(file_of(tmp_path, CHAT, b"{"))
  assert next(records)[0] == 1
  with pytest.raises(RecordError):
    next(records)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "out.jsonl"
  path.write_text("old")

  def records():
    yield Conversation((Message("user", "hi"),))
    raise RecordError("in.jsonl", 2, "json", "bad")

  with pytest.raises(RecordError):
    write(path, records())
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_file_appears_only_when_it_is_whole(tmp_path):
  path = tmp_path / "out.jsonl"

  def records():
    yield Conversation((Message("user", "hi"),))
    assert not path.exists()

  assert write(path, records()) == 1
  assert os.listdir(tmp_path) == ["out.jsonl"]


def test_only_files_are_written_to(tmp_path):
  with pytest.raises(InputError, match="no regular file"):
    write(tmp_path, [])
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(InputError, match="no regular file"):
    write(tmp_path / "pipe", [])
  with pytest.raises(InputError, match="cannot be written: No such file or directory"):
    write(tmp_path / "none" / "out.jsonl", [])


def test_a_link_stays_a_link(tmp_path):
  (tmp_path / "link").symlink_to(tmp_path / "real")
  with replacing(tmp_path / "link") as file:
    file.write(b"x")
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "real").read_bytes() == b"x"
