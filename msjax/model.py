"""A trained model as its users hold it: streams, tokenizer, logits, rows."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from msjax import mesh
from msjax.config import Config, LossConfig
from msjax.decoding.engine import Engine
from msjax.decoding.policy import TALK, Policy, of_streams
from msjax.decoding.prepared import prepare
from msjax.errors import InputError, nearest
from msjax.fingerprint import fingerprint
from msjax.hub import import_ as hub
from msjax.streams import HOLE, Streams
from msjax.talk.conversation import Prompt, Row, answers, begun
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import chosen, load_params
from msjax.training.state import Learner, Params, summarize
from msjax.workdir import WorkDir


class Model:
  """Parameters with everything needed to use them; see `msjax.load`."""

  def __init__(
    self,
    config: Config,
    streams: Streams,
    tokenizer: Tokenizer,
    params: Params,
    step: int | None = None,
  ):
    """Takes a run's static parts and its parameters, of which step if of one."""
    self.step = step
    self.config, self.streams, self.tokenizer = config, streams, tokenizer
    self.module = Learner(config, streams, tokenizer.vocab_size).model(params)
    self._logits = jax.jit(lambda model, tokens: model.logits(model(tokens), tokens))
    self._losses = functools.cache(self._compiled_loss)
    self._prepared = None

  def __repr__(self) -> str:
    """Says what it is in one line."""
    count = sum(p.size for p in jax.tree.leaves(self.params))
    return f"Model({count:,} parameters; {', '.join(map(str, self.streams.streams))})"

  @property
  def params(self) -> Params:
    """The parameters, as a nested dict."""
    return nnx.to_pure_dict(nnx.state(self.module, nnx.Param))

  def logits(
    self,
    tokens: np.ndarray | jax.Array,
    *,
    same_row: str | None = None,
    skip_silence: bool | None = None,
  ) -> jax.Array:
    """What the model predicts at every cell of whole grids.

    Args:
      tokens: int [B, R, S], streams by id; -1 is a hole.
      same_row: another variant of the rule than the model's own.
      skip_silence: likewise.

    Returns:
      float32 [B, R, S, V]: at (r, s) for the cell (r + 1, s); 0 at holes.
    """
    module, streams = self.module, self._under(same_row, skip_silence)
    if streams != self.streams:
      module = Learner(self.config, streams, self.tokenizer.vocab_size).model(self.params)
    return self._logits(module, self._grid(tokens))

  def loss(
    self,
    tokens: np.ndarray | jax.Array,
    weights: np.ndarray | None = None,
    *,
    same_row: str | None = None,
    skip_silence: bool | None = None,
    **options: float,
  ) -> dict[str, float]:
    """The loss of whole grids, as training computes it.

    Args:
      tokens: as for `logits`.
      weights: float [B, R, S] of the data, at the cell that is predicted; None: 1 everywhere.
      same_row: as for `logits`.
      skip_silence: as for `logits`.
      options: fields of `config.LossConfig` that are not to be the run's.

    Returns:
      `loss`; `loss/NAME` and `spoken/NAME` by stream, as training logs them, in nats.
    """
    known = [field.name for field in dataclasses.fields(LossConfig)]
    for name in options:
      if name not in known:
        raise InputError(f"loss option {name!r}: expected {', '.join(known)}{nearest(name, known)}")
    config = dataclasses.replace(self.config.loss, **options)
    tokens = self._grid(tokens)
    weights = np.broadcast_to(1.0 if weights is None else weights, tokens.shape)
    score = self._losses(self._under(same_row, skip_silence), dataclasses.astuple(config))
    return {n: float(v) for n, v in score(self.params, tokens, weights.astype(np.float32)).items()}

  def _compiled_loss(self, streams: Streams, options: tuple[float, ...]):
    config = dataclasses.replace(self.config, loss=LossConfig(*options))
    learner = Learner(config, streams, self.tokenizer.vocab_size)

    def score(params, tokens, weights):
      segments = jnp.zeros(tokens.shape[:2], jnp.int32)
      batch = {"tokens": tokens, "weights": weights, "segments": segments}
      scores = summarize(learner.evaluate(params, batch), streams)
      return {name: value for name, value in scores.items() if name != "cells"}

    return jax.jit(score)

  def _under(self, same_row: str | None, skip_silence: bool | None) -> Streams:
    """The streams under another rule, where one is given."""
    rule = {"same_row": same_row, "skip_silence": skip_silence}
    return dataclasses.replace(self.streams, **{k: v for k, v in rule.items() if v is not None})

  def _grid(self, tokens: np.ndarray | jax.Array) -> jax.Array:
    """Checks tokens."""
    tokens = np.asarray(tokens)
    S, V = len(self.streams), self.tokenizer.vocab_size
    is_grid = tokens.ndim == 3 and tokens.shape[2] == S and tokens.size
    if not (is_grid and np.issubdtype(tokens.dtype, np.integer)):
      raise InputError(
        f"tokens: {tokens.dtype} of shape {tokens.shape}; expected integers [B, R, {S}], B and R "
        f"at least 1, streams {', '.join(self.streams.names)}"
      )
    if not (tokens.min() >= HOLE and tokens.max() < V):
      raise InputError(
        f"tokens: ids from {tokens.min()} to {tokens.max()}; expected -1 (hole) to {V - 1}"
      )
    return jnp.asarray(tokens, jnp.int32)

  def engine(self, places: int = 1, **options: Any) -> Engine:
    """Returns an `Engine` of this model: live sessions, rows of token ids; options are its own.

    The first call makes a second copy of the parameters, cut up for decoding, and keeps it.
    """
    if self._prepared is None:
      self._prepared = prepare(self.module)
    ours = {"decoder": self.tokenizer.stream_decoder, "identity": lambda: self.identity}
    return Engine(self._prepared, places, **ours, **options)

  @functools.cached_property
  def identity(self) -> str:
    """16 hex digits: of the parameters, the shape of the model, streams and tokenizer."""
    about = dataclasses.asdict(self.config.model), self.streams.to_json(), self.tokenizer.to_json()
    return fingerprint(self.params, json.dumps(about, sort_keys=True))

  def said(self, text: str) -> list[int]:
    """Tokens of a message, ended as messages were in training."""
    if not isinstance(text, str):
      raise InputError(f"text {text!r}: expected a str, not {type(text).__name__}")
    ids = self.tokenizer.encode(text)
    return [*ids, self.tokenizer.end_id] if self.config.data.end_token else ids

  def generate(
    self,
    inputs: Mapping[str, str] = {},
    at: Iterable[tuple[int, str, str]] = (),
    rows: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    policies: Mapping[str, Policy] | Policy | None = None,
  ) -> Iterator[Row]:
    """Reads text one token a row and yields every row as it is made.

    Args:
      inputs: text by input stream, read from row 0 on.
      at: (row, input stream, text): read from that row on; where the stream is still being read,
        right after.
      rows: how many to make; None: until the text is read and four rows passed in silence.
      temperature: one for all tokens, 0 takes the likeliest; None: as `policy.TALK` has it.
      seed: of what is drawn.
      policies: by stream, others as `TALK`, or one for all, in place of that.

    Raises:
      InputError: an unknown stream, one that is no input, a row that is never reached, a
        policy out of range.
    """
    if policies is not None and temperature is not None:
      raise InputError(f"temperature: {temperature}, and policies, which have one; expected either")
    if temperature is not None:
      policies = Policy(temperature)
    policies = of_streams(TALK if policies is None else policies, self.streams, TALK)
    engine, conversation = begun(self, Prompt(inputs, tuple(at), rows), policies, seed)

    def written():  # what is wrong is told before the first row is asked for
      while not conversation.is_over:
        engine.step()
        yield from conversation.rows()

    return written()

  def answers(
    self,
    prompts: Iterable[Prompt | Mapping[str, Any]],
    places: int = 8,
    policies: Mapping[str, Policy] | Policy = TALK,
    seed: int = 0,
  ) -> Iterator[tuple[int, list[Row], str]]:
    """Lets many conversations go on side by side.

    Args:
      prompts: each a `Prompt`, or a dict of `inputs`, `at` and `rows`, which are as for `generate`.
      places: conversations at a time.
      policies: as for `generate`.
      seed: with the number of the prompt it says what is drawn.

    Yields:
      Which prompt (from 0), its rows, and why they end, of each when it is over.

    Raises:
      InputError: as for `generate`; something that is no prompt.
    """
    numbered = enumerate(map(Prompt.of, prompts))
    return answers(self, numbered, places, of_streams(policies, self.streams, TALK), seed)


