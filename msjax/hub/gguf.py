"""A GGUF file as what a Hugging Face folder holds: config.json, tensors, tokenizer.json."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from msjax.errors import InputError
from msjax.hub.config import FAMILIES
from msjax.hub.weights import Tensors

_OUTER = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_CONFIG = {
  "hidden_size": "embedding_length",
  "intermediate_size": "feed_forward_length",
  "num_hidden_layers": "block_count",
  "num_attention_heads": "attention.head_count",
  "num_key_value_heads": "attention.head_count_kv",
  "rms_norm_eps": "attention.layer_norm_rms_epsilon",
  "head_dim": "attention.key_length",
  "rope_theta": "rope.freq_base",
  "max_position_embeddings": "context_length",
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
  r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Kind(NamedTuple):
  """What tokenizer.ggml.pre stands for: how text is cut before BPE, and how BPE goes about it."""

  cut: list[pre_tokenizers.PreTokenizer]
  normalizer: normalizers.Normalizer | None = None
  whole_words: bool = False  # a word that is a token stays one, whatever the merges say


_KINDS = {
  "smollm": _Kind(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  ),
  "qwen2": _Kind([_split(_WORDS % r"\p{N}"), _byte_level], normalizers.NFC()),
  "llama-bpe": _Kind([_split(_WORDS % r"\p{N}{1,3}"), _byte_level], whole_words=True),
}


class Gguf(Tensors):
  """Those of a GGUF file, dequantised to float32."""

  def __init__(self, path: pathlib.Path):
    """Opens a file; needs the package `gguf`.

    Raises:
      InputError: no GGUF file, or of an architecture that msjax does not compute.
    """
    try:
      import gguf
    except ImportError:
      raise InputError(f"{path}: needs the package gguf: pip install -e '.[hub]'") from None
    self.path, self._dequantize = path, gguf.dequantize
    try:
      self._reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
      raise InputError(f"{path}: cannot be read as GGUF: {error}") from None
    if self._field("split.count", 1) > 1:
      raise InputError(f"{path}: is one of several; join them by llama-gguf-split --merge")
    self._family = self._field("general.architecture")
    if self._family not in FAMILIES:
      raise InputError(
        f"{path}: general.architecture {self._family!r}; expected one of {', '.join(FAMILIES)}"
      )
    self._tensors = {_hf_name(t.name): t for t in self._reader.tensors}
    self.shapes = {n: tuple(int(d) for d in t.shape[::-1]) for n, t in self._tensors.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    """Reads a tensor."""
    tensor = self._tensors[name]
    try:
      array = self._dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
      raise InputError(
        f"{self.path}: {name} is quantised as {tensor.tensor_type.name}, which the package gguf "
        "does not read; expected another quantisation"
      ) from None
    heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
    of_heads = next((f for part, f in heads.items() if f".{part}." in name), None)
    if self._family != "llama" or of_heads is None:
      return array
    # llama.cpp keeps the two halves of a rotary pair side by side.
    pairs = array.reshape(self._field(f"llama.{of_heads}"), -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  def _field(self, name: str, *default):
    field = self._reader.fields.get(name)
    if field is None and not default:
      raise InputError(f"{self.path}: {name} is missing")
    return default[0] if field is None else field.contents()

  def config(self) -> dict[str, Any]:
    """Returns what config.json would hold."""
    scaling = self._field(f"{self._family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in self._tensors:
      raise InputError(
        f"{self.path}: scales RoPE, as Llama 3.1 and 3.2 do; expected a GGUF file without, or the "
        "checkpoint's folder"
      )
    config = {name: self._field(f"{self._family}.{key}", None) for name, key in _CONFIG.items()}
    decimal = lambda x: (
      float(str(np.float32(x))) if isinstance(x, float) else x
    )  # 1e-5, not 9.99e-6
    return {
      **{name: decimal(value) for name, value in config.items() if value is not None},
      "model_type": self._family,
      "vocab_size": len(self._field("tokenizer.ggml.tokens")),
      "tie_word_embeddings": "lm_head.weight" not in self._tensors,
      "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
    }

  def side_files(self) -> dict[str, bytes]:
    """Returns what would lie beside the tensors of a folder, as far as the file knows it."""
    tokens = self._field("tokenizer.ggml.tokens")
    special = {
      name: self._field(f"tokenizer.ggml.{key}_token_id", None)
      for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    special = {name: int(id) for name, id in special.items() if id is not None}
    tokenizer = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **{f"{name}_token": tokens[id] for name, id in special.items()},
      "chat_template": self._field("tokenizer.chat_template", None),
    }
    ids = {f"{name}_token_id": id for name, id in special.items() if name != "unk"}
    license_ = self._field("general.license", None)
    card = f"---\nlicense: {license_}\n---\n" if license_ else ""
    written = lambda data: json.dumps(data, indent=2).encode()
    return {
      "README.md": card.encode(),
      "config.json": written({**self.config(), **ids}),
      "generation_config.json": written(ids),
      "tokenizer.json": self.tokenizer_json().encode(),
      "tokenizer_config.json": written({k: v for k, v in tokenizer.items() if v is not None}),
    }

  def tokenizer_json(self) -> str:
    """Returns what tokenizer.json would hold: the byte-level BPE inside the file."""
    model, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _KINDS:
      raise InputError(
        f"{self.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; expected 'gpt2' with one of "
        f"{', '.join(_KINDS)}; import a folder with a tokenizer.json"
      )
    kind = _KINDS[pre]
    tokens = self._field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
      bpe = models.BPE(vocabulary, merges, ignore_merges=kind.whole_words)
    except Exception as error:  # `tokenizers` raises nothing narrower
      raise InputError(f"{self.path}: merges that do not fit the tokens: {error}") from None
    bpe = tokenizers.Tokenizer(bpe)
    if kind.normalizer is not None:
      bpe.normalizer = kind.normalizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence(kind.cut)
    bpe.decoder = decoders.ByteLevel()
    kinds = self._field("tokenizer.ggml.token_type")
    added = lambda kind: [t for t, k in zip(tokens, kinds) if k == kind]
    bpe.add_special_tokens(added(_CONTROL))
    bpe.add_tokens(added(_USER_DEFINED))
    return bpe.to_str()


def _hf_name(name: str) -> str:
  """The name at Hugging Face; an unknown one stays."""
  if name in _OUTER:
    return _OUTER[name]
  block, _, rest = name.removeprefix("blk.").partition(".")
  part, _, kind = rest.rpartition(".")
  return f"model.layers.{block}.{_LAYER[part]}.{kind}" if part in _LAYER else name
