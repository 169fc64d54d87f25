"""Text to cells and back, for both tokenizers."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from absl import logging
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from msjax.errors import InputError
from msjax.text import tokenizer as tokenizer_lib
from msjax.text.tokenizer import ByteTokenizer, HfTokenizer, find_silence, load, train_bpe

CORPUS = ["hello world - the test of the words", "a - b - c, and then 3 + 4 = 7\n"] * 8
HARD = "e\u0301 नमस्ते 漢字 👩‍👩‍👧 🙂\u200d\ufffd \x00\t\r\n  two"
TYPED_SPECIALS = "<silence> <pad><end> </s> <unk>"
TEXTS = st.text() | st.lists(
  st.sampled_from(
    [" -", "-", " ", "+3", "+", "3", "🙂", "漢", "e\u0301", "\n", *TYPED_SPECIALS.split()]
  )
).map("".join)


def metaspace_json(model, trainer, decoder) -> str:
  """A tokenizer.json that spells spaces as U+2581, as SentencePiece does."""
  hf = tokenizers.Tokenizer(model)
  hf.pre_tokenizer = pre_tokenizers.Metaspace()
  hf.decoder = decoder
  hf.train_from_iterator(CORPUS, trainer)
  return hf.to_str()


def sentencepiece_json() -> str:
  """Llama 2's kind: BPE whose unknown characters fall back to bytes."""
  trainer = trainers.BpeTrainer(
    vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
  )
  decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  model = models.BPE(unk_token="<unk>", byte_fallback=True)
  data = json.loads(metaspace_json(model, trainer, decoder))
  normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  data |= {"normalizer": json.loads(normalizer.__getstate__()), "pre_tokenizer": None}
  vocab = data["model"]["vocab"]
  vocab |= {f"<0x{b:02X}>": len(vocab) + b for b in range(256)}
  return json.dumps(data)


def unigram_json() -> str:
  """T5's kind: no bytes to fall back to; control tokens are pieces like others."""
  trainer = trainers.UnigramTrainer(
    vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
  )
  return metaspace_json(models.Unigram(), trainer, decoders.Metaspace())


def byte_level_json(corpus=CORPUS, specials=("<|endoftext|>",), **regex) -> str:
  """GPT-2's kind, without tokens of msjax's own."""
  hf = tokenizers.Tokenizer(models.BPE())
  hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **regex)
  hf.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=list(specials),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  hf.train_from_iterator(corpus, trainer)
  return hf.to_str()


BYTES = ByteTokenizer(["+3", "+", "+34", "🙂"])
BPE = train_bpe(CORPUS, 280)
GPT = HfTokenizer(byte_level_json())
SENTENCEPIECE = HfTokenizer(sentencepiece_json())
UNIGRAM = HfTokenizer(unigram_json(), silence="<s>")
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


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_sentencepiece_keeps_text(text):
  ids = SENTENCEPIECE.encode(text)
  assert SENTENCEPIECE.decode(ids) == streamed(SENTENCEPIECE, ids) == text


@given(text=st.text("helo wrd-"))
def test_metaspace_keeps_all_but_one_leading_space(text):
  assert UNIGRAM.decode(UNIGRAM.encode(text)) == text.removeprefix(" ")


@ALL
@given(text=TEXTS, data=st.data())
def test_silence_pad_end_and_holes_leave_no_trace(tokenizer, text, data):
  ids = tokenizer.encode(text)
  skipped = [-1, tokenizer.silence_id, tokenizer.pad_id, tokenizer.end_id]
  spread = [
    cell for id in ids for cell in [*data.draw(st.lists(st.sampled_from(skipped), max_size=2)), id]
  ]
  assert streamed(tokenizer, spread) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [BPE, GPT, SENTENCEPIECE, UNIGRAM])
def test_own_decoding_is_that_of_tokenizers(tokenizer):
  hf = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  ids = [id for text in CORPUS for id in tokenizer.encode(text)]
  ids = (ids if tokenizer is UNIGRAM else tokenizer.encode("caf\u00e9")) + ids
  for start in range(len(ids)):  # a stream may start anywhere, within a character too
    assert tokenizer.decode(ids[start:]) == hf.decode(ids[start:])


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


