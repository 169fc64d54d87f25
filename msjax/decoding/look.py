"""A look inside: how sure the model was of a row, and where it attended while it made it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from msjax import sharding
from msjax.streams import Streams, Visibility


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Look:
  """What B sessions, or one, thought of their next row, before any policy.

  Attributes:
    entropy: float32 [B, S], of the next token, in nats.
    ids: int32 [B, S, k], the likeliest tokens.
    log_probs: float32 [B, S, k], theirs.
    attention: float32 [B, S, S], which share of the attention of the cell in stream s of the last
      row went to each stream, itself included; mean of all heads and layers.
  """

  entropy: Any
  ids: Any
  log_probs: Any
  attention: Any

  def of(self, session: int, count: int) -> "Look":
    """Copies that of one session, with so many tokens."""
    tokens = lambda x: x[session, :, :count].copy()
    entropy, attention = self.entropy[session].copy(), self.attention[session].copy()
    return Look(entropy, tokens(self.ids), tokens(self.log_probs), attention)


def look(logits: jax.Array, attention: jax.Array, count: int) -> Look:
  """Makes a look of the chip's logits float32 [B, S, V] and of the attention [B, S, S]."""
  top = sharding.highest(logits.max(-1), "vocab")[..., None]
  odds = jnp.exp(logits - top)
  whole = sharding.total(odds.sum(-1), "vocab")
  mean = sharding.total(jnp.where(odds > 0, odds * (logits - top), 0.0).sum(-1), "vocab") / whole
  scores, ids = jax.lax.top_k(logits, min(count, logits.shape[-1]))
  ids += sharding.index("vocab") * logits.shape[-1]
  scores, ids = sharding.gather(scores, "vocab", 2), sharding.gather(ids, "vocab", 2)
  scores, best = jax.lax.top_k(scores, min(count, scores.shape[-1]))
  return Look(
    entropy=jnp.log(whole) - mean,
    ids=jnp.take_along_axis(ids, best, -1),
    log_probs=scores - top - jnp.log(whole)[..., None],
    attention=attention,
  )


def attended(q: jax.Array, k: jax.Array, visibility: Visibility, streams: Streams) -> jax.Array:
  """Where attention goes.

  Args:
    q: [B, N, S, H], the cells of one row in attention order.
    k: [B, K, H, M], of the cache, the row's own among them.
    visibility: of the row.
    streams: whose cells these are.

  Returns:
    float32 [B, S, S], by stream ids: what a cell gives each stream, mean of all chips' heads.
  """
  B, N, S, H = q.shape
  K, M = k.shape[1], k.shape[3]
  f32 = {"preferred_element_type": jnp.float32}
  scores = jnp.einsum("bkgsh,bkhm->bkgsm", q.reshape(B, K, N // K, S, H), k, **f32) / H**0.5
  seen = visibility.dense()[:, None, None]
  shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  by_cell = sharding.total(shares.sum((1, 2)), "heads") / (N * sharding.size("heads"))
  by_place = by_cell @ jax.nn.one_hot(jnp.arange(M) % S, S)
  place = jnp.argsort(jnp.array(streams.order))
  return by_place[:, place][:, :, place]
