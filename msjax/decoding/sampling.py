"""From logits to tokens."""

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, temperature: jax.Array, keys: jax.Array) -> jax.Array:
  """Draws one token a cell: the likeliest at temperature 0.

  Args:
    logits: float32 [B, S, V].
    temperature: float32 [].
    keys: one PRNG key a session, [B]; every stream draws from a key of its own.

  Returns:
    int32 [B, S].
  """

  def draw(session_logits, key):
    stream_keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(logits.shape[1]))
    scaled = session_logits / jnp.maximum(temperature, 1e-6)
    return jax.vmap(jax.random.categorical)(stream_keys, scaled).astype(jnp.int32)

  def greedy():
    # What argmax gives, which on CPU is a scalar loop and takes eight times as long.
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    below = logits < logits.max(-1, keepdims=True)
    return jnp.where(below, logits.shape[-1] - 1, index).min(-1)

  return jax.lax.cond(temperature > 0, lambda: jax.vmap(draw)(logits, keys), greedy)
