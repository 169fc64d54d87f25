import json
import logging

import numpy as np
import pytest

from msjax.config import Config, DataConfig, TrainConfig
from msjax.data import chitchat, load
from msjax.data.formats import Conversation, Message
from msjax.data.layout import Layout
from msjax.errors import InputError, RecordError
from msjax.text.hf_tokenizer import train_bpe

CHAT = {
  "messages": [
    {"role": "user", "content": "hi there", "time": 0},
    {"role": "assistant", "content": "hello you", "time": 20},
  ]
}
SCRIPT = {
  "streams": ["user", "output"],
  "spans": [
    {"stream": "user", "row": 0, "text": "ab"},
    {"stream": "output", "row": 3, "text": "c"},
  ],
}
TABLE = {"num_rows": 3, "token_ids": [[1, 2, 3], [4, None, 6]]}


def file_of(tmp_path, *records, name="train.jsonl"):
  path = tmp_path / name
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
  return str(path)


def config_of(path, **data):
  return Config(data=DataConfig(train=path, rows=64, **data), train=TrainConfig(eval_batches=1))


def said(source, index, stream, tokenizer):
  return tokenizer.decode(source[index].tokens[:, stream].tolist())


def test_files_become_examples_of_the_runs_streams(tmp_path):
  path = file_of(tmp_path, CHAT, SCRIPT, TABLE)
  valid = file_of(tmp_path, CHAT, name="valid.jsonl")
  data = load.load(config_of(path, valid=valid))
  assert (len(data.train), len(data.valid)) == (3, 1)
  assert data.streams.names == ("user", "output")
  assert data.streams.silence_id == data.tokenizer.silence_id
  assert said(data.train, 0, 0, data.tokenizer) == "hi there"
  assert said(data.train, 1, 1, data.tokenizer) == "c"
  np.testing.assert_array_equal(data.train[2].tokens, [[1, 4], [2, -1], [3, 6]])


def test_without_a_held_out_file_there_is_none(tmp_path):
  assert load.load(config_of(file_of(tmp_path, CHAT))).valid is None


def test_the_layout_is_the_configs(tmp_path):
  config = config_of("", layout="wait_k", wait_k=3, rows_per_second=2.0, max_pause=5.0)
  config.data.end_token = False
  assert load.layout_of(config) == Layout("wait_k", 3, 2.0, 5.0, False)


@pytest.mark.parametrize(
  "layout, options, first_answer_row",
  [
    ("turn", {}, len("hi there") - 1 + 1 + 2),  # its last token is <end>; then the lag of hidden
    ("wait_k", {"wait_k": 4}, 4),
    # 20 seconds cut to 3, at 4 rows each: <end> of the answer stands 12 rows below the other one.
    ("timestamps", {"rows_per_second": 4.0, "max_pause": 3.0}, 8 + 12 - len("hello you")),
  ],
)
def test_messages_are_laid_out_as_asked(tmp_path, layout, options, first_answer_row):
  data = load.load(config_of(file_of(tmp_path, CHAT), layout=layout, **options))
  output = data.train[0].tokens[:, 1]
  assert (output != data.tokenizer.silence_id).argmax() == first_answer_row


def test_one_wrong_record_stops_or_is_skipped_and_counted(tmp_path, caplog):
  path = file_of(tmp_path, CHAT, "{\n", SCRIPT, {"messages": [{"role": "user"}]})
  with pytest.raises(
    RecordError, match=r"train.jsonl:2: json: .*; expected one JSON object a line"
  ):
    load.load(config_of(path))
  data = load.load(config_of(path, on_bad_record="skip"))
  assert len(data.train) == 2
  listed = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
  assert [line.split(": ")[1] for line in listed[:2]] == [f"{path}:2", f"{path}:4"]
  assert listed[2] == "2 bad records are left out"


