"""Hugging Face's tokenizers: those a tokenizer.json describes, and byte-level BPE trained here."""

import json
import re
from collections.abc import Iterable

import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from msjax.errors import InputError, nearest
from msjax.text.tokenizer import END, PAD, SILENCE, SPECIALS, ByteTokenizer, Tokenizer, unicode_text

PAD_NAMES = (PAD, "<|endoftext|>")
END_NAMES = (END, "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
END_NAMES += ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Decoders that give a token the same bytes wherever it stands, but for the first of a text.
DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class HfTokenizer(Tokenizer):
  """Any Hugging Face tokenizer.json whose decoder joins its tokens' texts."""

  def __init__(
    self,
    json_text: str,
    silence: str | int | None = None,
    end: str | None = None,
    vocab_size: int = 0,
  ):
    """Reads a tokenizer.json.

    Args:
      json_text: the file, kept as it is.
      silence: id or name (as the vocabulary spells it) of the silence token; None: `find_silence`.
      end: name of the token that ends a message; None: the first known one of `END_NAMES`.
      vocab_size: of a model that has room for more tokens than there are; 0: as many as there are.

    Raises:
      InputError: the text is no tokenizer, its decoder is not supported, or a token is missing.
    """
    self._arguments = json_text, silence, end, vocab_size
    self._hf = _parse(json_text)
    data = json.loads(json_text)
    kinds = _decoder_kinds(data.get("decoder"))
    self._byte_level = "ByteLevel" in kinds
    self._byte_fallback = "ByteFallback" in kinds
    vocab = self._hf.get_vocab(with_added_tokens=True)
    ids = max(vocab.values(), default=-1) + 1
    self.vocab_size = vocab_size or ids
    if self.vocab_size < ids:
      raise InputError(f"vocab_size: {vocab_size}; the vocabulary has ids up to {ids - 1}")

    self.end_id = self._known(END_NAMES) if end is None else self._chosen("end", end)
    if self.end_id is None:
      raise InputError(
        f"end: the vocabulary has none of {', '.join(END_NAMES)}; "
        "give --end=TOKEN (or config.data.end)"
      )
    pad = self._known(PAD_NAMES)
    self.pad_id = self.end_id if pad is None else pad
    self._unknown_id = self._find_unknown(data["model"])  # before anything is encoded
    self.silence_id = (
      find_silence(self._hf) if silence is None else self._chosen("silence", silence)
    )
    if self.silence_id == self.end_id:
      raise InputError(f"silence: {self.name(self.end_id)!r} is the end token; choose another")
    self._warn_at = 1  # silence collisions

    added = self._hf.get_added_tokens_decoder()
    self._added = frozenset(added)
    self.special_ids = frozenset(
      {self.silence_id, self.pad_id, self.end_id}
      | {id for id, token in added.items() if token.special}
      | (set(range(self.vocab_size)) - set(vocab.values()))
    )

  def _chosen(self, role: str, token: str | int) -> int:
    """Id of a token that a user chose by name or id."""
    if isinstance(token, str):
      id = self._hf.token_to_id(token)
    else:
      id = token if 0 <= token < self.vocab_size and self._hf.id_to_token(token) else None
    if id is None:
      raise InputError(
        f"{role}: {token!r} is not in the vocabulary of {self.vocab_size}; expected a token as it "
        f"is spelled there{nearest(str(token), self._hf.get_vocab(with_added_tokens=True))}"
      )
    return id

  def _known(self, names: Iterable[str]) -> int | None:
    """Id of the first of these tokens that there is."""
    ids = map(self._hf.token_to_id, names)
    return next((id for id in ids if id is not None), None)

  def _find_unknown(self, model: dict) -> int | None:
    """Id that stands for what the model (as the file has it) has no token for."""
    unknown = model.get("unk_token")
    if model["type"] == "BPE" and unknown is None:
      # Such a model drops what it does not know; with this it tells.
      self._hf.model.unk_token = unknown = self.name(self.end_id)
    return model.get("unk_id") if unknown is None else self._hf.token_to_id(unknown)

  def __reduce__(self):
    """Pickles the arguments: `tokenizers` would forget that special tokens are not to be read."""
    return HfTokenizer, self._arguments

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text; what would be a special token is spelled in smaller ones."""
    try:
      encoding = self._hf.encode(unicode_text(text), add_special_tokens=False)
    except InputError:
      raise
    except Exception as e:  # `tokenizers` raises nothing narrower
      raise InputError(f"text {text[:40]!r} cannot be encoded: {e}") from None
    ids = encoding.ids
    if self._unknown_id in ids:
      self._check_known(text, encoding)
    if self.special_ids.isdisjoint(ids):
      return ids
    around = [part for id in ids for part in (self._spell(id) if id in self.special_ids else [id])]
    self._count_collisions(ids.count(self.silence_id))
    return around

  def _check_known(self, text: str, encoding: tokenizers.Encoding) -> None:
    """InputError for text that became the unknown token; somebody may well type its name."""
    for id, (start, end) in zip(encoding.ids, encoding.offsets):
      if id == self._unknown_id and text[start:end] != self.name(id):
        raise InputError(
          f"text has {text[start:end]!r} at character {start}, for which the tokenizer has no "
          f"token; leave it out, or take a byte-level tokenizer"
        )

  def _spell(self, id: int) -> list[int]:
    """Tokens of single characters (or bytes) that read as a special one would."""
    parts = []
    for character in self.name(id):
      part = self._hf.token_to_id(character)
      if part is None or part in self.special_ids:
        parts += [self._hf.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
      else:
        parts.append(part)
    if None in parts or b"".join(map(self.text_bytes, parts)) != self.text_bytes(id):
      raise InputError(
        f"text holds {self.name(id)!r}, which is a special token here, and the vocabulary has no "
        f"smaller tokens for it; choose another silence or end token, or another text"
      )
    return parts

  def _count_collisions(self, count: int) -> None:
    """Counts silence tokens in text; warns of the first and whenever the count grew tenfold."""
    self.silence_collisions += count
    if self.silence_collisions >= self._warn_at:
      self._warn_at = 10 * self.silence_collisions
      logging.warning(
        "text held the silence token %r %d times so far; it was encoded around it",
        self.name(self.silence_id),
        self.silence_collisions,
      )

  def text_bytes(self, id: int, first: bool = False) -> bytes:
    """Returns what a token adds to a text; the first of a text may lose its leading space."""
    token = self.name(id)
    if self._byte_level:
      if id in self._added or not _BYTE_OF.keys() >= set(token):
        return token.encode()
      return bytes(_BYTE_OF[c] for c in token)
    if self._byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
      return bytes.fromhex(byte[1])
    once = self._hf.decode([id], skip_special_tokens=False)
    twice = self._hf.decode([id, id], skip_special_tokens=False)
    return (once if first else twice[len(once) :]).encode()

  def name(self, id: int) -> str:
    """Returns a token as the vocabulary spells it, or `<unused ID>` for an id without one."""
    token = self._hf.id_to_token(id)
    return f"<unused {id}>" if token is None else token

  def to_json(self) -> str:
    """Returns the tokenizer.json as it was read."""
    return self._arguments[0]


def find_silence(tokenizer: tokenizers.Tokenizer) -> int:
  """Returns the id of `<silence>`, or of the dash that the official release takes for silence."""
  own = tokenizer.token_to_id(SILENCE)
  return release_silence(tokenizer) if own is None else own


def release_silence(tokenizer: tokenizers.Tokenizer) -> int:
  """Returns the id of what the official release takes for silence.

  That is the first token of "-" if the vocabulary is SentencePiece's (the first token of
  "test" starts with U+2581), else of " -".

  Raises:
    InputError: that token is no dash: ordinary text, or a space alone.
  """
  test = _first_token(tokenizer, "test")
  sentencepiece = test is not None and tokenizer.id_to_token(test).startswith("\u2581")
  dash = "-" if sentencepiece else " -"
  found = _first_token(tokenizer, dash)
  text = "" if found is None else tokenizer.decode([found], skip_special_tokens=False)
  if text not in ("-", " -"):
    raise InputError(
      f"silence: the official release's rule takes the first token of {dash!r}, which here is "
      f"{text!r}, no dash; choose a token that no text needs with silence=TOKEN (--silence=TOKEN)"
    )
  return found


def train_bpe(texts: Iterable[str], vocab_size: int) -> HfTokenizer:
  """Trains a byte-level BPE; the same texts give the same tokenizer.

  Args:
    texts: what to train on.
    vocab_size: at most so many tokens, <silence>, <pad>, <end> and the 256 bytes included.

  Returns:
    A tokenizer to which no text is unknown.
  """
  least = 256 + len(SPECIALS)
  if vocab_size < least:
    raise InputError(
      f"vocab_size: {vocab_size} is too small; expected at least {least}: 256 bytes and "
      f"{', '.join(SPECIALS)}"
    )
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(map(unicode_text, texts), trainer)
  return HfTokenizer(bpe.to_str())


def hf_json(tokenizer: Tokenizer) -> str:
  """Returns a tokenizer.json that Hugging Face's library reads, with the same ids.

  Raises:
    InputError: an added token of a byte tokenizer is spelled as a byte is.
  """
  if not isinstance(tokenizer, ByteTokenizer):
    return tokenizer.to_json()
  bpe = tokenizers.Tokenizer(models.BPE(_BYTE_OF, []))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(list(SPECIALS))
  bpe.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokenizer.added])
  for id, token in enumerate((*SPECIALS, *tokenizer.added), start=256):
    if bpe.token_to_id(token) != id:
      raise InputError(
        f"added token {token!r}: Hugging Face would take it for a byte; expected a longer one"
      )
  return bpe.to_str()


def _byte_alphabet() -> dict[str, int]:
  """The characters in which byte-level vocabularies spell bytes.

  Printable Latin-1 stands for itself, the other bytes in turn for the characters from U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = sorted(set(range(0x100)) - set(printable))
  return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _parse(json_text: str) -> tokenizers.Tokenizer:
  """Reads a tokenizer that takes all text as text and never cuts or pads it."""
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json_text)
  except Exception as e:  # `tokenizers` raises nothing narrower
    raise InputError(f"not a Hugging Face tokenizer.json: {e}") from None
  tokenizer.encode_special_tokens = True
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _decoder_kinds(decoder: dict | None) -> set[str]:
  """What a tokenizer.json's decoder is made of; InputError if it does not go token by token."""
  parts = [] if decoder is None else decoder.get("decoders", [decoder])
  kinds = {part["type"] for part in parts}
  if not kinds <= DECODERS:
    raise InputError(
      f"decoder {min(kinds - DECODERS)!r} is not supported; "
      f"expected one made of {', '.join(sorted(DECODERS))}"
    )
  return kinds


def _first_token(tokenizer: tokenizers.Tokenizer, text: str) -> int | None:
  """First token of a text, or None where the tokenizer has none for it."""
  try:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
  except Exception:  # a vocabulary without [UNK]
    return None
  return ids[0] if ids else None
