"""From a config to what it trains on: tokenizer, streams, training and held-out examples."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import logging

from msjax.config import Config
from msjax.data import chitchat, synthetic
from msjax.data.formats import BadRecords, Conversation, Record, Script, read
from msjax.data.layout import Layout
from msjax.data.pipeline import SPLITS, OneStream, Source
from msjax.data.source import Example, JsonlSource, RecordSource
from msjax.errors import InputError
from msjax.streams import Streams
from msjax.text import tokenizer_file
from msjax.text.hf_tokenizer import train_bpe
from msjax.text.tokenizer import ByteTokenizer, Tokenizer


class Data(NamedTuple):
  """What a run reads.

  Attributes:
    tokenizer: of all its text.
    streams: with the tokenizer's silence token.
    train: examples of at most `config.data.rows` rows.
    valid: held-out ones, or None.
  """

  tokenizer: Tokenizer
  streams: Streams
  train: Source
  valid: Source | None

  @property
  def fingerprints(self) -> dict[str, str]:
    """Tells the data of one run from that of another; by split."""
    return {s: source.fingerprint for s in SPLITS if (source := getattr(self, s)) is not None}


def load(config: Config, made_before: pathlib.Path | None = None) -> Data:
  """Reads and checks all data of a run.

  Args:
    config: valid.
    made_before: a tokenizer.json that an earlier start of this very run trained, if it exists.
  """
  d = config.data
  if d.source == "arithmetic":
    tokenizer, streams, sources = _arithmetic(config)
  else:
    tokenizer = _tokenizer(config, made_before)
    streams = config.stream_set(tokenizer.silence_id)
    sources = _sources(config, streams, tokenizer)
  if d.only_one_stream:
    sources = [source and OneStream(source, len(streams)) for source in sources]
  for split, source in zip(SPLITS, sources):
    if source and not any(_teaches(source[i], config, streams) for i in range(len(source))):
      raise InputError(
        f"config.data.{split}: no cell has a loss weight; expected some in the trained streams of "
        f"{', '.join(map(str, streams.streams))}"
      )
    logging.info("%s: %s examples", split, f"{len(source):,}" if source else "no")
  return Data(tokenizer, streams, *sources)


def check(config: Config) -> None:
  """Raises what `load` would, as far as it can be told without reading anything."""
  if config.data.source == "arithmetic":
    _arithmetic(config)


def tokenizer(config: Config) -> Tokenizer:
  """Returns the tokenizer of a run without reading its data, unless it is to be trained on it."""
  return synthetic.tokenizer() if config.data.source == "arithmetic" else _tokenizer(config, None)


def _arithmetic(config: Config) -> tuple[Tokenizer, Streams, list[Source]]:
  d, seed, tokenizer = config.data, config.train.seed, synthetic.tokenizer()
  streams = config.stream_set(tokenizer.silence_id)
  ops = (d.min_ops, d.max_ops)
  made = lambda split: synthetic.Arithmetic(split, streams, tokenizer, ops, d.chat, d.rows, seed)
  return tokenizer, streams, [made(split) for split in SPLITS]


def _teaches(example: Example, config: Config, streams: Streams) -> bool:
  """Whether any cell is predicted with a weight."""
  tokens, weights = example.tokens[None], example.weights[None]
  _, weights = streams.labels(tokens, None, weights, config.loss.silence_weight)
  return bool(weights.any())


def layout_of(config: Config) -> Layout:
  """Returns the layout of messages."""
  d = config.data
  return Layout(d.layout, d.wait_k, d.rows_per_second, d.max_pause, d.end_token)


def _sources(config: Config, streams: Streams, tokenizer: Tokenizer) -> list[Source | None]:
  d, layout = config.data, layout_of(config)
  if d.source == "chitchat":
    chats = chitchat.conversations()
    return [
      RecordSource(
        (c for c in chats if chitchat.split(c.id) == split),
        *(streams, tokenizer, layout, d.rows),
        BadRecords(d.on_bad_record),
        name=f"chitchat ({split})",
      )
      for split in SPLITS
    ]
  paths = (d.train, d.valid)
  return [
    JsonlSource(path, streams, tokenizer, layout, d.rows, d.on_bad_record) if path else None
    for path in paths
  ]


def _tokenizer(config: Config, made_before: pathlib.Path | None) -> Tokenizer:
  spec = config.data.tokenizer
  if spec == "bytes":
    return ByteTokenizer()
  if not spec.startswith("bpe:"):
    return tokenizer_file.load(
      spec,
      silence=config.data.silence or None,
      end=config.data.end or None,
      vocab_size=config.model.vocab_size,
    )
  size = spec.removeprefix("bpe:")
  if not size.isdigit() or int(size) < 300:
    raise InputError(
      f"config.data.tokenizer: {spec!r}; expected bpe:SIZE, SIZE 300 or more, as in bpe:4096"
    )
  if made_before is not None and made_before.exists():
    return tokenizer_file.load(made_before)
  logging.info("training a BPE tokenizer of %s tokens on the training text", size)
  return train_bpe(_texts(_training_records(config)), int(size))


def _training_records(config: Config) -> Iterable[Record]:
  if config.data.source == "chitchat":
    return (c for c in chitchat.conversations() if chitchat.split(c.id) == "train")
  bad = BadRecords(config.data.on_bad_record, tell=logging.debug)  # told when they are laid out
  return (record for _, record in read(config.data.train, bad))


def _texts(records: Iterable[Record]) -> Iterator[str]:
  for record in records:
    if isinstance(record, Conversation):
      yield from (m.content for m in record.messages)
    elif isinstance(record, Script):
      yield from (s.text for s in record.spans)
    else:
      raise InputError(
        f"{record.where}: a table has no text to train a tokenizer on; "
        "expected messages or spans, or give --config.data.tokenizer=FILE"
      )
