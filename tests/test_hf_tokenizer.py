"""Hugging Face's tokenizers: each kind decodes as there, and no text is lost or made special."""

import json
import pickle

import pytest
import tokenizers
from absl import logging
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import CORPUS, HARD, byte_level_json, sentencepiece_json, unigram_json
from tokenizers import decoders, models, pre_tokenizers, processors

from msjax.errors import InputError
from msjax.text import hf_tokenizer
from msjax.text.hf_tokenizer import HfTokenizer, find_silence, hf_json, train_bpe
from msjax.text.tokenizer import ByteTokenizer

BPE = train_bpe(CORPUS, 280)
GPT = HfTokenizer(byte_level_json())
SENTENCEPIECE = HfTokenizer(sentencepiece_json())
UNIGRAM = HfTokenizer(unigram_json(), silence="<s>")


# Text and its tokens.


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_sentencepiece_keeps_text(text):
  assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == text


@given(text=st.text("helo wrd-"))
def test_metaspace_keeps_all_but_one_leading_space(text):
  assert UNIGRAM.decode(UNIGRAM.encode(text)) == text.removeprefix(" ")


@pytest.mark.parametrize("tokenizer", [BPE, GPT, SENTENCEPIECE, UNIGRAM])
def test_own_decoding_is_that_of_tokenizers(tokenizer):
  hf = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  ids = [id for text in CORPUS for id in tokenizer.encode(text)]
  ids = (ids if tokenizer is UNIGRAM else tokenizer.encode("caf\u00e9")) + ids
  for start in range(len(ids)):  # a stream may start anywhere, within a character too
    assert tokenizer.decode(ids[start:]) == hf.decode(ids[start:])


def test_spaces_stand_where_sentencepiece_had_them():
  decoder = SENTENCEPIECE.stream_decoder()
  pieces = [decoder.push(id) for id in SENTENCEPIECE.encode("the  test - the")]
  assert pieces == ["the", " ", " test", " ", "-", " the"]


def test_wordpiece_joins_and_parts_words():
  vocab = {"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3, "-": 4, "on": 5, "o": 6, "n": 7}
  hf = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  hf.pre_tokenizer = pre_tokenizers.Whitespace()
  hf.decoder = decoders.WordPiece()
  tokenizer = HfTokenizer(hf.to_str(), end="[SEP]")
  assert tokenizer.encode("playing on") == [2, 3, 5]
  assert tokenizer.decode([2, 3, 5]) == "playing on"
  with pytest.raises(InputError, match=r"'on'.*no smaller tokens"):  # "o n" would be another text
    HfTokenizer(hf.to_str(), silence="on", end="[SEP]").encode("playing on")


def test_cells_keep_their_spaces():
  assert [GPT.cell_text(id) for id in GPT.encode("the test")] == ["t", "he", " test"]
  ids = SENTENCEPIECE.encode("the test")
  assert [SENTENCEPIECE.cell_text(id) for id in ids] == [" the", " test"]


def test_alphabet_of_byte_level_is_that_of_tokenizers():
  assert set(hf_tokenizer._BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
  assert sorted(hf_tokenizer._BYTE_OF.values()) == list(range(256))


def test_vocabulary_counts_added_tokens_and_gaps():
  vocab = {"a": 0, "-": 5, "</s>": 7}
  hf = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
  hf.add_tokens(["<think>"])
  tokenizer = HfTokenizer(hf.to_str(), silence="-")
  assert tokenizer.vocab_size == 8
  assert tokenizer.special_ids == {1, 2, 4, 5, 6, 7}
  assert [tokenizer.byte_length(id) for id in range(8)] == [
    len(" a"),
    0,
    0,
    len(" <think>"),
    *[0] * 4,
  ]
  assert tokenizer.cell_text(4) == "<unused 4>"
  assert tokenizer.decode([4, 0, 3]) == "a <think>"
  with pytest.raises(InputError, match="silence: 4"):
    HfTokenizer(hf.to_str(), silence=4)


def test_added_token_of_byte_level_is_spelled_as_it_reads():
  hf = tokenizers.Tokenizer.from_str(byte_level_json())
  hf.add_tokens(["caf\u00e9"])
  tokenizer = HfTokenizer(hf.to_str())
  assert tokenizer.encode("caf\u00e9") == [tokenizer.vocab_size - 1]
  assert tokenizer.decode([tokenizer.vocab_size - 1]) == "caf\u00e9"


def test_copies_keep_the_chosen_tokens():
  tokenizer = HfTokenizer(byte_level_json(), silence="Ġthe", end="Ġ-")
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert (copy.silence_id, copy.end_id) == (tokenizer.silence_id, tokenizer.end_id)


def test_decoder_that_needs_more_than_one_token():
  data = json.loads(byte_level_json())
  data["decoder"] = {"type": "CTC", "pad_token": "_", "word_delimiter_token": "|", "cleanup": True}
  with pytest.raises(InputError, match="decoder 'CTC'"):
    HfTokenizer(json.dumps(data))


def test_truncation_and_padding_of_the_file_are_off():
  hf = tokenizers.Tokenizer.from_str(byte_level_json())
  hf.enable_truncation(2)
  hf.enable_padding(length=99)
  hf.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  assert HfTokenizer(hf.to_str()).encode("a, b, c") == GPT.encode("a, b, c")


# Special tokens in text.


def test_typed_special_takes_no_spaces_with_it():
  hf = tokenizers.Tokenizer.from_str(byte_level_json())
  hf.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True)])
  tokenizer = HfTokenizer(hf.to_str())
  assert tokenizer.decode(tokenizer.encode("a  <mask>  b")) == "a  <mask>  b"
  assert tokenizer.decode([*tokenizer.encode("a"), hf.token_to_id("<mask>")]) == "a"


