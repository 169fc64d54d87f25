"""A trained model as its users hold it: streams, tokenizer, logits, rows."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from msjax import mesh
from msjax.config import Config, LossConfig
from msjax.decoding.engine import Engine
from msjax.decoding.policy import Policy
from msjax.decoding.prepared import prepare
from msjax.decoding.session import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError, nearest
from msjax.hub import import_ as hub
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import load_params
from msjax.training.state import Learner, Params, summarize
from msjax.workdir import WorkDir

_QUIET_ROWS = 4  # with no row count given, generation ends after so many rows of silence
_LONGEST_ANSWER = 256  # rows after the last given token, with no row count given


class Row(NamedTuple):
  """One generated row.

  Attributes:
    index: from 0.
    tokens: id by stream name.
    text: by stream name, what became readable with this row; silence adds nothing.
  """

  index: int
  tokens: dict[str, int]
  text: dict[str, str]


class Model:
  """Parameters with everything needed to use them; see `msjax.load`."""

  def __init__(self, config: Config, streams: Streams, tokenizer: Tokenizer, params: Params):
    """Takes a run's static parts and its parameters."""
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

  def engine(self, places: int = 1, **options: int | bool) -> Engine:
    """Returns an `Engine` of this model: live sessions, rows of token ids; options are its own.

    The first call makes a second copy of the parameters, cut up for decoding, and keeps it.
    """
    if self._prepared is None:
      self._prepared = prepare(self.module)
    return Engine(self._prepared, places, **options)

  def generate(
    self,
    inputs: Mapping[str, str] = {},
    at: Iterable[tuple[int, str, str]] = (),
    rows: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
  ) -> Iterator[Row]:
    """Reads text one token a row and yields every row as it is made.

    Args:
      inputs: text by input stream, read from row 0 on.
      at: (row, input stream, text): read from that row on; where the stream is still being read,
        right after.
      rows: how many to make; None: until the text is read and four rows passed in silence.
      temperature: 0 takes the likeliest token.
      seed: of what is drawn.

    Raises:
      InputError: an unknown stream, one that is no input, a row that is never reached, a
        temperature below 0.
    """
    if rows is not None and rows < 1:
      raise InputError(f"rows: {rows}; expected 1 or more")
    if not 0 <= temperature < math.inf:
      raise InputError(f"temperature: {temperature}; expected 0, the likeliest token, or more")
    if not isinstance(inputs, Mapping):
      raise InputError(f"inputs: {inputs!r}; expected text by stream, as in {{'user': 'hello'}}")
    schedule = Schedule(self.streams)
    given = itertools.chain(((0, stream, text) for stream, text in inputs.items()), at)
    given = [(row, stream, self._said(text)) for row, stream, text in map(_placed, given)]
    for row, stream, ids in sorted(given, key=lambda g: g[0]):  # no text is cut by an earlier one
      schedule.put(row, stream, ids)
    if rows is not None and schedule.rows > rows:
      raise InputError(f"rows: {rows} end before the given text, which takes {schedule.rows} rows")
    return self._rows(schedule, rows, temperature, seed)

  def _said(self, text: str) -> list[int]:
    """Tokens of a message, ended as messages were in training."""
    if not isinstance(text, str):
      raise InputError(f"text {text!r}: expected a str, not {type(text).__name__}")
    ids = self.tokenizer.encode(text)
    return [*ids, self.tokenizer.end_id] if self.config.data.end_token else ids

  def _rows(self, schedule, rows, temperature, seed) -> Iterator[Row]:
    names = self.streams.names
    written = list(self.streams.of_kind("output", "internal"))
    hushed = (self.streams.silence_id, self.tokenizer.end_id)
    texts = [self.tokenizer.stream_decoder() for _ in names]
    limit = schedule.rows + _LONGEST_ANSWER if rows is None else rows
    engine = self.engine(rows=2 ** math.ceil(math.log2(limit)))  # like lengths share a program
    script = np.stack([schedule.row(r) for r in range(limit)])
    session = engine.join(
      policies=Policy(temperature), seed=seed, stop=Stop(rows=limit), script=script
    )
    quiet = 0
    for index in range(limit):
      session.check()
      ((_, row),) = engine.step()
      ids = [int(i) for i in row]
      all_read = index >= schedule.rows
      quiet = quiet + 1 if all_read and all(ids[s] in hushed for s in written) else 0
      last = index == limit - 1 or (rows is None and quiet == _QUIET_ROWS)
      text = [t.push(i) + (t.flush() if last else "") for t, i in zip(texts, ids)]
      yield Row(index, dict(zip(names, ids)), dict(zip(names, text)))
      if last:
        return


def _placed(given: tuple[int, str, str]) -> tuple[int, str, str]:
  """Checks one of `at`."""
  if not (isinstance(given, tuple) and len(given) == 3):
    raise InputError(f"at: {given!r}; expected tuples (row, stream, text)")
  row, stream, _ = given
  if not (isinstance(row, int) and row >= 0):
    raise InputError(f"row {row!r} for stream {stream!r}: expected a whole number, 0 or more")
  return given


class Schedule:
  """Which tokens the input streams get in which row.

  A model without input streams, such as a plain language model, is given text in any stream.
  """

  def __init__(self, streams: Streams):
    """Starts empty."""
    self.streams = streams
    self._cells: list[dict[int, int]] = [{} for _ in streams.names]  # token by row

  def put(self, row: int, stream: str, ids: list[int]) -> None:
    """Appends tokens to a stream from `row` on, or from where it has been read to."""
    s, inputs = self.streams.id(stream), self.streams.of_kind("input")
    if inputs and s not in inputs:
      names = ", ".join(self.streams.names[i] for i in inputs)
      raise InputError(
        f"stream {stream!r}: the model writes it; text can be put into input streams: {names}"
      )
    cells = self._cells[s]
    for id in ids:
      while row in cells:
        row += 1
      cells[row] = id

  @property
  def rows(self) -> int:
    """Rows up to the last given token, at least 1."""
    return max((max(cells) + 1 for cells in self._cells if cells), default=1)

  def row(self, index: int) -> np.ndarray:
    """Returns int32 [S]: given tokens, silence in idle input streams, FREE elsewhere."""
    idle = {"input": self.streams.silence_id}
    return np.array(
      [
        cells.get(index, idle.get(stream.kind, FREE))
        for stream, cells in zip(self.streams.streams, self._cells)
      ],
      np.int32,
    )


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
  return Model(config, streams, tokenizer, load_params(directory.checkpoints, abstract, step))
