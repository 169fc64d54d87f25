"""The optimizer and its schedules, from Optax parts."""

from typing import Any

import jax
import optax

from msjax.config import OptimConfig

GROUPS = ("backbone", "stream_embedding")


def schedule(config: OptimConfig, steps: int, peak: float) -> optax.Schedule:
  """Learning rate by step: linear warm-up to `peak`, then constant with cooldown, or cosine."""
  warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
  rest = steps - config.warmup_steps
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, max(rest, 1), config.final_fraction)
  else:
    main = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, max(config.cooldown_steps, 1)),
      ],
      [rest - config.cooldown_steps],
    )
  if config.schedule == "constant" and not config.cooldown_steps:
    main = optax.constant_schedule(peak)
  # The first update of a warm-up is already above zero: step 0 uses the value of step 1.
  joined = optax.join_schedules([warmup, main], [config.warmup_steps])
  return (lambda step: joined(step + 1)) if config.warmup_steps else main


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm; stream embeddings have their own learning rate."""
  rates = {
    "backbone": config.learning_rate,
    "stream_embedding": config.stream_learning_rate or config.learning_rate,
  }
  groups = {
    name: optax.adamw(
      schedule(config, steps, rate),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decays,
    )
    for name, rate in rates.items()
  }
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, optax.partition(groups, _group))


def _group(params: Any) -> Any:
  """Names the group of every parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: GROUPS[_names(path)[-1] == "stream_embed"], params
  )


def _decays(params: Any) -> Any:
  """Which parameters weight decay touches: matrices, not norms, biases or stream embeddings."""
  undecayed = lambda name: name.endswith(("norm", "bias")) or name == "stream_embed"
  return jax.tree_util.tree_map_with_path(lambda path, _: not undecayed(_names(path)[-1]), params)


def _names(path) -> tuple[str, ...]:
  return tuple(str(key.key) for key in path)
