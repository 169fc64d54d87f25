"""GGUF files written as llama.cpp lays them out, against transformers on the same weights."""

import json

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

import msjax
from msjax.errors import InputError
from msjax.hub import gguf as ours
from msjax.hub.export import export
from msjax.hub.import_ import read_checkpoint
from msjax.model import Model
from msjax.text.hf_tokenizer import HfTokenizer, train_bpe

BPE = json.loads(train_bpe(["to be - or not to be, 12 times 34"], 290).to_json())
TOKENS = [*BPE["model"]["vocab"], "<|im_end|>"]
SIZES = {
  "vocab_size": len(TOKENS),
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rope_theta": 5e5,
}
FAMILIES = {
  "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
  "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
}


def paired(weight, heads):
  """Rows as llama.cpp keeps them for Llama: the two halves of a rotary pair side by side."""
  halves = weight.reshape(heads, 2, -1, weight.shape[1])
  return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def written(path, family, pre="smollm", **extra):
  """Writes a file of random weights; returns transformers' model of the same."""
  config_class, model_class, fields = FAMILIES[family]
  config = config_class(**SIZES, **fields)
  torch.manual_seed(0)
  model = model_class(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
  writer = gguf.GGUFWriter(path, family)
  writer.add_embedding_length(16)
  writer.add_feed_forward_length(24)
  writer.add_block_count(2)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_freq_base(5e5)
  if family == "qwen3":
    writer.add_key_length(8)
  for name, value in extra.items():
    add = writer.add_string if isinstance(value, str) else writer.add_uint32
    add(name.replace("__", "."), value)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(TOKENS)
  writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in TOKENS])
  writer.add_token_merges([" ".join(pair) for pair in BPE["model"]["merges"]])
  theirs = {hf: name for name, hf in ours._OUTER.items()}
  parts = {hf: name for name, hf in ours._LAYER.items()}
  for name, tensor in model.state_dict().items():
    array = tensor.numpy()
    if name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    if family == "llama" and (".q_proj." in name or ".k_proj." in name):
      array = paired(array, 4 if ".q_proj." in name else 2)
    if name not in theirs:
      layer, _, rest = name.removeprefix("model.layers.").partition(".")
      part, _, kind = rest.rpartition(".")
      theirs[name] = f"blk.{layer}.{parts[part]}.{kind}"
    writer.add_tensor(theirs[name], array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_transformers_does(tmp_path, family):
  theirs = written(tmp_path / "model.gguf", family)
  text = np.random.default_rng(0).integers(0, len(TOKENS), (2, 9))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(text)).logits.numpy()
  logits = msjax.load(tmp_path / "model.gguf").logits(text[:, :, None])[:, :, 0]
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_the_tokenizer_comes_along(tmp_path):
  written(tmp_path / "model.gguf", "llama")
  found = read_checkpoint(tmp_path / "model.gguf", ("user:input", "output:output"))
  tokenizer = found.tokenizer
  assert tokenizer.vocab_size == len(TOKENS)
  assert tokenizer.name(tokenizer.end_id) == "<end>" and len(TOKENS) - 1 in tokenizer.special_ids
  original = HfTokenizer(json.dumps(BPE))
  for text in ("to be or not to be", " hé€", "not - to"):
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert len(tokenizer.encode("12")) == 2  # smollm: a token a digit


def test_an_export_has_what_the_file_knew(tmp_path):
  words = {
    "general__license": "apache-2.0",
    "tokenizer__chat_template": "{{ messages[0].content }}!",
    "tokenizer__ggml__eos_token_id": len(TOKENS) - 1,
    "tokenizer__ggml__bos_token_id": 5,
    "llama__context_length": 77,
  }
  written(tmp_path / "model.gguf", "llama", **words)
  found = read_checkpoint(tmp_path / "model.gguf", ("user:input", "output:output"))
  export(Model(*found[:4]), tmp_path / "out", files=found.files)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", TOKENS[5])
  chat = [{"role": "user", "content": "to be"}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == "to be!"
  card = (tmp_path / "out" / "README.md").read_text()
  assert huggingface_hub.ModelCard(card).data.license == "apache-2.0"
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["max_position_embeddings"], config["bos_token_id"]) == (77, 5)
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
  assert generation.eos_token_id == [found.tokenizer.end_id, len(TOKENS) - 1]


def test_a_file_that_knows_little_has_no_more_beside_it(tmp_path):
  written(tmp_path / "model.gguf", "llama")
  files = read_checkpoint(tmp_path / "model.gguf").files
  assert files["README.md"] == b"" and json.loads(files["generation_config.json"]) == {}
  assert json.loads(files["tokenizer_config.json"]) == {
    "tokenizer_class": "PreTrainedTokenizerFast"
  }


@pytest.mark.parametrize("pre, digits", [("qwen2", 1), ("llama-bpe", 3)])
def test_pre_tokenizers_cut_numbers_as_theirs_do(tmp_path, pre, digits):
  written(tmp_path / "model.gguf", "qwen2", pre=pre)
  parts = ours._KINDS[pre].cut[0].pre_tokenize_str("I've 12345 of\n them")
  numbers = [part for part, _ in parts if part.isdigit()]
  assert numbers == (list("12345") if digits == 1 else ["123", "45"])
  assert [part for part, _ in parts if not part.isdigit()] == [
    "I",
    "'ve",
    " ",
    " of",
    "\n",
    " them",
  ]
  read_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
  "options, told",
  [
    (
      {"pre": "tekken"},
      "tokenizer 'gpt2' with pre-tokenizer 'tekken'; expected 'gpt2' with one of",
    ),
    (
      {"llama__rope__scaling__type": "yarn"},
      "scales RoPE, as Llama 3.1 and 3.2 do; expected a GGUF",
    ),
  ],
)
def test_what_is_not_computed_is_told(tmp_path, options, told):
  written(tmp_path / "model.gguf", "llama", **options)
  with pytest.raises(InputError, match=f"model.gguf: {told}"):
    read_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a GGUF file at all, but long enough"])
def test_what_is_no_gguf_is_told(tmp_path, data):
  (tmp_path / "model.gguf").write_bytes(data)
  with pytest.raises(InputError, match=r"model.gguf: cannot be read as GGUF"):
    read_checkpoint(tmp_path / "model.gguf")


def test_another_architecture_is_told(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(InputError, match=r"general.architecture 'mamba'; expected one of qwen3"):
    read_checkpoint(tmp_path / "model.gguf")
