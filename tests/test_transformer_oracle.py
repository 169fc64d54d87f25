"""The model against two oracles: Hugging Face transformers, and the official release's figures."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
  LlamaConfig,
  LlamaForCausalLM,
  Qwen2Config,
  Qwen2ForCausalLM,
  Qwen3Config,
  Qwen3ForCausalLM,
)

from msjax.config import Config, ModelConfig, RopeScaling
from msjax.decoding.engine import Engine, fill
from msjax.decoding.prepared import Unrolled
from msjax.decoding.tick import FREE
from msjax.hub.names import STREAM_EMBEDDING, read_params
from msjax.streams import HOLE, Stream, Streams
from msjax.training.checkpoint import placed
from msjax.training.state import Learner, TrainState

VOCAB, SILENCE = 97, 5
SMALL = ModelConfig(
  dim=32, layers=2, heads=4, head_dim=8, mlp_dim=48, qk_norm=False, dtype="float32"
)
LLAMA3 = RopeScaling(
  factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
)

FAMILIES = {
  "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"qk_norm": True}, {"head_dim": 8}),
  "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"qkv_bias": True}, {}),
  "llama": (LlamaConfig, LlamaForCausalLM, {"rope_scaling": LLAMA3}, {"head_dim": 8}),
  "llama_biased": (
    LlamaConfig,
    LlamaForCausalLM,
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
  ),
}


def stream_set(count, same_row="hidden", skip_silence=False):
  kinds = ("output", "input", "internal")  # inputs not first: attention order differs from ids
  specs = (f"s{i}:{kinds[i % 3]}:1" for i in range(count))
  return Streams(tuple(map(Stream.parse, specs)), SILENCE, same_row, skip_silence)


def random_hf(family, cfg):
  """A Hugging Face model of this family and shape; every weight random, norms and biases too."""
  config_class, model_class, _, fields = FAMILIES[family]
  if cfg.rope_scaling:
    scaling = dataclasses.asdict(cfg.rope_scaling)
    fields = {
      **fields,
      "rope_scaling": {
        "rope_type": "llama3",
        "original_max_position_embeddings": scaling.pop("original_max_position"),
        **scaling,
      },
    }
  config = config_class(
    vocab_size=VOCAB,
    hidden_size=cfg.dim,
    intermediate_size=cfg.mlp_dim,
    num_hidden_layers=cfg.layers,
    num_attention_heads=cfg.heads,
    num_key_value_heads=cfg.kv_heads,
    rope_theta=cfg.rope_theta,
    rms_norm_eps=cfg.norm_eps,
    tie_word_embeddings=cfg.tied_head,
    max_position_embeddings=512,
    **fields,
  )
  torch.manual_seed(0)
  model = model_class(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      centre = 1.0 if weight.ndim == 1 and (weight == 1).all() else 0.0
      weight.normal_(centre, 0.2)
  return model


def msjax_model(learner, hf, stream_embed):
  weights = {name: w.numpy() for name, w in hf.state_dict().items()}
  weights[STREAM_EMBEDDING] = stream_embed
  like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params)
  return learner.model(read_params(weights, like))


def hf_logits(hf, streams, tokens, segments, stream_embed):
  """[B, R, S, V] of a dense pass: stream embeddings added outside, the rule as a 4-D mask."""

  def cells(grid):
    return torch.tensor(np.asarray(streams.to_attention(grid)))

  ids = cells(np.maximum(tokens, 0)).long()
  of_stream = cells(np.broadcast_to(np.arange(tokens.shape[2]), tokens.shape)).long()
  seen = torch.tensor(np.asarray(streams.visibility(tokens, segments).dense()))[:, None]
  with torch.no_grad():
    logits = hf(
      inputs_embeds=hf.get_input_embeddings()(ids) + torch.tensor(stream_embed)[of_stream],
      attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min),
      position_ids=cells(streams.positions(tokens, segments)).long(),
    ).logits
  return np.asarray(streams.from_attention(logits.numpy()))


@pytest.mark.parametrize(
  ("family", "S", "kv_heads", "tied_head", "same_row", "skip_silence"),
  [
    ("qwen3", 1, 2, True, "hidden", False),
    ("qwen3", 2, 4, False, "hidden", False),
    ("qwen3", 3, 1, True, "inputs", True),
    ("qwen3", 10, 2, False, "visible", False),
    ("qwen2", 1, 4, False, "hidden", False),
    ("qwen2", 2, 1, True, "ordered", False),
    ("qwen2", 3, 2, False, "hidden", True),
    ("qwen2", 10, 4, True, "hidden", False),
    ("llama", 1, 1, True, "hidden", True),
    ("llama", 2, 2, False, "inputs", False),
    ("llama", 3, 4, True, "ordered", False),
    ("llama", 10, 1, False, "hidden", False),
    ("llama_biased", 3, 2, False, "hidden", False),
  ],
)
def test_logits_are_those_of_transformers(family, S, kv_heads, tied_head, same_row, skip_silence):
  fields = FAMILIES[family][2]
  cfg = dataclasses.replace(SMALL, kv_heads=kv_heads, tied_head=tied_head, **fields)
  streams = stream_set(S, same_row, skip_silence)
  rng = np.random.default_rng(S)
  tokens = rng.integers(0, VOCAB, (2, 12, S)).astype(np.int32)
  tokens[rng.random(tokens.shape) < 0.2] = SILENCE
  tokens[rng.random(tokens.shape) < 0.1] = HOLE
  segments = np.array([[0] * 12, [0] * 5 + [1] * 7], np.int32)
  stream_embed = rng.normal(0, 0.5, (S, cfg.dim)).astype(np.float32)

  hf = random_hf(family, cfg)
  model = msjax_model(Learner(Config(model=cfg), streams, VOCAB), hf, stream_embed)
  ours = jax.jit(lambda tokens: model.logits(model(tokens, segments), tokens))(tokens)
  theirs = hf_logits(hf, streams, tokens, segments, stream_embed)
  is_token = tokens != HOLE
  np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-4, rtol=0)
  assert not np.any(ours[~is_token])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stream_is_a_plain_causal_model(family):
  cfg = dataclasses.replace(SMALL, tied_head=False, **FAMILIES[family][2])
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40, 1)).astype(np.int32)
  hf = random_hf(family, cfg)
  learner = Learner(Config(model=cfg), stream_set(1), VOCAB)
  model = msjax_model(learner, hf, np.zeros((1, cfg.dim), np.float32))
  ours = jax.jit(lambda tokens: model.logits(model(tokens), tokens))(tokens)[:, :, 0]
  with torch.no_grad():
    theirs = hf(torch.tensor(tokens[:, :, 0]).long()).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


# What the official release computes with a ten-stream checkpoint of its own.


@pytest.fixture(scope="module")
def golden():
  """Arrays of the release, the learner and the parameters of its checkpoint."""
  figures = dict(np.load(golden_cases.GOLDEN / "tiny_stream_qwen3.npz"))
  specs = (f"s{i}:internal:1" for i in range(10))
  streams = Streams(tuple(map(Stream.parse, specs)), int(figures["silence_token"]))
  learner = Learner(golden_cases.CONFIG, streams, golden_cases.VOCAB)
  like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params)
  params = read_params(golden_cases.weights(), like)
  return figures, learner, params


def golden_tokens(figures):
  """int32 [2, 12, 10]; the release pads with token 0, here stand holes."""
  ids = figures["input_ids"]
  length = figures["seq_length"][:, None]
  return np.where(np.arange(ids.shape[1]) < length, ids, HOLE).reshape(2, 12, 10)


def test_release_sees_whom_we_see(golden):
  figures, learner, _ = golden
  tokens = golden_tokens(figures)
  ours = np.array(learner.streams.visibility(tokens).dense())
  is_token = tokens.reshape(2, -1) != HOLE
  np.testing.assert_array_equal(ours[is_token], figures["mask_block_causal"][is_token])


def test_release_has_the_same_logits(golden):
  figures, learner, params = golden
  tokens = golden_tokens(figures)
  model = learner.model(params)
  ours = jax.jit(lambda tokens: model.logits(model(tokens), tokens))(tokens)
  theirs = figures["logits_block_causal"].reshape(ours.shape)
  is_token = tokens != HOLE
  np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-4, rtol=0)


def test_release_has_the_same_loss_and_gradient(golden):
  figures, learner, params = golden
  tokens = golden_tokens(figures)
  # A weight stands at the cell that is predicted; what the prefix's rows predict has no loss.
  rows = np.arange(tokens.shape[1])[None, :, None]
  unpredicted = figures["prefix_length"][:, None, None] // 10
  weights = np.broadcast_to((rows > unpredicted) | (unpredicted == 0), tokens.shape)
  batch = {
    "tokens": tokens[None],
    "weights": weights[None].astype(np.float32),
    "segments": np.zeros((1, 2, 12), np.int32),
  }
  labels, weight = learner.streams.labels(tokens, weights=weights)
  is_label = figures["labels"].reshape(tokens.shape) >= 0
  np.testing.assert_array_equal(np.asarray(weight) > 0, is_label)
  np.testing.assert_array_equal(
    np.asarray(labels)[is_label], figures["labels"].reshape(tokens.shape)[is_label]
  )
  state = TrainState(jnp.zeros((), jnp.int32), params, learner.tx.init(params))
  _, scalars = jax.jit(learner.step)(state, batch)
  np.testing.assert_allclose(scalars["loss"], figures["loss_plain"], atol=1e-5, rtol=0)
  np.testing.assert_allclose(scalars["gradient_norm"], figures["gradnorm_plain"], rtol=1e-4)


def test_release_has_the_same_entropies(golden):
  figures, learner, params = golden
  tokens = golden_tokens(figures)
  batch = {
    "tokens": tokens,
    "weights": np.ones(tokens.shape, np.float32),
    "segments": np.zeros((2, 12), np.int32),
  }
  _, ours = jax.jit(learner.cell_entropy)(params, batch)
  is_label = figures["labels"].reshape(tokens.shape) >= 0
  theirs = figures["ce_block_causal"].reshape(tokens.shape)
  np.testing.assert_allclose(ours[is_label], theirs[is_label], atol=1e-4, rtol=0)


def test_release_writes_the_same_rows(golden):
  figures, learner, params = golden
  theirs = figures["dec_seed_greedy_tokens"]
  user = figures["user_tokens"]
  given = np.full((1, *theirs.shape), FREE, np.int32)
  given[0, 0] = figures["seed_row"]
  given[0, :, 0] = learner.streams.silence_id
  given[0, 2 : 2 + len(user), 0] = user
  engine = Engine(Unrolled.of(learner.model(params)), rows=4)  # the cache grows on the way
  np.testing.assert_array_equal(fill(engine, given)[0], theirs)
