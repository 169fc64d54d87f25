import re

import numpy as np
import pytest

from msjax.data import synthetic
from msjax.data.synthetic import Arithmetic, question, solve
from msjax.errors import InputError
from msjax.streams import Stream, Streams

TOKENS = synthetic.tokenizer()
SILENCE = TOKENS.silence_id


def stream_set(*specs, same_row="inputs"):
  return Streams(tuple(map(Stream.parse, specs)), SILENCE, same_row)


def arithmetic(same_row="inputs", split="train", ops=(2, 10), chat=False, rows=24, seed=0):
  specs = ["chat:output"] if chat else ["user:input", "think:internal", "output:output"]
  return Arithmetic(split, stream_set(*specs, same_row=same_row), TOKENS, ops, chat, rows, seed)


def words(ids):
  """What the cells of one stream say, silence as a dot."""
  return [TOKENS.cell_text(int(i)) for i in ids]


def answer_of(text):
  """Reads a question as a person would and works it out, without the code under test."""
  value = int(text[0])
  for sign, operand in re.findall(r"([+*])(\d)", text[1:]):
    value = value + int(operand) if sign == "+" else value * int(operand)
  return value % 10


def test_a_question_is_solved_state_by_state():
  q = solve(7, ("+3", "*7", "+9"))
  assert q.words == ("7", "+3", "*7", "+9", "=")
  assert q.text == "7+3*7+9="
  assert q.states == (7, 0, 0, 9)


def test_every_answer_is_right_and_every_length_occurs():
  found = [question("train", 0, i, 2, 10) for i in range(2000)]
  assert all(q.states[-1] == answer_of(q.text) for q in found)
  assert {len(q.states) - 1 for q in found} == set(range(2, 11))
  assert {op for q in found for op in q.words[1:-1]} == set(synthetic.OPERATIONS)


def test_no_question_stands_in_both_splits():
  for ops in ((10, 10), (1, 3)):  # of short questions nearly all are asked
    train, valid = (
      {question(split, 0, i, *ops).text for i in range(4000)} for split in synthetic.SPLITS
    )
    assert train and valid and train.isdisjoint(valid)


def test_a_question_depends_on_seed_split_and_index_alone():
  again = [question("train", 3, i, 2, 10) for i in (5, 4, 5)]
  assert again[0] == again[2] != again[1]
  assert question("train", 4, 5, 2, 10) != again[0]
  assert question("valid", 3, 5, 2, 10) != again[0]
  first, second = arithmetic(seed=3)[5], arithmetic(seed=3)[np.int64(5)]
  np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("same_row, lag", [("inputs", 1), ("hidden", 2)])
def test_thoughts_and_answer_come_as_early_as_the_rule_allows(same_row, lag):
  source = arithmetic(same_row, ops=(2, 2), rows=10)
  user, think, output = source.lay_out(solve(7, ("+3", "*7"))).tokens.T
  late = ["·"] * lag
  filled = lambda said: said + ["·"] * (10 - len(said))
  assert words(user) == filled(["7", "+3", "*7", "="])
  assert words(think) == filled([*late, "7", "0", "0"])
  assert words(output) == filled([*["·"] * 3, *late, "0"])


@pytest.mark.parametrize("same_row", ["hidden", "inputs"])
def test_nothing_is_said_before_it_can_be_known(same_row):
  """Two questions that differ from one token on differ nowhere earlier than lag rows below it."""
  source = arithmetic(same_row, rows=14)
  one, other = (
    source.lay_out(solve(4, ("+1", "+2", last, "*3", "+5", "*7", "+1", "+1", "+1", "+1")))
    for last in ("+4", "+5")
  )
  differs = one.tokens != other.tokens
  heard = differs[:, 0].argmax()
  assert differs[:, 1:].any(1).argmax() == heard + source.streams.lag


@pytest.mark.parametrize(
  "chat, same_row, rows", [(False, "inputs", 13), (False, "hidden", 14), (True, "hidden", 24)]
)
def test_ten_operations_take_the_rows_that_the_readme_tells(chat, same_row, rows):
  source = arithmetic(same_row, ops=(10, 10), chat=chat, rows=rows)
  tokens = source[0].tokens
  assert len(tokens) == source.length(0) == rows
  assert (tokens[-1] != SILENCE).any()
  with pytest.raises(InputError, match=f"config.data.rows: {rows - 1}; .* takes {rows}$"):
    arithmetic(same_row, ops=(2, 10), chat=chat, rows=rows - 1)


def test_a_chat_says_question_thoughts_and_answer_in_turn_and_learns_only_what_follows_it():
  source = arithmetic(chat=True)
  tokens, weights = source.lay_out(solve(7, ("+3", "*7")))
  assert words(tokens[:, 0]) == ["7", "+3", "*7", "=", "7", "0", "0", "0"]
  assert weights[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_streams_are_found_by_kind_in_any_order():
  streams = stream_set("o:output", "t:internal", "u:input")
  source = Arithmetic("train", streams, TOKENS, (2, 2), False, 8, 0)
  output, think, user = source.lay_out(solve(7, ("+3", "*7"))).tokens.T
  assert words(user)[:4] == ["7", "+3", "*7", "="]
  assert words(think)[1:4] == ["7", "0", "0"]
  assert words(output)[4] == "0"


def test_streams_of_other_kinds_are_an_error():
  with pytest.raises(InputError, match="one stream of each kind input, internal, output; found a:"):
    Arithmetic("train", stream_set("a:input", "b:output"), TOKENS, (2, 2), False, 8, 0)
  with pytest.raises(InputError, match="as a chat needs one stream of each kind output; found"):
    Arithmetic("train", stream_set("a:input", "b:output"), TOKENS, (2, 2), True, 8, 0)


def test_an_example_is_named_by_split_and_index():
  assert arithmetic(split="valid").record_id(17) == "arithmetic/valid:17"
