"""What the tokenizer tests share: texts, and a tokenizer.json of each of Hugging Face's kinds."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["hello world - the test of the words", "a - b - c, and then 3 + 4 = 7\n"] * 8
HARD = "e\u0301 नमस्ते 漢字 👩‍👩‍👧 🙂\u200d\ufffd \x00\t\r\n  two"


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