def test_typed_special_takes_no_spaces_with_it():
  hf = tokenizers.Tokenizer.from_str(byte_level_json())
  hf.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True)])
  tokenizer = HfTokenizer(hf.to_str())
  assert tokenizer.decode(tokenizer.encode("a  <mask>  b")) == "a  <mask>  b"
  assert tokenizer.decode([*tokenizer.encode("a"), hf.token_to_id("<mask>")]) == "a"


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


def test_truncation_and_padding_of_the_file_are_off():
  hf = tokenizers.Tokenizer.from_str(byte_level_json())
  hf.enable_truncation(2)
  hf.enable_padding(length=99)
  hf.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  assert HfTokenizer(hf.to_str()).encode("a, b, c") == GPT.encode("a, b, c")


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


def test_cells_keep_their_spaces():
  assert [GPT.cell_text(id) for id in GPT.encode("the test")] == ["t", "he", " test"]
  ids = SENTENCEPIECE.encode("the test")
  assert [SENTENCEPIECE.cell_text(id) for id in ids] == [" the", " test"]


def test_alphabet_of_byte_level_is_that_of_tokenizers():
  assert set(tokenizer_lib._BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
  assert sorted(tokenizer_lib._BYTE_OF.values()) == list(range(256))


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


# Files.


@ALL
def test_saved_and_loaded(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  assert [f.name for f in tmp_path.iterdir()] == ["tokenizer.json"]
  for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
    loaded = load(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(HARD) == tokenizer.encode(HARD)
    assert loaded.special_ids == tokenizer.special_ids


def test_file_of_hugging_face_is_kept_byte_for_byte(tmp_path):
  original = json.dumps(json.loads(byte_level_json()), indent=3, ensure_ascii=False)
  original = original.replace("\n", "\r\n").encode()
  (tmp_path / "a.json").write_bytes(original)
  load(tmp_path / "a.json").save(tmp_path / "b.json")
  assert (tmp_path / "b.json").read_bytes() == original


def test_load_passes_the_choice_of_silence_and_end(tmp_path):
  GPT.save(tmp_path)
  tokenizer = load(tmp_path, silence="Ġthe", end="Ġ-")
  assert [tokenizer.name(tokenizer.silence_id), tokenizer.name(tokenizer.end_id)] == ["Ġthe", "Ġ-"]
  BYTES.save(tmp_path)
  assert load(tmp_path, silence=256).silence_id == 256
  with pytest.raises(InputError, match="silence='-'"):
    load(tmp_path, silence="-")


@pytest.mark.parametrize(
  ("content", "problem"),
  [
    (b"", "not JSON"),
    (b'{"a": ', "not JSON"),
    (b"\xff", "not JSON"),
    (b"[]", "not a Hugging Face"),
    (b"{}", "not a Hugging Face"),
    (b'{"type": "msjax-bytes", "format_version": 2, "added": []}', "format_version 2"),
    (b'{"type": "msjax-bytes", "added": []}', "format_version null"),
    (b'{"type": "msjax-bytes", "format_version": 1}', "added: null"),
    (b'{"type": "msjax-bytes", "format_version": 1, "added": [3]}', r"added: \[3\]"),
    (b'{"type": "msjax-bytes", "format_version": 1, "added": [""]}', "added token ''"),
  ],
)
def test_bad_file_is_named(content, problem, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(InputError, match=rf"tokenizer\.json: .*{problem}"):
    load(tmp_path)


def test_file_that_is_not_there(tmp_path):
  with pytest.raises(InputError, match=r"tokenizer\.json: No such file"):
    load(tmp_path)


def test_decoder_that_needs_more_than_one_token():
  data = json.loads(byte_level_json())
  data["decoder"] = {"type": "CTC", "pad_token": "_", "word_delimiter_token": "|", "cleanup": True}
  with pytest.raises(InputError, match="decoder 'CTC'"):
    HfTokenizer(json.dumps(data))
