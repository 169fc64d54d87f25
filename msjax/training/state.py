"""The train state, how it begins, and the one step that advances it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msjax import sharding
from msjax.config import Config
from msjax.models import axes
from msjax.models.transformer import Transformer
from msjax.streams import HOLE, Streams
from msjax.training.loss import Penalties, cross_entropy
from msjax.training.optim import optimizer, schedule

Params = dict[str, Any]
Batch = dict[str, jax.Array]  # tokens, weights [.., B, R, S] and segments [.., B, R]
Scalars = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run is, but for its data position.

  Attributes:
    step: int32 [], steps taken.
    params: nested dict of float32 arrays; layers carry a leading axis.
    opt_state: Optax's.
  """

  step: jax.Array
  params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
  """The static half of a run: what turns a state and a batch into the next state."""

  config: Config
  streams: Streams
  vocab_size: int

  @functools.cached_property
  def graphdef(self) -> nnx.GraphDef:
    """The model without its arrays: `nnx.merge(graphdef, params)` is the model."""
    return nnx.graphdef(jax.eval_shape(lambda: self._build(jax.random.key(0))))

  @functools.cached_property
  def tx(self) -> optax.GradientTransformation:
    """The optimizer."""
    return optimizer(self.config.optim, self.config.train.steps)

  def _build(self, key: jax.Array) -> Transformer:
    rngs = nnx.Rngs(params=key)
    return Transformer(self.config.model, self.streams, self.vocab_size, rngs=rngs)

  def init(self, key: jax.Array) -> TrainState:
    """Returns the state at step 0; traceable, so `jax.eval_shape` gives the abstract state."""
    params = nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))
    return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

  def abstract(self) -> TrainState:
    """Returns shapes, dtypes and places of a state on the mesh in use."""
    return sharding.placed(self._shapes, self._specs)

  def begun(self) -> TrainState:
    """Returns the state at step 0 with fresh parameters, every chip its part."""
    make = sharding.made(self.init, self._specs)
    return make(jax.random.key(self.config.train.seed))

  def begun_with(self, params: Params) -> TrainState:
    """Returns the state at step 0 with these parameters, which are not to be used any more."""
    make = lambda params: TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))
    placed = sharding.put(params, self._specs.params)
    return sharding.made(make, self._specs, donate_argnums=0)(placed)

  def fresh_stream_embed(self) -> jax.Array:
    """Returns what `begun` draws for the streams."""
    fresh = lambda key: self.init(key).params["stream_embed"]
    return sharding.made(fresh, sharding.spec())(jax.random.key(self.config.train.seed))

  def keeping(self, remat: str) -> "Learner":
    """Returns the same run with another choice of what is kept for the backward pass."""
    model = dataclasses.replace(self.config.model, remat=remat)
    return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

  def jitted_step(self) -> jax.stages.Wrapped:
    """Returns `step`, to be compiled for the mesh in use; it takes the state's place in memory."""
    out = (self._specs, sharding.spec())
    return sharding.made(self.step, out, donate_argnums=0)

  @functools.cached_property
  def _specs(self) -> TrainState:
    """How a state is cut."""
    return axes.specs(self._shapes)

  @functools.cached_property
  def _shapes(self) -> TrainState:
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def model(self, params: Params) -> Transformer:
    """Returns the model with these parameters."""
    return nnx.merge(self.graphdef, params)

  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
    """Takes one optimizer step on a batch of micro-batches.

    Args:
      state: donated.
      batch: tokens int32 and weights float32 [A, B, R, S], segments int32 [A, B, R], A
        micro-batches; gradients are summed over them and divided by the sum of weights of all, so
        the result does not depend on how a batch is cut.

    Returns:
      The next state; scalars of this step: loss, per-stream losses, gradient norm, learning rate.
    """
    gradients, sums = self._gradients(state, batch)
    weight = jnp.maximum(sums["weight"], 1e-9)
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    rate = schedule(self.config.optim, self.config.train.steps, self.config.optim.learning_rate)
    scalars = {
      **summarize(sums, self.streams),
      "gradient_norm": optax.tree.norm(gradients),
      "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state), scalars

  def evaluate(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Returns the sums of one batch [B, ...] that `summarize` reads; they add up over batches."""

    def of_chip(params, batch):
      return sharding.total(self._loss_sum(params, batch, None)[1], "batch")

    batch_spec = jax.tree.map(lambda _: sharding.spec("batch"), batch)
    return sharding.on_chips(of_chip, (axes.specs(params), batch_spec), sharding.spec())(
      params, batch
    )

  def cell_entropy(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns labels int32 and cross-entropies float32 in nats, both [B, R, S], of one batch."""
    labels, _, _, entropy = self._cells(params, batch, None)
    return labels, entropy

  def _gradients(self, state: TrainState, batch: Batch) -> tuple[Params, dict[str, jax.Array]]:
    """Sums of gradients and of what `summarize` reads, over all micro-batches and chips."""
    specs = axes.specs(state.params)
    grad = jax.grad(self._loss_sum, has_aux=True)

    def of_chip(step, params, batch):
      key = sharding.own_key(jax.random.fold_in(jax.random.key(self.config.train.seed), step))
      gradients, sums = _sum(
        lambda index, part: grad(params, part, jax.random.fold_in(key, index)), batch
      )
      return sharding.summed_gradients(gradients, specs), sharding.total(sums, "batch")

    of_batch = jax.tree.map(lambda _: sharding.spec(None, "batch"), batch)
    in_specs, out_specs = (sharding.spec(), specs, of_batch), (specs, sharding.spec())
    return sharding.on_chips(of_chip, in_specs, out_specs)(state.step, state.params, batch)

  def _loss_sum(self, params, batch, key):
    labels, weights, loss, entropy = self._cells(params, batch, key)
    has_label, silent = labels >= 0, labels == self.streams.silence_id
    over_cells = functools.partial(jnp.sum, axis=(0, 1), dtype=jnp.float32)
    sums = {
      "loss": loss,
      "weight": weights.sum(),
      "entropy": over_cells(entropy),  # [S], nats, every labelled cell counts one
      "entropy_spoken": over_cells(jnp.where(silent, 0.0, entropy)),
      "cells": over_cells(has_label),
      "cells_spoken": over_cells(has_label & ~silent),
    }
    return loss, sums

  def _cells(self, params, batch, key):
    rows = batch["tokens"].shape[1]
    tokens, segments, weights = self._dealt_out(batch)
    labels, weights = self.streams.labels(
      tokens, segments, weights, self.config.loss.silence_weight
    )
    model = self.model(params)
    hidden = model.cells(tokens, segments, dropout_key=key)
    loss, entropy = cross_entropy(
      Penalties.of(self.config.loss),
      hidden.reshape(-1, hidden.shape[-1]),
      model.output_matrix,
      *(self.streams.to_attention(x).reshape(-1) for x in (labels, weights)),
    )
    entropy = self.streams.from_attention(entropy.reshape(len(tokens), -1))
    return labels[:, :rows], weights[:, :rows], loss, entropy[:, :rows]

  def _dealt_out(self, batch):
    """Tokens, segments and weights with so many rows of holes more that cells can be dealt out."""
    tokens, chips = batch["tokens"], sharding.size("cells")
    multiple = chips // math.gcd(chips, len(self.streams))
    fill = [(0, 0), (0, -tokens.shape[1] % multiple), (0, 0)]
    return (
      jnp.pad(tokens, fill, constant_values=HOLE),
      jnp.pad(batch["segments"], fill[:2]),
      jnp.pad(batch["weights"], fill),
    )


def _sum(of_part, batch: Batch):
  """Sum of `of_part(index, part)` over the leading axis of a batch, one part at a time."""
  first = 0, jax.tree.map(lambda x: x[0], batch)
  count = len(batch["tokens"])
  if count == 1:
    return of_part(*first)

  def add(total, indexed):
    return jax.tree.map(jnp.add, total, of_part(*indexed)), None

  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, *first))
  return jax.lax.scan(add, zeros, (jnp.arange(count), batch))[0]


def summarize(sums: dict[str, jax.Array], streams: Streams) -> Scalars:
  """Turns sums into means: `loss` as trained on, `loss/NAME` per labelled cell of a stream,
  `spoken/NAME` per labelled cell that is no silence; in nats. Streams without such cells give 0.
  """
  mean = lambda total, count: total / jnp.maximum(count, 1)
  scalars = {"loss": sums["loss"] / jnp.maximum(sums["weight"], 1e-9)}
  for i, name in enumerate(streams.names):
    scalars[f"loss/{name}"] = mean(sums["entropy"][i], sums["cells"][i])
    scalars[f"spoken/{name}"] = mean(sums["entropy_spoken"][i], sums["cells_spoken"][i])
  scalars["cells"] = sums["cells"].sum()
  return scalars
