"""The optimizer and its schedules, from Optax parts."""

from typing import Any

import jax
import optax

from msjax.config import OptimConfig


def schedule(config: OptimConfig, steps: int, peak: float) -> optax.Schedule:
  """Learning rate by step: linear warm-up to `peak`, then constant with cooldown, or cosine.

  Warm-up starts above 0 and cooldown ends above it, so that no step is taken in vain.
  """
  warmup = lambda step: peak * (step + 1) / max(config.warmup_steps, 1)
  rest = steps - config.warmup_steps
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, max(rest, 1), config.final_fraction)
  elif config.cooldown_steps:
    cooldown = optax.linear_schedule(peak, 0.0, config.cooldown_steps)
    constant = optax.constant_schedule(peak)
    main = optax.join_schedules([constant, cooldown], [rest - config.cooldown_steps])
  else:
    main = optax.constant_schedule(peak)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


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
  group = lambda path, _: "stream_embedding" if _last(path) == "stream_embed" else "backbone"
  return jax.tree_util.tree_map_with_path(group, params)


def _decays(params: Any) -> Any:
  """Which parameters weight decay touches: matrices, not norms, biases or stream embeddings."""
  undecayed = lambda name: name.endswith(("norm", "bias")) or name == "stream_embed"
  return jax.tree_util.tree_map_with_path(lambda path, _: not undecayed(_last(path)), params)


def _last(path) -> str:
  return str(path[-1].key)
