import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msjax.data.formats import Conversation, Message, RecordStream, Script, Span, Table, Where
from msjax.data.layout import LAYOUTS, MAX_ROWS, Layout, convert, to_script, to_table
from msjax.errors import InputError, RecordError
from msjax.streams import HOLE, Stream, Streams
from msjax.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SILENCE, END = BYTES.silence_id, BYTES.end_id
SHOWN = {HOLE: " ", SILENCE: "·", END: "$"}


def streams(*specs, same_row="hidden"):
  specs = specs or ("user:input", "output:output")
  return Streams(tuple(map(Stream.parse, specs)), SILENCE, same_row)


def conversation(*said):
  """Messages from `role:text` or `role:text@time`."""
  messages = []
  for text in said:
    role, content = text.split(":", 1)
    content, *time = content.split("@")
    messages.append(Message(role, content, time=float(time[0]) if time else None))
  return Conversation(tuple(messages), where=Where("chat.jsonl", 7))


def script(*spans, names=("user", "output")):
  return Script(
    tuple(map(RecordStream, names)), tuple(Span(*s) for s in spans), where=Where("spans.jsonl", 7)
  )


def columns(record, run=None, layout=None):
  """Each stream of the table as text, one character a row."""
  table = to_table(record, run or streams(), BYTES, layout or Layout(end_token=False))
  return ["".join(SHOWN.get(t) or chr(t) for t in column) for column in table.tokens.T.tolist()]


# Placing messages.


def test_turn_under_inputs_goes_on_in_the_next_row():
  chat = conversation("user:abc", "assistant:XY", "user:d", "assistant:Z")
  assert columns(chat, streams(same_row="inputs")) == ["abc··d·", "···XY·Z"]


def test_turn_under_hidden_lets_an_answer_see_the_end_first():
  chat = conversation("user:abc", "assistant:XY", "assistant:W", "user:d", "assistant:Z")
  assert columns(chat) == ["abc····d··", "····XYW··Z"]


def test_turn_waits_longer_for_a_stream_that_is_hidden_in_its_own_row():
  run = streams("user:input", "think:internal", "output:output", same_row="inputs")
  chat = conversation("user:abc", "think:T", "assistant:X")
  assert columns(chat, run) == ["abc···", "···T··", "·····X"]


def test_turn_ends_each_message():
  chat = conversation("user:ab", "assistant:X")
  assert columns(chat, layout=Layout()) == ["ab$···", "····X$"]


def test_wait_k_answers_beside_the_question_and_exchanges_do_not_mix():
  run = streams("user:input", "think:internal", "output:output")
  chat = conversation("user:abcd", "think:T", "assistant:XY", "assistant:Z", "user:e", "think:UVWX")
  layout = Layout("wait_k", wait_k=3, end_token=False)
  assert columns(chat, run, layout) == ["abcd··e······", "···T·····UVWX", "···XYZ·······"]


def test_wait_k_lets_inputs_start_together_and_queue():
  run = streams("user:input", "tool:input", "output:output")
  chat = conversation("user:ab", "tool:12", "user:c", "assistant:X")
  assert columns(chat, run, Layout("wait_k", wait_k=2, end_token=False)) == ["abc", "12·", "··X"]


@pytest.mark.parametrize("same_row, least", [("hidden", 2), ("inputs", 1)])
def test_wait_k_is_never_less_than_the_rule_allows(same_row, least):
  run = streams(same_row=same_row)
  assert columns(conversation("user:a", "assistant:X"), run, Layout("wait_k", end_token=False)) == [
    "a" + "·" * least,
    "·" * least + "X",
  ]
  chat = conversation("user:a", "assistant:X")
  assert to_script(chat, run, BYTES, Layout("wait_k", wait_k=least)).spans[1].row == least
  for k in range(1, least):
    with pytest.raises(InputError, match=f"k: {k} is too early.* expected at least {least}"):
      to_script(chat, run, BYTES, Layout("wait_k", wait_k=k))


