"""An exported folder against the model that it was made of."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.hub.export import MANIFEST
from msjax.hub.import_ import read_checkpoint
from msjax.model import Model
from msjax.streams import HOLE

_ROWS = 32


class Verified(NamedTuple):
  """A folder against the model that it was made of, both computed in float32.

  Attributes:
    cells: compared.
    max_difference: of logits.
    same_likeliest: fraction of cells with the same likeliest token.
    kl: mean divergence in nats, of the folder's distribution from the model's.
    beyond_rounding: largest difference of logits from the model rounded to the folder's dtype.
  """

  cells: int
  max_difference: float
  same_likeliest: float
  kl: float
  beyond_rounding: float

  @property
  def good(self) -> bool:
    """Whether rounding explains the difference."""
    return self.beyond_rounding < 1e-3


def verify(model: Model, folder: pathlib.Path) -> Verified:
  """Loads a folder from `export` and compares logits on random rows, half of them silence.

  Holds three copies of the parameters. Of a folded export the other streams' cells are holes.
  """
  made = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
  rng, V, shape = np.random.default_rng(0), model.tokenizer.vocab_size, (2, _ROWS)
  tokens = rng.integers(0, V, (*shape, len(model.streams)))
  tokens[rng.random(tokens.shape) < 0.5] = model.streams.silence_id
  columns = list(range(len(model.streams)))
  if made["stream"] is not None:
    columns = [model.streams.id(made["stream"])]
    tokens[:, :, np.arange(len(model.streams)) != columns[0]] = HOLE
  again = read_checkpoint(folder, silence=model.streams.silence_id)
  plain = again.config.changed({"model.dtype": "float32"})
  theirs = Model(plain, again.streams, again.tokenizer, again.params)
  with jax.default_matmul_precision("highest"):
    found = theirs.logits(tokens[:, :, columns])
    whole, rounded = (
      _as_exported(model, made["stream"], dtype).logits(tokens)[:, :, columns]
      for dtype in ("float32", made["dtype"])
    )
  whole_log, found_log = jax.nn.log_softmax(whole), jax.nn.log_softmax(found)
  return Verified(
    cells=found[..., 0].size,
    max_difference=float(jnp.abs(whole - found).max()),
    same_likeliest=float((whole.argmax(-1) == found.argmax(-1)).mean()),
    kl=float((jnp.exp(whole_log) * (whole_log - found_log)).sum(-1).mean()),
    beyond_rounding=float(jnp.abs(rounded - found).max()),
  )


def _as_exported(model: Model, stream: str | None, dtype: str) -> Model:
  """The model with the parameters that a folder of this dtype holds, computed in float32."""
  config, params = model.config.changed({"model.dtype": "float32"}), dict(model.params)
  if stream is not None:
    config.model.tied_head = False
    params.setdefault("head", params["embed"])
    params["embed"] = params["embed"] + params["stream_embed"][model.streams.id(stream)]
    params["stream_embed"] = jnp.zeros_like(params["stream_embed"])
  params = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), params)
  return Model(config, model.streams, model.tokenizer, params)
