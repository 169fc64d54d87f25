"""Text to cells and back: what holds for every tokenizer, and the built-in bytes."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import CORPUS, HARD, byte_level_json, sentencepiece_json

from msjax.errors import InputError
from msjax.text.hf_tokenizer import HfTokenizer, train_bpe
from msjax.text.tokenizer import ByteTokenizer

TYPED_SPECIALS = "<silence> <pad><end> </s> <unk>"
TEXTS = st.text() | st.lists(
  st.sampled_from(
    [" -", "-", " ", "+3", "+", "3", "🙂", "漢", "e\u0301", "\n", *TYPED_SPECIALS.split()]
  )
).map("".join)

BYTES = ByteTokenizer(["+3", "+", "+34", "🙂"])
BPE = train_bpe(CORPUS, 280)
GPT = HfTokenizer(byte_level_json())
SENTENCEPIECE = HfTokenizer(sentencepiece_json())
EXACT = pytest.mark.parametrize("tokenizer", [BYTES, BPE, GPT], ids=["bytes", "bpe", "gpt"])
ALL = pytest.mark.parametrize(
  "tokenizer", [BYTES, BPE, GPT, SENTENCEPIECE], ids=["bytes", "bpe", "gpt", "sentencepiece"]
)


def streamed(tokenizer, ids) -> str:
  decoder = tokenizer.stream_decoder()
  return "".join([decoder.push(id) for id in ids]) + decoder.flush()


# Round trips.


@EXACT
@given(text=TEXTS)
def test_text_survives_and_its_bytes_add_up(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert streamed(tokenizer, ids) == text
  assert sum(map(tokenizer.byte_length, ids)) == len(text.encode())
  assert tokenizer.special_ids.isdisjoint(ids)
  assert all(0 <= id < tokenizer.vocab_size for id in ids)


@EXACT
@pytest.mark.parametrize("text", [HARD, TYPED_SPECIALS, "", " ", "a - b"])
def test_hard_texts_survive(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@ALL
@given(text=TEXTS, data=st.data())
def test_silence_pad_end_and_holes_leave_no_trace(tokenizer, text, data):
  ids = tokenizer.encode(text)
  skipped = [-1, tokenizer.silence_id, tokenizer.pad_id, tokenizer.end_id]
  spread = [
    cell for id in ids for cell in [*data.draw(st.lists(st.sampled_from(skipped), max_size=2)), id]
  ]
  assert streamed(tokenizer, spread) == tokenizer.decode(ids)


@ALL
def test_characters_come_out_whole_and_as_soon_as_complete(tokenizer):
  decoder = tokenizer.stream_decoder()
  texts = [decoder.push(id) for id in tokenizer.encode("a漢🎉\ufffdb")]
  assert "".join(texts) == "a漢🎉\ufffdb"
  assert {t for t in texts if t} >= {"漢", "🎉", "\ufffd"}


@ALL
def test_text_cut_within_a_character(tokenizer):
  ids = tokenizer.encode("ok 漢")
  decoder = tokenizer.stream_decoder()
  assert "".join(map(decoder.push, ids[:-1])) == "ok "
  assert decoder.flush() == "\ufffd"
  assert decoder.flush() == ""
  assert tokenizer.decode(ids[:-1]) == "ok \ufffd"
  assert tokenizer.decode([*ids[:-1], *tokenizer.encode("b")]).startswith("ok \ufffd")


def test_broken_bytes_do_not_hold_back_what_follows():
  decoder = BYTES.stream_decoder()
  assert [decoder.push(b) for b in b"\x80\xe6\xbca"] == ["\ufffd", "", "", "\ufffda"]


# Ids.


def test_bytes_come_first_then_specials_then_added_tokens():
  assert (BYTES.silence_id, BYTES.pad_id, BYTES.end_id, BYTES.vocab_size) == (256, 257, 258, 263)
  assert BYTES.encode("a\xff") == [97, 0xC3, 0xBF]


def test_added_tokens_match_leftmost_and_longest_first():
  assert BYTES.encode("+34+3+") == [261, 259, 260]
  assert ByteTokenizer(["ab", "bcd"]).encode("abcd") == [259, ord("c"), ord("d")]
  assert ByteTokenizer([".*"]).encode("a.*") == [97, 259]


@pytest.mark.parametrize("added", [[""], ["+3", "+3"], ["<pad>"], ["\ud800"]])
def test_added_token_that_cannot_be(added):
  with pytest.raises(InputError):
    ByteTokenizer(added)


@ALL
@pytest.mark.parametrize("offset", [0, 10])
def test_id_outside_the_vocabulary(tokenizer, offset):
  id = tokenizer.vocab_size + offset
  for use in (tokenizer.stream_decoder().push, tokenizer.cell_text, tokenizer.byte_length):
    with pytest.raises(InputError, match=rf"{id}.*{tokenizer.vocab_size}"):
      use(id)
  with pytest.raises(InputError, match="-2"):
    tokenizer.decode([-2])


@ALL
def test_ids_may_be_numpys(tokenizer):
  ids = np.array(tokenizer.encode("the test"), np.int32)
  assert tokenizer.decode(ids) == "the test"
  assert [tokenizer.cell_text(i) for i in ids] == [tokenizer.cell_text(i) for i in ids.tolist()]


@ALL
def test_half_a_surrogate_pair_is_no_text(tokenizer):
  with pytest.raises(InputError, match=r"ud800.*character 1"):
    tokenizer.encode("a\ud800")


# Special tokens and text.


@pytest.mark.parametrize("text", ["<end>", "a <silence>b", "<pad><pad>", TYPED_SPECIALS])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_typed_names_of_specials_are_ordinary_text(tokenizer, copied, text):
  if copied:
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
  ids = tokenizer.encode(text)
  assert tokenizer.special_ids.isdisjoint(ids)
  assert tokenizer.decode(ids) == text
  assert tokenizer.silence_collisions == 0


# A cell in a table.


@pytest.mark.parametrize(
  ("data", "shown"),
  [
    (b"a", "a"),
    (b"-", "-"),
    (b" ", "␣"),
    (b"\n", r"\n"),
    (b"\x1b", r"\x1b"),
    (b"\xe6", r"\xe6"),
  ],
)
def test_cell_of_bytes(data, shown):
  assert BYTES.cell_text(data[0]) == shown


def test_cell_of_specials_and_holes():
  for tokenizer in (BYTES, BPE):
    cells = [-1, tokenizer.silence_id, tokenizer.pad_id, tokenizer.end_id]
    assert [tokenizer.cell_text(c) for c in cells] == ["", "·", "<pad>", "<end>"]
    assert [tokenizer.byte_length(c) for c in cells] == [0, 0, 0, 0]


@ALL
def test_every_cell_is_printable_and_none_is_empty(tokenizer):
  shown = [tokenizer.cell_text(id) for id in range(tokenizer.vocab_size)]
  assert all(text and text.isprintable() for text in shown)