def test_merges_that_spell_a_special_do_not_make_it():
  corpus = ["<end>x", "<end>y"] * 4
  specials = ["<silence>", "<end>"]
  tokenizer = HfTokenizer(byte_level_json(corpus, specials, use_regex=False))
  hf = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  hf.encode_special_tokens = True
  assert tokenizer.end_id in hf.encode("<end>").ids  # the trap is there
  assert tokenizer.end_id not in tokenizer.encode("<end>")
  assert tokenizer.decode(tokenizer.encode("<end>")) == "<end>"


def test_pieces_of_unigram_that_are_control_tokens_do_not_come_from_text():
  with pytest.raises(InputError, match="</s>"):
    UNIGRAM.encode("the </s>")


def test_text_is_encoded_around_silence_and_counted(monkeypatch):
  tokenizer = HfTokenizer(byte_level_json())
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
  assert tokenizer.name(tokenizer.silence_id) == "Ġ-"
  ids = tokenizer.encode("a - b - c")
  assert tokenizer.silence_id not in ids
  assert tokenizer.decode(ids) == "a - b - c"
  assert tokenizer.silence_collisions == 2
  for _ in range(30):
    tokenizer.encode("a -")
  assert tokenizer.silence_collisions == 32
  assert len(warnings) == 2
  assert "'Ġ-' 2 times" in warnings[0] and "'Ġ-' 20 times" in warnings[1]


def test_silence_that_has_no_smaller_parts():
  tokenizer = HfTokenizer(byte_level_json(), silence="-")
  assert tokenizer.decode(tokenizer.encode("the test")) == "the test"
  with pytest.raises(InputError, match=r"'-'.*no smaller tokens"):
    tokenizer.encode("3-4")
  assert tokenizer.silence_collisions == 0


def test_sentencepiece_spells_silence_by_bytes_where_it_must():
  tokenizer = HfTokenizer(sentencepiece_json(), silence="-")
  ids = tokenizer.encode("3-4")
  assert [tokenizer.cell_text(id) for id in ids][-2:] == ["-", "4"]
  assert tokenizer.silence_id not in ids
  assert tokenizer.decode(ids) == "3-4"


# Text without a token.


def test_text_without_a_token_is_not_dropped():
  with pytest.raises(InputError, match="'漢' at character 4"):
    UNIGRAM.encode("the 漢")


