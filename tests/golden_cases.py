"""The official release's tiny checkpoint: with msjax, and with transformers as the oracle."""

import functools
import json
import pathlib

import jax
import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from msjax.config import Config, ModelConfig
from msjax.hub.names import STREAM_EMBEDDING, read_params
from msjax.training.checkpoint import placed
from msjax.training.state import Learner

GOLDEN = pathlib.Path(__file__).parent / "golden"
FIGURES = dict(np.load(GOLDEN / "tiny_stream_qwen3.npz"))
VOCAB, SILENCE = 512, int(FIGURES["silence_token"])
LEAST_MARGIN = 1e-3


CONFIG = Config(
  model=ModelConfig(
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_dim=192,
    rope_theta=1e6,
    tied_head=False,
    dtype="float32",
  )
)


class RoundingDecidesError(Exception):
  """Another example has to be taken."""


@functools.cache
def weights():
  return load_file(GOLDEN / "model.safetensors")


@functools.cache
def module(streams):
  """The model with its first streams, under other names."""
  learner = Learner(CONFIG, streams, VOCAB)
  like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params)
  of_streams = {STREAM_EMBEDDING: weights()[STREAM_EMBEDDING][: len(streams)]}
  return learner.model(read_params({**weights(), **of_streams}, like))


@functools.cache
def hf():
  """The checkpoint in transformers' own class."""
  torch.set_num_threads(1)
  config = Qwen3Config(**json.loads((GOLDEN / "config.json").read_text()))
  model = Qwen3ForCausalLM(config).eval()
  known = {name: torch.tensor(w) for name, w in weights().items() if name in model.state_dict()}
  assert known.keys() == model.state_dict().keys()
  model.load_state_dict(known)
  return model


def dense_logits(ids, stream, position, seen):
  """[L, V] of one pass over L cells; `seen` bool [L, L], the rest int [L]."""
  bias = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
  with torch.no_grad():
    tokens = hf().get_input_embeddings()(torch.tensor(np.asarray(ids)))
    logits = hf()(
      inputs_embeds=(tokens + torch.tensor(weights()[STREAM_EMBEDDING][stream]))[None],
      attention_mask=torch.tensor(bias)[None, None],
      position_ids=torch.tensor(np.asarray(position))[None],
    ).logits
  return logits[0].numpy().copy()


def likeliest(logits):
  """The likeliest token of each, int [...], where rounding does not decide."""
  best = np.sort(logits, -1)
  if (best[..., -1] - best[..., -2]).min(initial=np.inf) < LEAST_MARGIN:
    raise RoundingDecidesError
  return logits.argmax(-1)