def test_timestamps_end_a_message_when_it_was_sent():
  chat = conversation("user:abc@100", "assistant:XY@104", "user:d@104.9")
  assert columns(chat, layout=Layout("timestamps", end_token=False)) == ["abc···d", "·····XY"]


def test_timestamps_start_with_the_first_token_whoever_said_it():
  chat = conversation("user:a@0", "assistant:WXYZ@1")
  assert columns(chat, layout=Layout("timestamps", end_token=False)) == ["··a·", "WXYZ"]


def test_timestamps_scale_and_cut_pauses_for_all():
  chat = conversation("user:a@0", "assistant:X@1", "user:b@1001", "assistant:Y@1002")
  layout = Layout("timestamps", rows_per_second=2, max_pause=1.5, end_token=False)
  assert columns(chat, layout=layout) == ["a····b··", "··X····Y"]


def test_timestamps_queue_what_would_collide():
  chat = conversation("user:abc@0", "user:de@1", "assistant:X@1", "user:f@9")
  assert columns(chat, layout=Layout("timestamps", end_token=False)) == [
    "abcde······f",
    "···X········",
  ]


times = st.lists(st.floats(0, 1e4), min_size=1, max_size=8).map(sorted)


@given(
  st.data(),
  times,
  st.sampled_from(list(LAYOUTS)),
  st.sampled_from(["hidden", "inputs", "ordered"]),
  st.floats(0.1, 5),
)
def test_no_layout_loses_doubles_or_reorders_a_token(data, times, name, same_row, rows_per_second):
  run = streams("user:input", "tool:input", "think:internal", "output:output", same_row=same_row)
  said = tuple(
    Message(data.draw(st.sampled_from(run.names)), data.draw(st.text("abc", min_size=1)), time=t)
    for t in times
  )
  layout = Layout(name, rows_per_second=rows_per_second, max_pause=20)
  chat = Conversation(said)
  table = to_table(chat, run, BYTES, layout)
  for s, stream in enumerate(run.names):
    expected = [t for m in said if m.role == stream for t in (*BYTES.encode(m.content), END)]
    column = table.tokens[:, s]
    assert column[(column != SILENCE) & (column != HOLE)].tolist() == expected
    assert (column == HOLE).all() if not expected else (column != HOLE).all()
  if name != "wait_k":
    assert not np.isin(table.tokens[0], [SILENCE, HOLE]).all()
  assert not np.isin(table.tokens[-1], [SILENCE, HOLE]).all()
  by_spans = to_table(to_script(chat, run, BYTES, layout), run, BYTES, layout)
  np.testing.assert_array_equal(by_spans.tokens, table.tokens)


# Who speaks in which stream.


def test_a_message_goes_to_the_stream_it_names_then_its_role_then_its_kind():
  run = streams("system:input", "user:input", "think:internal", "output:output")
  chat = Conversation(
    (
      Message("system", "a"),
      Message("human", "b"),
      Message("user", "c"),
      Message("assistant", "d", stream="think"),
      Message("assistant", "e"),
    )
  )
  script = to_script(chat, run, BYTES, Layout())
  assert [s.stream for s in script.spans] == ["system", "system", "user", "think", "output"]


def test_streams_nobody_speaks_in_are_holes():
  run = streams("user:input", "think:internal", "output:output")
  assert columns(conversation("user:a", "assistant:X"), run) == ["a··", "   ", "··X"]


@pytest.mark.parametrize(
  "message, field, problem",
  [
    (Message("usr", "a"), "role", "did you mean 'user'"),
    (
      Message("system", "a"),
      "role",
      "'system' has no stream among user:input",
    ),
    (Message("user", "a", stream="outptu"), "stream", "did you mean 'output'"),
    (Message("user", "\ud800"), "content", "half of a surrogate pair"),
  ],
)
def test_a_message_that_cannot_be_placed_is_named(message, field, problem):
  chat = Conversation((Message("user", "a"), message), where=Where("chat.jsonl", 7))
  with pytest.raises(RecordError, match=problem) as caught:
    to_script(chat, streams(), BYTES, Layout())
  assert str(caught.value).startswith(f"chat.jsonl:7: messages[1].{field}: ")


