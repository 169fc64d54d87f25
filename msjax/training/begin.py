"""How a run begins: its first state, wherever that comes from, and the program of its step."""

import dataclasses

import jax
import numpy as np
from absl import logging

from msjax import sharding
from msjax.data.pipeline import TrainingBatches
from msjax.errors import InputError
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import Checkpoints, load_params, saved_shapes
from msjax.training.state import Learner, Params, TrainState
from msjax.workdir import WorkDir


def first_state(
  learner: Learner, checkpoints: Checkpoints, batches: TrainingBatches, tokenizer: Tokenizer
) -> TrainState:
  """Restores, takes over or draws the first state; places `batches` where the state was saved.

  Every chip of the mesh in use makes or reads its own part.
  """
  config = learner.config
  if checkpoints.latest is not None:
    state = checkpoints.restore(learner.abstract(), batches)
    logging.info("going on from step %d", int(state.step))
    return state
  if config.init_from:
    params = _taken_over(learner, tokenizer, WorkDir(config.init_from))
    state = learner.begun_with(params)
  else:
    state = learner.begun()
  count = sum(p.size for p in jax.tree.leaves(state.params))
  logging.info("%s parameters on %s", f"{count:,}", sharding.described())
  return state


def _taken_over(learner: Learner, tokenizer: Tokenizer, other: WorkDir) -> Params:
  """Returns another run's parameters; streams go by name, new ones get fresh embeddings."""
  vocabulary, streams = other.tokenizer(), other.streams()
  if vocabulary.to_json() != tokenizer.to_json():
    raise InputError(
      f"config.init_from: the vocabulary of {other.path} ({vocabulary.vocab_size} tokens) is not "
      f"this run's ({tokenizer.vocab_size}); take its tokenizer by --config.data.tokenizer="
      f"{other.path / 'tokenizer.json'}"
    )
  if streams.silence_id != learner.streams.silence_id:
    raise InputError(
      f"config.init_from: silence is token {streams.silence_id} in {other.path} and token "
      f"{learner.streams.silence_id} in this run; set config.data.silence to the former"
    )
  for field in ("same_row", "skip_silence"):
    was, now = getattr(streams, field), getattr(learner.streams, field)
    if was != now:
      logging.info("config.%s: %r in %s, %r here", field, was, other.path, now)
  wanted = learner.abstract().params
  theirs, ours = _shapes(saved_shapes(other.checkpoints)), _shapes(wanted)
  if theirs != ours:
    name = next(n for n in sorted(theirs | ours) if theirs.get(n) != ours.get(n))
    raise InputError(
      f"config.init_from: {other.path} has {name} of shape {theirs.get(name)}, this run's "
      f"config.model makes {ours.get(name)}; take the model fields of its config.json"
    )
  of_streams = wanted["stream_embed"]
  old_streams = jax.ShapeDtypeStruct(
    (len(streams), of_streams.shape[1]), of_streams.dtype, sharding=of_streams.sharding
  )
  params = load_params(other.checkpoints, {**wanted, "stream_embed": old_streams})
  old, embed = np.asarray(params["stream_embed"]), np.array(learner.fresh_stream_embed())
  for i, name in enumerate(learner.streams.names):
    if name in streams.names:
      embed[i] = old[streams.id(name)]
    else:
      logging.info("stream %s is new: its embedding starts random", name)
  logging.info("starting from the parameters of %s", other.path)
  return {**params, "stream_embed": embed}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  """Shapes of parameters that have to be alike, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
  return {name: shape for name, shape in shapes.items() if "stream_embed" not in name}


# From the most that is kept for the backward pass to the least, as far as it pays: what is worked
# out again for "dots" costs less than reading it back.
_REMAT = ("dots", "qkv", "attention", "full")


def program(
  learner: Learner, state: TrainState, batch: dict[str, jax.Array]
) -> jax.stages.Compiled:
  """Compiles a run's step for arrays like these; chooses what is kept where remat is `auto`.

  Raises:
    InputError: not even the least that can be kept fits into memory.
  """
  remat = learner.config.model.remat
  for choice in _REMAT if remat == "auto" else (remat,):
    model = dataclasses.replace(learner.config.model, remat=choice)
    chosen = dataclasses.replace(learner, config=dataclasses.replace(learner.config, model=model))
    try:
      compiled = chosen.jitted_step().lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      lacking = error
      continue
    if remat == "auto":
      logging.info("config.model.remat: auto is %r", choice)
    return compiled
  raise InputError(
    f"config.model.remat: {remat!r} does not fit into the memory of a chip "
    f"({str(lacking).splitlines()[0][:200]}); {sharding.advice()}"
  )