def load(directory: str | os.PathLike, step: int | str = "latest") -> Model:
  """Loads a work directory or a Hugging Face folder.

  Of a work directory every device of the mesh in use reads its part (`mesh.decode_mesh`); what
  is decoded then is to be decoded on that mesh. Without a mesh, one device reads all.

  Args:
    directory: of a Hugging Face folder without stream embeddings the one stream is `text`.
    step: of a work directory: a checkpoint's step, `latest`, or `best` by held-out loss.
  """
  path = pathlib.Path(directory).expanduser()
  if hub.is_checkpoint(path):
    if step != "latest":
      raise InputError(f"step: {step!r}, but {path} is one checkpoint of Hugging Face's")
    found = hub.read_checkpoint(path)
    if found.unused:
      logging.warning("%s: nothing takes %s", path, ", ".join(found.unused))
    return Model(found.config, found.streams, found.tokenizer, found.params)
  directory = WorkDir(directory)
  config, streams, tokenizer = directory.config(), directory.streams(), directory.tokenizer()
  mesh.check_sessions(config.model, 1)
  learner = Learner(config, streams, tokenizer.vocab_size)
  abstract = learner.abstract().params
  step = chosen(directory.checkpoints, step)
  params = load_params(directory.checkpoints, abstract, step)
  return Model(config, streams, tokenizer, params, step)