def test_training_a_tokenizer_lists_wrong_records_once(tmp_path, caplog):
  path = file_of(tmp_path, CHAT, "{\n")
  load.load(config_of(path, tokenizer="bpe:300", on_bad_record="skip"))
  assert [r.levelno for r in caplog.records if f"{path}:2" in r.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize(
  "record",
  [
    {"messages": [CHAT["messages"][0]]},
    {**TABLE, "loss_mask": [0, 0]},
    {**TABLE, "token_ids": [[1, 2, 3], [4, None, 6]]},
    {"num_rows": 1, "token_ids": [[1], [4]]},
  ],
)
def test_data_that_teaches_nothing_is_told(tmp_path, record):
  path, good = file_of(tmp_path, record), file_of(tmp_path, record, CHAT, name="good.jsonl")
  assert len(load.load(config_of(good)).train) == 2
  with pytest.raises(InputError, match=r"config.data.train: no cell has a loss.*output:output:1.0"):
    load.load(config_of(path))
  with pytest.raises(InputError, match=r"config.data.valid: no cell has a loss"):
    load.load(config_of(good, valid=path))


def test_fingerprints_go_by_split(tmp_path):
  chat, script = file_of(tmp_path, CHAT), file_of(tmp_path, SCRIPT, name="valid.jsonl")
  both = load.load(config_of(chat, valid=script)).fingerprints
  assert load.load(config_of(chat)).fingerprints == {"train": both["train"]}
  assert load.load(config_of(script, valid=chat)).fingerprints == {
    "train": both["valid"],
    "valid": both["train"],
  }


# Tokenizers.


def test_bpe_is_trained_on_the_training_text_alone(tmp_path):
  train = file_of(
    tmp_path, {"messages": [{"role": "assistant", "content": "wurzelwerk " * 50}]}, SCRIPT
  )
  valid = file_of(
    tmp_path,
    {"messages": [{"role": "assistant", "content": "quarkspeise " * 50}]},
    name="valid.jsonl",
  )
  data = load.load(config_of(train, valid=valid, tokenizer="bpe:300"))
  assert data.tokenizer.vocab_size <= 300
  assert len(data.tokenizer.encode("wurzelwerk")) < 3 < len(data.tokenizer.encode("quarkspeise"))
  assert data.streams.silence_id == data.tokenizer.silence_id


def test_bpe_made_before_is_taken_again(tmp_path):
  path = file_of(tmp_path, CHAT)
  before = train_bpe(["something else entirely"] * 9, 300)
  before.save(tmp_path / "tokenizer.json")
  again = load.load(config_of(path, tokenizer="bpe:300"), made_before=tmp_path / "tokenizer.json")
  assert again.tokenizer.to_json() == before.to_json()
  fresh = load.load(config_of(path, tokenizer="bpe:300"), made_before=tmp_path / "missing.json")
  assert fresh.tokenizer.to_json() != before.to_json()


def test_a_tokenizer_file_is_read_with_the_silence_that_was_asked_for(tmp_path):
  train_bpe(["a bit of text"], 300).save(tmp_path / "tokenizer.json")
  path = file_of(tmp_path, CHAT)
  data = load.load(config_of(path, tokenizer=str(tmp_path), silence="<pad>"))
  assert data.tokenizer.name(data.streams.silence_id) == "<pad>"


@pytest.mark.parametrize("spec", ["bpe:", "bpe:12", "bpe:many"])
def test_a_bpe_size_that_is_none_is_an_error(tmp_path, spec):
  with pytest.raises(InputError, match=f"config.data.tokenizer: '{spec}'; expected bpe:SIZE"):
    load.load(config_of(file_of(tmp_path, CHAT), tokenizer=spec))


def test_tables_have_no_text_to_train_a_tokenizer_on(tmp_path):
  path = file_of(tmp_path, CHAT, TABLE)
  with pytest.raises(InputError, match=f"{path}:2: a table has no text"):
    load.load(config_of(path, tokenizer="bpe:300"))


def test_a_missing_tokenizer_file_is_named(tmp_path):
  with pytest.raises(InputError, match=r"nowhere.json: No such file"):
    load.load(config_of(file_of(tmp_path, CHAT), tokenizer=str(tmp_path / "nowhere.json")))


# Sources that are built in.


def test_arithmetic_has_both_splits_and_its_own_tokenizer():
  config = Config(
    streams=("user:input", "think:internal", "output:output"),
    data=DataConfig(source="arithmetic", rows=14, max_ops=10),
    train=TrainConfig(seed=5, eval_batches=1),
  )
  data = load.load(config)
  assert (data.train.split, data.valid.split) == ("train", "valid")
  assert (data.train.seed, data.train.ops, data.train.rows) == (5, (2, 10), 14)
  assert len(data.tokenizer.encode("+3")) == 1


def test_only_one_stream_doubles_the_examples(tmp_path):
  data = load.load(config_of(file_of(tmp_path, CHAT), only_one_stream=True))
  assert len(data.train) == 2
  assert data.valid is None
  for stream in range(2):
    tokens = data.train[stream].tokens
    assert (tokens[:, 1 - stream] == -1).all() and (tokens[:, stream] != -1).any()


def test_chats_are_split_by_their_ids_and_the_tokenizer_sees_only_the_training_half(monkeypatch):
  talk = lambda id, text: Conversation((Message("assistant", text, time=0.0),), id=id)
  monkeypatch.setattr(
    chitchat, "conversations", lambda: [talk("a", "wurzel " * 40), talk("b", "quark " * 40)]
  )
  monkeypatch.setattr(chitchat, "split", lambda id: {"a": "train", "b": "valid"}[id])
  data = load.load(
    Config(data=DataConfig(source="chitchat", tokenizer="bpe:300", layout="timestamps"))
  )
  assert (data.train.record_id(0), data.valid.record_id(0)) == ("a", "b")
  assert len(data.tokenizer.encode("wurzel")) < 3 < len(data.tokenizer.encode("quark"))
