"""Tokenizers from files and from the text of one."""

import json

import pytest
from tokenizer_cases import CORPUS, HARD, byte_level_json, sentencepiece_json

from msjax.errors import InputError
from msjax.text.hf_tokenizer import HfTokenizer, train_bpe
from msjax.text.tokenizer import ByteTokenizer
from msjax.text.tokenizer_file import load, parse

BYTES = ByteTokenizer(["+3", "+", "+34", "🙂"])
GPT = HfTokenizer(byte_level_json())
ALL = pytest.mark.parametrize(
  "tokenizer",
  [BYTES, train_bpe(CORPUS, 280), GPT, HfTokenizer(sentencepiece_json())],
  ids=["bytes", "bpe", "gpt", "sentencepiece"],
)


@ALL
def test_text_of_a_file_is_a_tokenizer(tokenizer):
  parsed = parse(tokenizer.to_json())
  assert type(parsed) is type(tokenizer)
  assert parsed.to_json() == tokenizer.to_json()
  assert parsed.encode(HARD) == tokenizer.encode(HARD)


def test_text_that_is_no_tokenizer():
  with pytest.raises(InputError, match=r"^not JSON"):
    parse("{")
  with pytest.raises(InputError, match=r"^not a Hugging Face"):
    parse("{}")


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
