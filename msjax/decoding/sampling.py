"""From logits to tokens."""

import jax
import jax.numpy as jnp

from msjax import sharding


def sample(logits: jax.Array, temperature: jax.Array, keys: jax.Array) -> jax.Array:
  """Draws one token a cell: the likeliest at temperature 0.

  What is drawn does not depend on how many chips share the vocabulary: noise goes by token, and
  only the best of each chip's tokens is compared.

  Args:
    logits: float32 [B, S, V], of the chip's tokens.
    temperature: float32 [].
    keys: one PRNG key a session, [B]; every stream draws from a key of its own.

  Returns:
    int32 [B, S].
  """
  ids = sharding.index("vocab") * logits.shape[-1] + jnp.arange(logits.shape[-1], dtype=jnp.int32)

  def noised():
    noise = jax.vmap(lambda key: _noise(key, logits.shape[1], ids))(keys)
    return logits / jnp.maximum(temperature, 1e-6) + noise

  scores = jax.lax.cond(temperature > 0, noised, lambda: logits)
  top = sharding.highest(scores.max(-1), "vocab")
  # What argmax gives, which on CPU is a scalar loop and takes eight times as long.
  lowest = jnp.where(scores < top[..., None], jnp.iinfo(jnp.int32).max, ids).min(-1)
  return -sharding.highest(-lowest, "vocab")


def _noise(key: jax.Array, streams: int, ids: jax.Array) -> jax.Array:
  """Gumbel noise float32 [streams, len(ids)] of one session."""
  stream_keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(streams))
  of_token = lambda key, id: jax.random.gumbel(jax.random.fold_in(key, id))
  return jax.vmap(lambda key: jax.vmap(lambda id: of_token(key, id))(ids))(stream_keys)
