"""How a run begins: its first state, wherever that comes from, and the program of its step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from msjax import mesh
from msjax.data.pipeline import TrainingBatches
from msjax.errors import InputError
from msjax.kernels.static import hbm_overrun
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
  logging.info("%s parameters on %s", f"{count:,}", mesh.described())
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


# From the most that is kept for the backward pass to the least, from where it pays on: to keep all
# that is worked out, as "none" does, costs more time than to work some of it out again.
_REMAT = ("dots", "qkv", "attention", "full")


class DoesNotFit(InputError):
  """A step needs more memory than a chip has.

  Attributes:
    remat: what the step keeps, the least that is allowed.
    needed: bytes a chip, None where the compiler does not say.
    capacity: bytes a chip that programs can have, alike.
  """

  def __init__(self, remat: str, error: jax.errors.JaxRuntimeError):
    """Takes what the compiler raised, with the least kept."""
    self.remat = remat
    self.needed, self.capacity = hbm_overrun(error) or (None, None)
    how_much = (
      f"{self.needed / 2**30:.2f} of {self.capacity / 2**30:.2f} GiB" if self.needed else ""
    )
    ways = ["more chips", "a larger config.train.micro_batches", "a smaller config.data.rows"]
    if remat != "full":
      ways.append("remat=full")
    super().__init__(
      f"config.model.remat: with {remat!r} a step needs more memory than a chip has "
      f"({how_much or str(error).splitlines()[0][:200]}); expected "
      f"{', '.join(ways[:-1])} or {ways[-1]}"
    )


class Program(NamedTuple):
  """The compiled step of a run.

  Attributes:
    remat: what it keeps; never `auto`.
    step: what `compile` of `program` returned.
  """

  remat: str
  step: Any


def program(
  learner: Learner,
  state: TrainState,
  batch: dict[str, jax.Array],
  compile: Callable[[jax.stages.Lowered], Any] = jax.stages.Lowered.compile,
) -> Program:
  """Compiles a run's step for arrays like these; chooses what is kept where remat is `auto`.

  Args:
    learner: of the run.
    state: or its shapes, on the mesh in use.
    batch: alike.
    compile: compiles.

  Raises:
    DoesNotFit: not even with the least kept.
  """
  remat = learner.config.model.remat
  for choice in _REMAT if remat == "auto" else (remat,):
    keeping = learner.keeping(choice)
    try:
      step = compile(keeping.jitted_step().lower(state, batch))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      lacking = error
      continue
    return Program(choice, step)
  raise DoesNotFit(choice, lacking)