def test_an_assistant_needs_an_output_stream():
  with pytest.raises(RecordError, match="'assistant' has no stream"):
    columns(conversation("assistant:a"), streams("user:input"))


@pytest.mark.parametrize(
  "said, problem",
  [
    (("user:a@3", "assistant:b@2"), r"messages\[1\].time: 2.0 runs backwards; expected 3.0"),
    (("user:a@3", "assistant:b"), r"messages\[1\].time: missing"),
    (("user:a",), r"messages\[0\].time: missing"),
  ],
)
def test_timestamps_need_times_in_order(said, problem):
  with pytest.raises(RecordError, match=f"chat.jsonl:7: {problem}"):
    to_script(conversation(*said), streams(), BYTES, Layout("timestamps"))


def test_times_in_milliseconds_are_not_taken_for_seconds():
  chat = conversation("user:a@0", f"assistant:b@{MAX_ROWS + 1}")
  with pytest.raises(RecordError, match="times are seconds and max_pause shortens pauses"):
    columns(chat, layout=Layout("timestamps", max_pause=math.inf))


@pytest.mark.parametrize(
  "options, problem",
  [
    ({"name": "waitk"}, "'waitk' is none of turn, wait_k, timestamps; did you mean 'wait_k'"),
    ({"wait_k": -1}, "wait_k: -1 is negative"),
    ({"rows_per_second": 0.0}, "rows_per_second: 0.0; expected more than 0"),
    ({"rows_per_second": math.nan}, "rows_per_second: nan"),
    ({"max_pause": 0.0}, "max_pause: 0.0; expected seconds"),
    ({"max_pause": math.nan}, "max_pause: nan"),
  ],
)
def test_layouts_are_checked(options, problem):
  with pytest.raises(InputError, match=problem):
    Layout(**options)


# Spans to tables.


def test_gaps_are_silence_and_absent_streams_are_holes():
  run = streams("user:input", "think:internal", "output:output")
  record = script(("output", 5, "b"), ("user", 1, "aa"), ("user", 4, "c"))
  assert columns(record, run) == ["·aa·c·", "      ", "·····b"]


def test_weights_stand_at_the_cells_of_their_span():
  record = script(("user", 0, "ab"), ("output", 1, "c", 0.25, True), ("output", 4, "d", 0.0))
  table = to_table(record, streams(), BYTES, Layout())
  np.testing.assert_array_equal(table.weights[:, 0], np.ones(5))
  np.testing.assert_array_equal(table.weights[:, 1], [1, 0.25, 0.25, 1, 0])
  assert table.tokens[:, 1].tolist() == [SILENCE, ord("c"), END, SILENCE, ord("d")]
  assert (table.tokens.dtype, table.weights.dtype) == (np.int32, np.float32)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=4))
def test_spans_overlap_or_all_of_them_stand_in_the_table(placed):
  record = script(*(("user", row, "abcd"[i] * n) for i, (row, n) in enumerate(placed)))
  cells = [r for row, n in placed for r in range(row, row + n)]
  if len(cells) != len(set(cells)):
    with pytest.raises(RecordError, match=r"spans.jsonl:7: spans\[\d\]: rows .* overlap spans"):
      columns(record)
  else:
    (column, _) = columns(record)
    for i, (row, n) in enumerate(placed):
      assert column[row : row + n] == "abcd"[i] * n


