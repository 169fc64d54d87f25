"""Hugging Face folders through msjax.load, against transformers and the official release."""

import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import msjax
from msjax.decoding.engine import fill
from msjax.decoding.tick import FREE
from msjax.hub.import_ import import_checkpoint, read_checkpoint
from msjax.hub.names import STREAM_EMBEDDING
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.state import Learner
from msjax.workdir import WorkDir

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCAB, DIM, ROWS = 320, 32, 12
SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": DIM,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "rms_norm_eps": 1e-3,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
FAMILIES = {  # none but Qwen2 has head_dim = dim / heads
  "qwen3": (Qwen3Config, {"head_dim": 16}),
  "qwen3_biased": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
  "qwen2": (Qwen2Config, {"rope_theta": 1e6}),
  "llama": (LlamaConfig, {"head_dim": 12, "rope_scaling": LLAMA3}),
  "llama_biased": (LlamaConfig, {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
}


def random_hf(family, kv_heads, tied_head):
  """A model of transformers; every weight random, those of norms around 1, biases too."""
  config_class, fields = FAMILIES[family]
  config = config_class(
    **SIZES, **fields, num_key_value_heads=kv_heads, tie_word_embeddings=tied_head
  )
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      centre = 1.0 if weight.ndim == 1 and (weight == 1).all() else 0.0
      weight.normal_(centre, 0.2)
  return model


def add_stream_embedding(path, stream_embed):
  """Puts one more tensor into the checkpoint's file."""
  weights = load_file(path / "model.safetensors")
  weights[STREAM_EMBEDDING] = stream_embed
  save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def add_tokenizer(path):
  tokenizer = train_bpe(["to be - or not to be"], 300)
  tokenizer.save(path / "tokenizer.json")
  return tokenizer


def visible(tokens, kinds, same_row, silence_id):
  """bool [B, L, L], cells row by row: the rule, spelled out; `silence_id`: None, or skipped."""
  S = tokens.shape[2]
  flat = tokens.reshape(len(tokens), -1)
  row, stream = np.divmod(np.arange(flat.shape[1]), S)
  is_input = np.array([kind == "input" for kind in kinds])[stream]
  order = stream + S * ~is_input
  peers = {"hidden": False, "inputs": is_input, "ordered": order < order[:, None], "visible": True}
  seen = (row < row[:, None]) | ((row == row[:, None]) & peers[same_row])
  if silence_id is not None:
    seen = seen & (flat != silence_id)[:, None, :]
  return np.broadcast_to(seen | np.eye(len(row), dtype=bool), (len(flat), len(row), len(row)))


def hf_logits(hf, tokens, seen, stream_embed):
  """[B, R, S, V] of one dense pass, with a 4-D mask and rows as positions."""
  B, R, S = tokens.shape
  embedded = hf.get_input_embeddings()(torch.tensor(tokens.reshape(B, -1)))
  bias = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)
  with torch.no_grad():
    logits = hf(
      inputs_embeds=embedded + torch.tensor(np.tile(stream_embed, (R, 1))),
      attention_mask=torch.tensor(bias)[:, None],
      position_ids=torch.arange(R).repeat_interleave(S).expand(B, -1),
    ).logits
  return logits.numpy().reshape(B, R, S, -1)


def loaded(path, run, streams, same_row, skip_silence):
  """The folder itself where its own streams do, else a work directory made of it."""
  if (same_row, skip_silence) == ("hidden", False):
    return msjax.load(path)
  checkpoint = read_checkpoint(path, streams, same_row=same_row, skip_silence=skip_silence)
  import_checkpoint(checkpoint, WorkDir(run))
  return msjax.load(run)


@pytest.mark.parametrize(
  ("family", "S", "kv_heads", "tied_head", "same_row", "skip_silence"),
  [
    ("qwen3", 1, 4, True, "hidden", False),
    ("qwen3", 2, 2, False, "hidden", False),
    ("qwen3", 3, 1, True, "inputs", True),
    ("qwen3", 10, 2, False, "visible", False),
    ("qwen3_biased", 5, 1, False, "hidden", False),
    ("qwen2", 1, 1, False, "hidden", True),
    ("qwen2", 4, 4, True, "ordered", False),
    ("qwen2", 10, 2, True, "hidden", False),
    ("llama", 1, 2, False, "hidden", False),
    ("llama", 2, 4, True, "inputs", False),
    ("llama", 10, 1, False, "hidden", True),
    ("llama_biased", 6, 2, True, "hidden", False),
  ],
)
def test_a_folder_computes_what_transformers_does(
  tmp_path, family, S, kv_heads, tied_head, same_row, skip_silence
):
  hf = random_hf(family, kv_heads, tied_head)
  rng = np.random.default_rng(S)
  stream_embed = np.zeros((S, DIM), np.float32)
  if S == 1:  # a plain model, its tensors in several files
    hf.save_pretrained(tmp_path / "folder", max_shard_size="20KB")
    assert (tmp_path / "folder" / "model.safetensors.index.json").exists()
  else:
    hf.save_pretrained(tmp_path / "folder")
    stream_embed = rng.normal(0, 0.5, (S, DIM)).astype(np.float32)
    add_stream_embedding(tmp_path / "folder", stream_embed)
  silence_id = add_tokenizer(tmp_path / "folder").silence_id

  kinds = [("output", "input", "internal")[i % 3] for i in range(S)]
  streams = tuple(f"s{i}:{kind}" for i, kind in enumerate(kinds))
  model = loaded(tmp_path / "folder", tmp_path / "run", streams, same_row, skip_silence)
  tokens = rng.integers(0, VOCAB, (2, ROWS, S))
  tokens[rng.random(tokens.shape) < 0.2] = silence_id
  seen = visible(tokens, kinds, same_row, silence_id if skip_silence else None)
  theirs = hf_logits(hf, tokens, seen, stream_embed)
  np.testing.assert_allclose(model.logits(tokens), theirs, atol=1e-4, rtol=0)


# The official release's checkpoint; test_import_.py compares its logits and its loss.


@pytest.fixture
def release(tmp_path):
  """Figures of the release, and its checkpoint as msjax loads it."""
  for file in ("config.json", "model.safetensors"):
    shutil.copy(GOLDEN / file, tmp_path)
  add_tokenizer(tmp_path)
  return np.load(GOLDEN / "tiny_stream_qwen3.npz"), msjax.load(tmp_path)


def test_a_loaded_release_has_its_gradient(release):
  figures, model = release
  length = figures["seq_length"][:, None]
  tokens = np.where(np.arange(120) < length, figures["input_ids"], -1).reshape(2, 12, 10)
  unpredicted = figures["prefix_length"][:, None, None] // 10
  weights = (np.arange(12)[:, None] > unpredicted) | (unpredicted == 0)
  batch = {
    "tokens": tokens,
    "weights": np.broadcast_to(weights, tokens.shape).astype(np.float32),
    "segments": np.zeros((2, 12), np.int32),
  }
  learner = Learner(model.config, model.streams, model.tokenizer.vocab_size)

  def loss(params):
    sums = learner.evaluate(params, batch)
    return sums["loss"] / sums["weight"]

  norm = optax.tree.norm(jax.jit(jax.grad(loss))(model.params))
  np.testing.assert_allclose(norm, figures["gradnorm_plain"], rtol=1e-4)


def test_a_loaded_release_writes_its_rows(release):
  figures, model = release
  theirs, user = figures["dec_seed_greedy_tokens"], figures["user_tokens"]
  given = np.full((1, *theirs.shape), FREE, np.int32)
  given[0, :, 0] = figures["silence_token"]
  given[0, 0] = figures["seed_row"]
  given[0, 2 : 2 + len(user), 0] = user
  np.testing.assert_array_equal(fill(model.engine(), given)[0], theirs)
