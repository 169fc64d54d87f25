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

  greedy = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.lax.cond(temperature > 0, lambda: jax.vmap(draw)(logits, keys), greedy)
