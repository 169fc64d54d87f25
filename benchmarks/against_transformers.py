"""msjax next to Hugging Face transformers on torch: the same weights, the same work, one table.

`python benchmarks/against_transformers.py [--streams=10] [--rows=200] [--repeats=5] [--json]`

Training: an AdamW step on 2 x 1,000 tokens, clipped by the global norm. Decoding: `--rows` rows,
greedy, every stream sampled, the host seeing each row before it is fed; the same of a tiny model,
of which little but what stands around the products is left. Prefill: 1,000 tokens at once, and the
row after them. Both sides are first shown to compute the same; then they are timed in turn, so that
a busy machine slows both.
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import flags
from rich.console import Console
from rich.table import Table

from msjax import cli
from msjax.config import Config, ModelConfig, OptimConfig
from msjax.decoding.engine import Engine, fill
from msjax.decoding.prepared import Unrolled
from msjax.decoding.session import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.hub.names import STREAM_EMBEDDING, read_params
from msjax.streams import HOLE, Stream, Streams
from msjax.training.checkpoint import placed
from msjax.training.state import Learner, TrainState

_STREAMS = flags.DEFINE_integer("streams", 10, "streams of the model", 1)
_ROWS = flags.DEFINE_integer("rows", 200, "rows to decode", 20)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", 1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of a table")

BATCH, TOKENS = 2, 1_000  # TOKENS: of one sequence
CHECKED_ROWS = 20
LOSS_TOLERANCE = 1e-4  # relative
MARGIN = 1e-3  # logits closer than this may be told apart either way
HIDDEN_SCORE = torch.finfo(torch.float32).min
MODEL = ModelConfig(
  dim=512,
  layers=8,
  heads=8,
  kv_heads=4,
  head_dim=64,
  mlp_dim=1536,
  vocab_size=32_000,
  tied_head=False,
  dtype="float32",
)
TINY = dataclasses.replace(
  MODEL, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=192, vocab_size=1_000
)
OPTIM = OptimConfig(learning_rate=1e-4, weight_decay=0.1)

Figures = dict[str, dict[str, float]]  # by side, by name


class Msjax:
  """The msjax side."""

  def __init__(
    self, cfg: ModelConfig, streams: Streams, weights: dict[str, np.ndarray], tokens: np.ndarray
  ):
    """Takes over Hugging Face weights; `tokens` int32 [B, R, S] are what is trained on."""
    learner = Learner(Config(model=cfg, optim=OPTIM), streams, cfg.vocab_size)
    like = placed(jax.eval_shape(learner.init, jax.random.key(0)).params)
    params = jax.tree.map(jnp.asarray, read_params(weights, like))
    self._model = Unrolled.of(learner.model(params))
    # A step gives its state's memory away; the decoder keeps the parameters it has.
    params = jax.tree.map(jnp.copy, params)
    self._state = TrainState(jnp.zeros((), jnp.int32), params, learner.tx.init(params))
    self._step = jax.jit(learner.step, donate_argnums=0)
    self._prompt = tokens[0]
    self._batch = {
      "tokens": tokens[None],
      "weights": np.ones_like(tokens[None], np.float32),
      "segments": np.zeros_like(tokens[None, ..., 0]),
    }

  def train_step(self) -> float:
    """Takes a step, returns its loss."""
    self._state, scalars = self._step(self._state, self._batch)
    return float(scalars["loss"])

  def decode(self, first_row: np.ndarray, rows: int, room: int) -> np.ndarray:
    """Continues int32 [S] in a cache with room for `room` rows; returns int32 [rows, S]."""
    grid = np.full((1, rows, len(first_row)), FREE, np.int32)
    grid[0, 0] = first_row
    return fill(Engine(self._model, rows=room), grid)[0]

  def prefill(self) -> np.ndarray:
    """Reads a sequence at once; returns the row after it."""
    rows = len(self._prompt)
    engine = Engine(self._model, rows=2 * rows, rows_at_once=rows)
    session = engine.join(self._prompt, stop=Stop(rows=rows + 1))
    while engine.sessions:
      engine.step()
    return session.rows[-1]


class Transformers:
  """The Hugging Face side: the rule as a 4-D mask, stream embeddings through `inputs_embeds`."""

  def __init__(self, cfg: ModelConfig, streams: Streams, tokens: np.ndarray):
    """Draws weights; `tokens` int32 [B, R, S] are what is trained on."""
    config = transformers.Qwen3Config(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.dim,
      num_hidden_layers=cfg.layers,
      num_attention_heads=cfg.heads,
      num_key_value_heads=cfg.kv_heads,
      head_dim=cfg.head_dim,
      intermediate_size=cfg.mlp_dim,
      rope_theta=cfg.rope_theta,
      rms_norm_eps=cfg.norm_eps,
      tie_word_embeddings=cfg.tied_head,
      initializer_range=cfg.dim**-0.5,
      attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    self._streams = streams
    self._model = transformers.Qwen3ForCausalLM(config)
    self._stream_embed = torch.nn.Parameter(0.02 * torch.randn(len(streams), cfg.dim))
    matrices = [p for p in self._model.parameters() if p.ndim > 1]
    others = [p for p in self._model.parameters() if p.ndim == 1] + [self._stream_embed]
    self._parameters = matrices + others
    self._optimizer = torch.optim.AdamW(
      [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
      lr=OPTIM.learning_rate,
      betas=(OPTIM.b1, OPTIM.b2),
      eps=OPTIM.eps,
      weight_decay=OPTIM.weight_decay,
      fused=True,
    )
    self._grid, self._prompt = self._whole_grid(tokens), self._whole_grid(tokens[:1])
    self._labels = torch.from_numpy(np.array(streams.labels(tokens)[0])).long().flatten()

  @property
  def weights(self) -> dict[str, np.ndarray]:
    """Copies by Hugging Face name."""
    tensors = {**self._model.state_dict(), STREAM_EMBEDDING: self._stream_embed.detach()}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

  def train_step(self) -> float:
    """Takes a step, returns its loss."""
    logits = self._logits(**self._grid).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, self._labels, ignore_index=HOLE)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._parameters, OPTIM.clip_norm)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return loss.item()

  @torch.inference_mode()
  def decode(self, first_row: np.ndarray, rows: int, room: int) -> np.ndarray:
    """Continues int32 [S]; returns int32 [rows, S]. The mask is made for `room` rows."""
    S = len(first_row)
    mask = torch.zeros(1, 1, S, room * S)  # its last columns stand for the row that is fed
    mask[..., -S:].masked_fill_(~torch.eye(S, dtype=torch.bool), HIDDEN_SCORE)
    cache = transformers.DynamicCache(config=self._model.config)
    row, written = first_row, []
    for r in range(rows):
      written.append(row)
      logits = self._logits(
        torch.from_numpy(row)[None, None],
        mask[..., -(r + 1) * S :],
        torch.full((1, S), r),
        past_key_values=cache,
      )
      row = logits[0].argmax(-1).numpy()
    return np.stack(written)

  @torch.inference_mode()
  def prefill(self) -> np.ndarray:
    """Reads a sequence at once; returns the row after it."""
    cache = transformers.DynamicCache(config=self._model.config)
    logits = self._logits(**self._prompt, past_key_values=cache, last=len(self._streams))
    return logits[0].argmax(-1).numpy()

  @torch.inference_mode()
  def shortfall(self, written: np.ndarray, given: int = 1) -> float:
    """How far below the highest logit the tokens of greedy rows int [R, S] are, at most; the first
    `given` rows are not the model's."""
    logits = self._logits(**self._whole_grid(written[None]))
    logits = logits.unflatten(1, written.shape)[0, given - 1 : -1]
    chosen = torch.from_numpy(written[given:]).long()
    return (logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]).max().item()

  def _whole_grid(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Arguments of `_logits` for one pass over int [B, R, S]."""
    seen = np.array(self._streams.visibility(tokens).dense())[:, None]
    rows = np.array(self._streams.positions(tokens)).reshape(len(tokens), -1)
    return {
      "tokens": torch.from_numpy(tokens),
      "mask": torch.where(torch.from_numpy(seen), 0.0, HIDDEN_SCORE),
      "rows": torch.from_numpy(rows),
    }

  def _logits(self, tokens, mask, rows, past_key_values=None, last=0) -> torch.Tensor:
    """Tokens [B, R, S], additive mask [B, 1, L, M] and rows [B, L] -> [B, L, V], or of the last."""
    embedded = self._model.get_input_embeddings()(tokens) + self._stream_embed
    return self._model(
      inputs_embeds=embedded.flatten(1, 2),
      attention_mask=mask,
      position_ids=rows,
      past_key_values=past_key_values,
      use_cache=past_key_values is not None,
      logits_to_keep=last,
    ).logits


Sides = dict[str, Msjax | Transformers]


def time_decoding(sides: Sides, oracle: Transformers, first_row: np.ndarray) -> Figures:
  """Times greedy decoding of `--rows` rows.

  Raises:
    RunError: a side writes a token that is not the likeliest by one dense pass of `oracle`.
  """
  rows, first_call = _ROWS.value, {}
  for name, side in sides.items():
    first_call[name] = _seconds(functools.partial(side.decode, first_row, 1, room=rows))
    short = oracle.shortfall(side.decode(first_row, CHECKED_ROWS, room=rows))
    if short > MARGIN:
      raise RunError(f"{name} wrote a token {short:.3g} below the highest logit: not timed")
  runs = {n: functools.partial(side.decode, first_row, rows, rows) for n, side in sides.items()}
  return _timed(runs, rows, len(first_row) * rows, first_call)


def time_prefill(sides: Sides, oracle: Transformers, prompt: np.ndarray) -> Figures:
  """Times reading the sides' prompt int32 [R, S] at once.

  Raises:
    RunError: a side goes on with a token that is not the likeliest by one dense pass of `oracle`.
  """
  first_call = {}
  for name, side in sides.items():
    first_call[name] = _seconds(side.prefill)
    short = oracle.shortfall(np.concatenate([prompt, side.prefill()[None]]), len(prompt))
    if short > MARGIN:
      raise RunError(f"{name} goes on with a token {short:.3g} below the highest logit: not timed")
  runs = {name: side.prefill for name, side in sides.items()}
  return _timed(runs, len(prompt), prompt.size, first_call)


def time_training(sides: Sides) -> Figures:
  """Times training steps.

  Raises:
    RunError: the sides' losses differ, at the given weights or after one step.
  """
  first_call, losses = {}, {}
  for name, side in sides.items():
    start = time.perf_counter()
    losses[name] = [side.train_step()]
    first_call[name] = time.perf_counter() - start
    losses[name].append(side.train_step())
  if not np.allclose(losses["msjax"], losses["transformers"], rtol=LOSS_TOLERANCE, atol=0):
    raise RunError(f"losses of two steps differ: {losses}: not timed")
  runs = {name: side.train_step for name, side in sides.items()}
  return _timed(runs, BATCH * TOKENS // _STREAMS.value, BATCH * TOKENS, first_call)


def _timed(runs, rows: int, tokens: int, first_call: dict[str, float]) -> Figures:
  """Runs the sides in turn, `--repeats` times; one run passes so many rows and tokens."""
  seconds = {name: [] for name in runs}
  for _ in range(_REPEATS.value):
    for name, run in runs.items():
      seconds[name].append(_seconds(run))
  figures = {}
  for name, times in seconds.items():
    median = statistics.median(times)
    figures[name] = {
      "ms": median * 1e3,
      "tokens_per_second": tokens / median,
      "rows_per_second": rows / median,
      "first_call_seconds": first_call[name],
    }
  return figures


def _seconds(run: Callable[[], object]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def table(figures: dict[str, Figures], conditions: str) -> Table:
  """Lays figures by work and side out for people; `ms` is the median."""
  out = Table(title="msjax and transformers on the same weights", caption=conditions)
  out.add_column("work", no_wrap=True)
  out.add_column("side", no_wrap=True)
  for column in ("ms", "tokens/s", "rows/s", "first call s", "ratio"):
    out.add_column(column, justify="right")
  for work, sides in figures.items():
    ratio = sides["transformers"]["ms"] / sides["msjax"]["ms"]
    out.add_section()
    for name, side in sides.items():
      out.add_row(
        work,
        name,
        f"{side['ms']:,.0f}",
        f"{side['tokens_per_second']:,.0f}",
        f"{side['rows_per_second']:,.1f}",
        f"{side['first_call_seconds']:.1f}",
        f"{ratio:.2f}x" if name == "msjax" else "",
      )
  return out


def main(_) -> None:
  """Checks, times and prints."""
  S, threads = _STREAMS.value, len(os.sched_getaffinity(0))
  if TOKENS % S:
    raise InputError(f"--streams: {S}; expected a divisor of {TOKENS}")
  jax.config.update("jax_platforms", "cpu")
  torch.set_num_threads(threads)
  conditions = (
    f"decoding {_ROWS.value} rows, reading {TOKENS:,} tokens at once, training on {BATCH} x "
    f"{TOKENS:,} tokens, {S} streams, float32; "
    f"load before {os.getloadavg()[0]:.1f}; jax {jax.__version__}, "
    f"torch {torch.__version__} and transformers {transformers.__version__}, {threads} threads; "
    "a first call compiles or warms up and is in no other column"
  )
  streams = Streams(tuple(Stream.parse(f"s{i}:internal") for i in range(S)), silence_id=0)
  rng = np.random.default_rng(0)
  figures = {}
  for name, cfg in (("58 M", MODEL), ("tiny", TINY)):
    tokens = rng.integers(0, cfg.vocab_size, (BATCH, TOKENS // S, S), np.int32)
    oracle = Transformers(cfg, streams, tokens)
    sides = {"msjax": Msjax(cfg, streams, oracle.weights, tokens), "transformers": oracle}
    figures[f"decoding, {name}"] = time_decoding(sides, oracle, tokens[0, 0])
    if cfg is MODEL:
      figures["prefill"] = time_prefill(sides, oracle, tokens[0])
      figures["training step"] = time_training(sides)
  if _JSON.value:
    print(json.dumps({"conditions": conditions, **figures}))
  else:
    Console().print(table(figures, conditions))


if __name__ == "__main__":
  cli.run(main)