def test_an_overlap_names_both_spans_their_stream_and_rows():
  record = script(("user", 4, "dd"), ("output", 1, "x"), ("user", 2, "abc"))
  with pytest.raises(RecordError) as caught:
    columns(record)
  assert str(caught.value) == (
    "spans.jsonl:7: spans[0]: rows 4 to 5 of stream 'user' overlap spans[2] in rows 2 to 4; "
    "expected row 5 or later"
  )


def test_an_end_token_takes_a_row_too():
  with pytest.raises(RecordError, match="overlap"):
    columns(script(("user", 0, "ab", 1.0, True), ("user", 2, "c")))


def test_a_span_far_down_is_an_error_not_a_full_memory():
  with pytest.raises(RecordError, match=r"spans\[0\].row: ends in row 1000000000000;"):
    columns(script(("user", 10**12, "a")))


def test_streams_and_kinds_of_a_record_must_be_those_of_the_run():
  with pytest.raises(RecordError, match=r"streams\[1\]: 'outputs' is none .* mean 'output'"):
    columns(script(("user", 0, "a"), names=("user", "outputs")))
  record = Script((RecordStream("user", "output"),), (Span("user", 0, "a"),))
  with pytest.raises(RecordError, match=r"streams\[0\].kind: 'output', but .* of kind 'input'"):
    columns(record)


# Tables of files.


def table(tokens, names=(), weights=None):
  tokens = np.array(tokens, np.int32)
  weights = np.ones(tokens.shape, np.float32) if weights is None else np.array(weights, np.float32)
  return Table(tokens, weights, tuple(map(RecordStream, names)), where=Where("tables.jsonl", 7))


def test_named_columns_are_sorted_by_stream_id_and_absent_ones_are_holes():
  run = streams("user:input", "think:internal", "output:output")
  from_file = table([[1, 2], [3, HOLE]], ["output", "user"], [[0, 1], [0, 1]])
  found = to_table(from_file, run, BYTES, Layout())
  np.testing.assert_array_equal(found.tokens, [[2, HOLE, 1], [HOLE, HOLE, 3]])
  np.testing.assert_array_equal(found.weights[:, [0, 2]], [[1, 0], [1, 0]])
  assert [s.name for s in found.streams] == list(run.names)


def test_columns_without_names_are_the_runs_in_order():
  found = to_table(table([[1, 2]]), streams(), BYTES, Layout())
  np.testing.assert_array_equal(found.tokens, [[1, 2]])
  with pytest.raises(RecordError, match=r"token_ids: 3 streams without names; .* 2 \(user, output"):
    to_table(table([[1, 2, 3]]), streams(), BYTES, Layout())


def test_ids_outside_the_vocabulary_are_named():
  last = BYTES.vocab_size - 1
  to_table(table([[1, last]]), streams(), BYTES, Layout())
  with pytest.raises(RecordError, match=rf"tables.jsonl:7: token_ids\[1\]\[0\]: {last + 1} is out"):
    to_table(table([[1, last + 1]]), streams(), BYTES, Layout())


# From level to level.


def test_levels_go_forward_and_stay():
  chat, run, layout = conversation("user:a", "assistant:b"), streams(), Layout()
  steps = [convert(chat, to, run, BYTES, layout) for to in ("messages", "spans", "table")]
  assert [type(s) for s in steps] == [Conversation, Script, Table]
  assert steps[0] is chat
  assert convert(steps[1], "spans", run, BYTES, layout) is steps[1]
  assert convert(steps[1], "table", run, BYTES, layout).to_json() == steps[2].to_json()
  assert convert(steps[2], "table", run, BYTES, layout).to_json() == steps[2].to_json()


def test_levels_never_go_back():
  with pytest.raises(InputError, match=r"tables.jsonl:7: table cannot be turned back into spans"):
    convert(table([[1, 2]]), "spans", streams(), BYTES, Layout())
  with pytest.raises(InputError, match=r"level 'tables' is none of .* did you mean 'table'"):
    convert(table([[1, 2]]), "tables", streams(), BYTES, Layout())
