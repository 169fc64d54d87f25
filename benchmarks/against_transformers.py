"""msjax next to Hugging Face transformers on torch: the same weights, the same work, one table.

`python benchmarks/against_transformers.py [--streams=10] [--rows=200] [--repeats=5] [--json]`

Training: one AdamW step on 2 x 1,000 tokens, clipped by the global norm. Decoding: `--rows` rows,
greedy, every stream sampled, the host seeing each row before it is fed. Both sides are first shown
to compute the same; then they are timed in turn, so that a busy machine slows both.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from hf_weights import STREAM_EMBEDDING, params_from_hf

from msjax.config import Config, ModelConfig, OptimConfig
from msjax.decoding.generate import FREE, Decoder, decode
from msjax.errors import InputError
from msjax.streams import HOLE, Stream, Streams
from msjax.training.state import Learner, TrainState

_STREAMS = flags.DEFINE_integer("streams", 10, "streams of the model", 1)
_ROWS = flags.DEFINE_integer("rows", 200, "rows to decode", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", 1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of a table")

VOCAB, BATCH, TOKENS = 32_000, 2, 1_000  # tokens of one sequence
CHECKED_ROWS = 20
LOSS_TOLERANCE, MARGIN = 1e-4, 1e-3  # relative; between the two likeliest logits
MODEL = ModelConfig(
  dim=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_dim=1536, tied_head=False
)
OPTIM = OptimConfig(learning_rate=1e-4, weight_decay=0.1)


class Msjax:
  """The msjax side."""

  def __init__(self, streams: Streams, weights: dict[str, np.ndarray]):
    """Takes over the weights."""
    self.learner = Learner(Config(model=MODEL, optim=OPTIM), streams, VOCAB)
    like = jax.eval_shape(self.learner.init, jax.random.key(0)).params
    params = jax.tree.map(jnp.asarray, params_from_hf(weights, like))
    self.model = self.learner.model(params)
    self.state = TrainState(jnp.zeros((), jnp.int32), params, self.learner.tx.init(params))
    self.take_step = jax.jit(self.learner.step, donate_argnums=0)

  def train_step(self, tokens: np.ndarray) -> float:
    """Takes a step on int32 [B, R, S], returns its loss."""
    batch = {
      "tokens": tokens[None],
      "weights": np.ones_like(tokens[None], np.float32),
      "segments": np.zeros_like(tokens[None, ..., 0]),
    }
    self.state, scalars = self.take_step(self.state, batch)
    return float(scalars["loss"])

  def decode(self, first_row: np.ndarray, rows: int) -> np.ndarray:
    """Continues int32 [S]; returns int32 [rows, S], each row on the host before it is fed."""
    given = [first_row[None], *[np.full_like(first_row[None], FREE)] * (rows - 1)]
    decoder = Decoder.of(self.model, rows=rows)
    return np.concatenate(list(decode(decoder, given)))


class Transformers:
  """The Hugging Face side: the rule as a 4-D mask, stream embeddings by `inputs_embeds`."""

  def __init__(self, streams: Streams):
    """Draws random weights."""
    config = transformers.Qwen3Config(
      vocab_size=VOCAB,
      hidden_size=MODEL.dim,
      num_hidden_layers=MODEL.layers,
      num_attention_heads=MODEL.heads,
      num_key_value_heads=MODEL.kv_heads,
      head_dim=MODEL.head_dim,
      intermediate_size=MODEL.mlp_dim,
      rope_theta=MODEL.rope_theta,
      rms_norm_eps=MODEL.norm_eps,
      tie_word_embeddings=False,
      initializer_range=MODEL.dim**-0.5,
      attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    self.streams = streams
    self.model = transformers.Qwen3ForCausalLM(config)
    self.stream_embed = torch.nn.Parameter(0.02 * torch.randn(len(streams), MODEL.dim))
    matrices = [p for p in self.model.parameters() if p.ndim > 1]
    others = [*(p for p in self.model.parameters() if p.ndim == 1), self.stream_embed]
    self.parameters = matrices + others
    self.optimizer = torch.optim.AdamW(
      [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
      lr=OPTIM.learning_rate,
      betas=(OPTIM.b1, OPTIM.b2),
      eps=OPTIM.eps,
      weight_decay=OPTIM.weight_decay,
      fused=True,
    )

  @property
  def weights(self) -> dict[str, np.ndarray]:
    """Copies by Hugging Face name."""
    tensors = {**self.model.state_dict(), STREAM_EMBEDDING: self.stream_embed.detach()}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

  def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [B, R, S] -> [B, L, D]."""
    return (self.model.model.embed_tokens(tokens) + self.stream_embed).flatten(1, 2)

  def whole_grid(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Mask, positions and labels of one pass over int32 [B, R, S]."""
    seen = np.array(self.streams.visibility(tokens).dense())[:, None]
    rows = np.array(self.streams.positions(tokens)).reshape(len(tokens), -1)
    labels = np.array(self.streams.labels(tokens)[0]).reshape(-1)
    return {
      "mask": torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min),
      "rows": torch.from_numpy(rows).long(),
      "labels": torch.from_numpy(labels).long(),
    }

  def logits(self, tokens: torch.Tensor, grid: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, L, V] of one pass over int64 [B, R, S]."""
    return self.model(
      inputs_embeds=self.embedded(tokens),
      attention_mask=grid["mask"],
      position_ids=grid["rows"],
      use_cache=False,
    ).logits

  def train_step(self, tokens: torch.Tensor, grid: dict[str, torch.Tensor]) -> float:
    """Takes a step on int64 [B, R, S], returns its loss."""
    logits = self.logits(tokens, grid).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, grid["labels"], ignore_index=HOLE)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.parameters, OPTIM.clip_norm)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.item()

  @torch.inference_mode()
  def decode(self, first_row: np.ndarray, rows: int) -> np.ndarray:
    """Continues int32 [S]; returns int32 [rows, S], each row on the host before it is fed."""
    S = len(first_row)
    peers = ~torch.eye(S, dtype=torch.bool)
    mask = torch.zeros(1, 1, S, rows * S)  # its last columns are the row that is fed
    mask[..., -S:].masked_fill_(peers, torch.finfo(torch.float32).min)
    cache = transformers.DynamicCache(config=self.model.config)
    row, written = first_row, []
    for r in range(rows):
      written.append(row)
      logits = self.model(
        inputs_embeds=self.embedded(torch.from_numpy(row)[None, None]),
        attention_mask=mask[..., -(r + 1) * S :],
        position_ids=torch.full((1, S), r),
        past_key_values=cache,
      ).logits
      row = logits[0].argmax(-1).to(torch.int32).numpy()
    return np.stack(written)


def main(_) -> None:
  """Checks, times and prints."""
  S, repeats = _STREAMS.value, _REPEATS.value
  if TOKENS % S:
    raise InputError(f"--streams: {S}; expected a divisor of {TOKENS}")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  transformers.logging.set_verbosity_error()
  streams = Streams(tuple(Stream.parse(f"s{i}:internal") for i in range(S)), silence_id=0)
  theirs = Transformers(streams)
  ours = Msjax(streams, theirs.weights)
  rng = np.random.default_rng(0)
  first_row = rng.integers(0, VOCAB, S, np.int32)
  tokens = rng.integers(0, VOCAB, (BATCH, TOKENS // S, S), np.int32)
  grid, tensor = theirs.whole_grid(tokens), torch.from_numpy(tokens).long()

  check_rows(theirs, ours.decode(first_row, CHECKED_ROWS), "msjax")
  check_rows(theirs, theirs.decode(first_row, CHECKED_ROWS), "transformers")
  figures = {
    "decoding": measured(
      repeats,
      lambda: ours.decode(first_row, _ROWS.value),
      lambda: theirs.decode(first_row, _ROWS.value),
    )
  }
  check_losses(lambda: ours.train_step(tokens), lambda: theirs.train_step(tensor, grid))