def test_bpe_without_unknown_token_does_not_drop_text():
  data = json.loads(byte_level_json())
  del data["model"]["vocab"]["z"]
  tokenizer = HfTokenizer(json.dumps(data))
  assert tokenizer.decode(tokenizer.encode("the test")) == "the test"
  with pytest.raises(InputError, match="'z' at character 1"):
    tokenizer.encode("az")


def test_word_level_without_unknown_token():
  hf = tokenizers.Tokenizer(models.WordLevel({"a": 0, "-": 1, "</s>": 2}))
  with pytest.raises(InputError, match="'b'"):
    HfTokenizer(hf.to_str(), silence="-").encode("b")


# Silence, end and pad.


def test_silence_follows_the_official_release():
  assert GPT.name(GPT.silence_id) == "Ġ-"
  assert SENTENCEPIECE.name(SENTENCEPIECE.silence_id) == "\u2581-"
  assert BPE.name(BPE.silence_id) == "<silence>"


def test_rule_that_finds_no_dash():
  hf = tokenizers.Tokenizer.from_str(byte_level_json(corpus=["hello"]))
  with pytest.raises(InputError, match=r"' ', no dash.*--silence=TOKEN"):
    find_silence(hf)
  with pytest.raises(InputError, match="silence=TOKEN"):
    HfTokenizer(unigram_json())
  empty = tokenizers.Tokenizer(models.WordLevel({"</s>": 0}))
  with pytest.raises(InputError, match="silence=TOKEN"):
    find_silence(empty)


def test_silence_by_name_and_by_id():
  the = GPT.encode(" the")[0]
  assert HfTokenizer(byte_level_json(), silence="Ġthe").silence_id == the
  assert HfTokenizer(byte_level_json(), silence=the).silence_id == the
  with pytest.raises(InputError, match="did you mean 'Ġthe'"):
    HfTokenizer(byte_level_json(), silence="_the")
  for id in (-1, GPT.vocab_size):
    with pytest.raises(InputError, match=f"silence: {id}"):
      HfTokenizer(byte_level_json(), silence=id)
  with pytest.raises(InputError, match="is the end token"):
    HfTokenizer(byte_level_json(), silence="<|endoftext|>")


def test_end_and_pad():
  chat = byte_level_json(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
  tokenizer = HfTokenizer(chat)
  assert tokenizer.name(tokenizer.end_id) == "<|im_end|>"
  assert tokenizer.name(tokenizer.pad_id) == "<|endoftext|>"
  assert HfTokenizer(chat, end="<|im_start|>").end_id == 1
  assert SENTENCEPIECE.name(SENTENCEPIECE.end_id) == "</s>"
  assert SENTENCEPIECE.pad_id == SENTENCEPIECE.end_id
  with pytest.raises(InputError, match="end=TOKEN"):
    HfTokenizer(byte_level_json(specials=["<x>"]))
  with pytest.raises(InputError, match="end: '<x>'"):
    HfTokenizer(byte_level_json(), end="<x>")


# Training.


def test_training_is_deterministic():
  again = train_bpe(iter(CORPUS), 280)
  assert again.to_json() == BPE.to_json()
  assert BPE.vocab_size == 280
  assert BPE.special_ids == {BPE.silence_id, BPE.pad_id, BPE.end_id}
  assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_training_needs_room_for_all_bytes():
  assert train_bpe([], 259).decode(train_bpe([], 259).encode(HARD)) == HARD
  with pytest.raises(InputError, match=r"258.*259"):
    train_bpe(CORPUS, 258)


def test_bytes_are_the_same_to_hugging_face():
  ours = ByteTokenizer(["+3", "*7"])
  theirs = tokenizers.Tokenizer.from_str(hf_json(ours))
  for text in ("5+3*7=", "Grüße, 世界!\n  two", "\x00\x7f"):
    assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
  again = HfTokenizer(hf_json(ours))
  same = ("vocab_size", "silence_id", "pad_id", "end_id")
  assert [getattr(again, name) for name in same] == [getattr(ours, name) for name in same]
  assert [again.text_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
  with pytest.raises(InputError, match="added token '=': Hugging Face would take it for a byte"):
    hf_json(ByteTokenizer(["="]))
