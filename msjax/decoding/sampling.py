"""From logits to tokens: what counts against them, what is cut off, what is drawn.

Each chip has the logits of its own tokens; of these only the few best are sorted and gathered.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from msjax import sharding
from msjax.decoding.policy import Knobs
from msjax.kernels import api
from msjax.streams import HOLE, Streams

NOT_FINITE = -3  # instead of a token: none is the likeliest
_NEVER = -1  # a count that has not begun
_NO_TOKEN = jnp.iinfo(jnp.int32).max  # whose key draws what is not drawn by token
_LOWEST = jnp.iinfo(jnp.int32).min
_BEST = 128  # tokens that are looked at first
_SEARCHED = 1024  # tokens among which the likeliest is searched for, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """What policies ask of the rows that sessions have had. Counts are -1 until they begin.

  Attributes:
    rows: int32 [B], how many.
    listened: int32 [B], rows since an input stream first spoke, that one included.
    quiet: int32 [B], rows since an input stream last spoke.
    quiet_in_all: int32 [B], of the rows listened to, those in which none spoke.
    silent: int32 [B, S], rows since a stream last spoke, or since the first; from 0.
    spoken: int32 [B, S], rows in which it spoke, from 0.
    had: bool [B, S, V], the chip's tokens that it spoke; [B, S, 0] where no policy asks.
  """

  rows: jax.Array
  listened: jax.Array
  quiet: jax.Array
  quiet_in_all: jax.Array
  silent: jax.Array
  spoken: jax.Array
  had: jax.Array

  @classmethod
  def empty(cls, sessions: int, streams: Streams, vocab_size: int) -> "Past":
    """Nothing has been said; where there are no input streams, all rows are listened to."""
    S = len(streams)
    begun = _NEVER if streams.of_kind("input") else 0
    count = lambda: jnp.full(sessions, begun, jnp.int32)  # arrays that can be donated one by one
    return cls(
      rows=jnp.zeros(sessions, jnp.int32),
      listened=count(),
      quiet=count(),
      quiet_in_all=count(),
      silent=jnp.zeros((sessions, S), jnp.int32),
      spoken=jnp.zeros((sessions, S), jnp.int32),
      had=jnp.zeros((sessions, S, vocab_size), bool),
    )

  def with_row(self, tokens: jax.Array, streams: Streams, since: jax.Array | int = 0) -> "Past":
    """What it is after a row int32 [B, S]; what inputs say before row `since` [B] is not heard."""
    silent = (tokens == streams.silence_id) | (tokens == HOLE)
    heard = (~silent[:, list(streams.of_kind("input"))]).any(1) & (self.rows >= since)
    begun = heard | (self.listened > _NEVER)
    V = self.had.shape[-1]
    own = tokens - sharding.index("vocab") * V
    place = jnp.where(silent | (own < 0), V, own)  # V is nobody's: dropped
    b, s = jnp.indices(tokens.shape)
    return Past(
      rows=self.rows + 1,
      listened=jnp.where(begun, jnp.maximum(self.listened, 0) + 1, _NEVER),
      quiet=jnp.where(begun, jnp.where(heard, 0, self.quiet + 1), _NEVER),
      quiet_in_all=jnp.where(begun, jnp.maximum(self.quiet_in_all, 0) + ~heard, _NEVER),
      silent=jnp.where(silent, self.silent + 1, 0),
      spoken=self.spoken + ~silent,
      had=self.had.at[b, s, place].set(True, mode="drop"),
    )


def sample(
  logits: jax.Array,
  knobs: Knobs,
  past: Past,
  reading: jax.Array,
  silence_id: int,
  keys: jax.Array,
) -> jax.Array:
  """Draws one token a cell by its policy.

  What is drawn does not depend on how many chips share the vocabulary: noise goes by token, and
  only the best of each chip's tokens is compared.

  Args:
    logits: float32 [B, S, V], of the chip's tokens.
    knobs: policies.
    past: with the row whose logits these are.
    reading: bool [B], whether an input stream is known to speak in the row that is drawn.
    silence_id: the token that says nothing.
    keys: one PRNG key a session and row, [B]; every stream draws from a key of its own.

  Returns:
    int32 [B, S]; `NOT_FINITE` where the logits are not.
  """
  ids = sharding.index("vocab") * logits.shape[-1] + jnp.arange(logits.shape[-1], dtype=jnp.int32)
  logits = _weighed(logits, knobs, past, ids)
  must_speak = (knobs.longest > 0) & (past.silent >= knobs.longest)
  less = jnp.where(must_speak, jnp.inf, _silence_penalty(knobs, past, reading))
  logits = _lowered(logits, silence_id - ids[0], less)
  if knobs.allowed.shape[-1]:
    logits = jnp.where(knobs.allowed, logits, -jnp.inf)
  top = _highest(logits)
  drawn = _drawn(logits, top, knobs, ids, silence_id, keys)
  must_be_silent, finite = _must_be_silent(knobs, past), jnp.isfinite(top)
  if knobs.allowed.shape[-1]:  # who has to speak may have nothing to say
    must_be_silent, finite = must_be_silent | (top == -jnp.inf), finite | (top == -jnp.inf)
  return jnp.where(finite, jnp.where(must_be_silent, silence_id, drawn), NOT_FINITE)


def _weighed(logits: jax.Array, knobs: Knobs, past: Past, ids: jax.Array) -> jax.Array:
  """Applies biases, and penalties of tokens that a stream has had."""
  V = logits.shape[-1]
  if knobs.bias.shape[-1]:
    own = knobs.bias_ids - ids[0]
    place = jnp.where((knobs.bias_ids < 0) | (own < 0), V, own)
    b, s, _ = jnp.indices(place.shape)
    logits = logits.at[b, s, place].add(knobs.bias, mode="drop")
  if past.had.shape[-1]:
    factor = knobs.repetition_penalty[..., None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    repeated = repeated - knobs.presence_penalty[..., None]
    logits = jnp.where(past.had, repeated, logits)
  return logits


def _lowered(logits: jax.Array, place: jax.Array, less: jax.Array) -> jax.Array:
  """Takes `less` [B, S] from the logits in one place, if the chip has it; the rest is not read."""
  at = jnp.clip(place, 0, logits.shape[-1] - 1)
  old = jax.lax.dynamic_slice_in_dim(logits, at, 1, -1)
  new = jnp.where(place == at, old - less[..., None], old)
  return jax.lax.dynamic_update_slice_in_dim(logits, new, at, -1)


def _silence_penalty(knobs: Knobs, past: Past, reading: jax.Array) -> jax.Array:
  """What is taken from the logit of silence, float32 [B, S]: see `Silence`."""
  of_session = lambda x: x[:, None]
  foreseen = of_session(reading) & knobs.lead
  quiet = jnp.where(
    knobs.while_read & ~knobs.lead, *map(of_session, (past.quiet_in_all, past.quiet))
  )
  while_read = jnp.where(knobs.while_read, of_session(jnp.maximum(past.listened, 0)) + 1, 0)
  rows = jnp.where(foreseen, while_read, quiet + knobs.lead)
  begun = of_session(past.listened > _NEVER) | foreseen
  share = jnp.where(begun, jnp.minimum(rows / knobs.ramp, 1.0), 0.0)
  if n := knobs.shares.shape[-1]:
    row = of_session(past.rows) - knobs.since
    given = jnp.take_along_axis(knobs.shares, jnp.clip(row, 0, n - 1)[..., None], -1)[..., 0]
    share = jnp.where(given < 0, share, jnp.where(row < 0, 0.0, given))
  return knobs.penalty * share


def _must_be_silent(knobs: Knobs, past: Past) -> jax.Array:
  """Where nothing may be said, bool [B, S]."""
  unfinished = (past.spoken > 0) & (past.silent > 0) & (past.silent < knobs.shortest)
  worn = past.spoken + 1 > knobs.duty * (past.rows[:, None] + 1)
  return knobs.ablated | unfinished | ((knobs.duty < 1) & worn)


def _drawn(
  logits: jax.Array,
  top: jax.Array,
  knobs: Knobs,
  ids: jax.Array,
  silence_id: int,
  keys: jax.Array,
) -> jax.Array:
  """Draws whether to speak where that is apart, cuts off, draws; `top` [B, S] is the highest."""
  hot = knobs.temperature > 0
  cuts = hot & ((knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.min_p > 0))
  stream_keys = jax.vmap(lambda key: _stream_keys(key, logits.shape[1]))

  def noised(logits):
    scores = logits / jnp.where(hot, knobs.temperature, 1.0)[..., None]
    everything = lambda: jnp.full(hot.shape, -jnp.inf)
    least = jax.lax.cond(_anywhere(cuts), lambda: _least(scores, knobs), everything)
    noise = jax.vmap(lambda keys: _noise(keys, ids))(stream_keys(keys))
    drawn = jnp.where(scores >= least[..., None], scores + noise, -jnp.inf)
    return jnp.where(hot[..., None], drawn, logits)

  def by_chance():
    place = silence_id - ids[0]
    rests = knobs.apart & _rests(logits, top, place, stream_keys(keys))
    words = jnp.where(knobs.apart[..., None] & (ids == silence_id), -jnp.inf, logits)
    scores = noised(words)
    return jnp.where(rests, silence_id, _likeliest(scores, _highest(scores), ids))

  likeliest = lambda: _likeliest(logits, top, ids)
  return jax.lax.cond(_anywhere(hot | knobs.apart), by_chance, likeliest)


def _rests(logits: jax.Array, top: jax.Array, place: jax.Array, keys: jax.Array) -> jax.Array:
  """Draws whether streams are silent, bool [B, S], as likely as logits in one place have it."""
  at = jnp.clip(place, 0, logits.shape[-1] - 1)
  own = jax.lax.dynamic_slice_in_dim(logits, at, 1, -1)[..., 0]
  silence = sharding.highest(jnp.where(place == at, own, -jnp.inf), "vocab")
  whole = sharding.total(jnp.exp(logits - top[..., None]).sum(-1), "vocab")
  of_no_token = lambda key: jax.random.uniform(jax.random.fold_in(key, _NO_TOKEN))
  return jax.vmap(jax.vmap(of_no_token))(keys) < jnp.exp(silence - top) / whole


def _anywhere(asked: jax.Array) -> jax.Array:
  """Whether it holds for a session on any chip: all take the same branch, as they have to meet."""
  return sharding.highest(asked.any().astype(jnp.int32), "batch") > 0


def _highest(scores: jax.Array) -> jax.Array:
  """The highest score of all chips' tokens [B, S]; inf where one is NaN, which the highest of chips
  may leave out."""
  top = scores.max(-1)
  return sharding.highest(jnp.where(jnp.isnan(top), jnp.inf, top), "vocab")


def _likeliest(scores: jax.Array, top: jax.Array, ids: jax.Array) -> jax.Array:
  """The token whose score is the highest, `top`, the first of equals; int32 [B, S]."""
  V = scores.shape[-1]
  place = (_first_in_blocks if api.platform() == "cpu" else _first)(scores, top)
  lowest = jnp.where(place < V, ids[0] + place, jnp.iinfo(jnp.int32).max)
  # Else XLA takes this out of the branches that end with it, which then hand over all scores.
  return jax.lax.optimization_barrier(-sharding.highest(-lowest, "vocab"))


def _first(scores: jax.Array, top: jax.Array) -> jax.Array:
  """Where in the last axis `top` is reached first; its length if nowhere."""
  V = scores.shape[-1]
  return jnp.where(scores >= top[..., None], jnp.arange(V, dtype=jnp.int32), V).min(-1)


def _first_in_blocks(scores: jax.Array, top: jax.Array) -> jax.Array:
  """As `_first`, which on CPU is a scalar loop, like argmax: ten times as long as a maximum."""
  n = math.gcd(scores.shape[-1], _SEARCHED)
  blocks = scores.reshape(*scores.shape[:-1], -1, n)
  block = jnp.minimum(_first(blocks.max(-1), top), blocks.shape[-2] - 1)
  in_block = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
  return block * n + _first(in_block, top)


def _least(scores: jax.Array, knobs: Knobs) -> jax.Array:
  """The least score [B, S] that is drawn by top_k, top_p and min_p.

  The best scores tell it, as a rule; where they do not, because more tokens than these are to be
  drawn or are as good as the last of them, it is searched for.
  """
  best = _best(scores)
  n, no_k = best.shape[-1], (knobs.top_k == 0)[..., None]
  k = jnp.where(no_k, n, knobs.top_k[..., None])
  last = jnp.take_along_axis(best, jnp.minimum(k, n) - 1, -1)
  odds = jnp.where(best >= last, jnp.exp(best - best[..., :1]), 0.0)
  mass = odds.sum(-1, keepdims=True)
  whole = sharding.total(jnp.exp(scores - best[..., :1]).sum(-1, keepdims=True), "vocab")
  share = knobs.top_p[..., None] * jnp.where(no_k, whole, mass)
  by_p = jnp.where(jnp.cumsum(odds, -1) - odds < share, best, jnp.inf).min(-1, keepdims=True)

  all_p = (knobs.top_p >= 1)[..., None]
  by_k = jnp.where(no_k, -jnp.inf, last)
  least = jnp.where(all_p, by_k, by_p)
  worst = best[..., -1:]  # as good as this may be some that are not looked at
  enough = jnp.where(no_k, all_p | ((mass >= share) & (worst < least)), (k <= n) & (worst < last))
  known = enough | (n == scores.shape[-1] * sharding.size("vocab"))
  least = jax.lax.cond(
    ~_anywhere(~known),
    lambda: least,
    lambda: jnp.where(known, least, _searched(scores, knobs)[..., None]),
  )
  return jnp.maximum(least, best[..., :1] + jnp.log(knobs.min_p)[..., None])[..., 0]


def _best(scores: jax.Array) -> jax.Array:
  """The highest scores of all tokens [B, S, n], in falling order."""
  # Where only a part of the result is used, XLA on CPU sorts all tokens.
  top = lambda x: jax.lax.optimization_barrier(jax.lax.top_k(x, min(_BEST, x.shape[-1]))[0])
  best = top(scores)
  return best if sharding.size("vocab") == 1 else top(sharding.gather(best, "vocab", 2))


def _searched(scores: jax.Array, knobs: Knobs) -> jax.Array:
  """What `_least` is by top_k and top_p, however many tokens are drawn."""
  k = jnp.where(knobs.top_k > 0, knobs.top_k, 0)
  top = sharding.highest(scores.max(-1), "vocab")[..., None]

  def mass(bound, by_k):
    """Of the tokens from `bound` on that are drawn by top_k, relative to the best."""
    drawn = _ordered(scores) >= jnp.maximum(bound, by_k)[..., None]
    return sharding.total(jnp.where(drawn, jnp.exp(scores - top), 0.0).sum(-1), "vocab")

  count = lambda bound: sharding.total((_ordered(scores) >= bound[..., None]).sum(-1), "vocab")
  by_k = jnp.where(k > 0, _last(lambda bound: count(bound) >= k, k), _LOWEST)
  share = knobs.top_p * mass(by_k, by_k)
  by_p = _last(lambda bound: mass(bound, by_k) >= share, k)
  least = jnp.where(knobs.top_p < 1, jnp.maximum(by_k, by_p), by_k)
  kept = jnp.where(_ordered(scores) >= least[..., None], scores, jnp.inf)
  return -sharding.highest(-kept.min(-1), "vocab")


def _ordered(x: jax.Array) -> jax.Array:
  """int32 in the order of float32."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # 0.0 and -0.0 are one
  return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _last(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
  """The largest int32 [B, S], as `like`, for which `holds` does, where it holds for all below.

  Found digit by digit, to the base 16: what is read of the logits is read eight times, not 32.
  """

  def find_digit(i, bound):
    unit = jnp.left_shift(1, 28 - 4 * i)
    digit = sum(holds(bound + d * unit).astype(jnp.int32) for d in range(1, 16))
    return bound + digit * unit

  return jax.lax.fori_loop(0, 8, find_digit, jnp.full(like.shape, _LOWEST))


def _stream_keys(key: jax.Array, streams: int) -> jax.Array:
  """A key for each stream of one session, [streams]."""
  return jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(streams))


def _noise(stream_keys: jax.Array, ids: jax.Array) -> jax.Array:
  """Gumbel noise float32 [streams, len(ids)] of one session."""
  of_token = lambda key, id: jax.random.gumbel(jax.random.fold_in(key, id))
  return jax.vmap(lambda key: jax.vmap(lambda id: of_token(key, id))(ids))(stream_keys)
