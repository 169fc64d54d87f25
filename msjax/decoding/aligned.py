"""Decodes the aligned layout where an assistant has a prefix: as the official release does.

A system stream comes first, positions 0 to n - 1; the user's stream and those of assistants run
side by side from position n on. An assistant with a prefix is ahead of the user, so that no grid of
rows tells who sees whom, and an `Engine` cannot hold it. Here cells stand in the order in which
they were fed: a cell sees those of a lesser position that were fed in an earlier call, and itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import sharding
from msjax.decoding.policy import Knobs, Policy
from msjax.decoding.prepared import Unrolled
from msjax.decoding.sampling import NOT_FINITE, Past, sample
from msjax.errors import InputError, RunError
from msjax.models import axes
from msjax.streams import Stream, Streams

_NEVER = np.iinfo(np.int32).max  # the call of a cell that has not been fed
_LEAST_CELLS = 16  # of a first call, padded, so that a few programs serve all lengths
_LEAST_ROOM = 256  # cells
_QUERIES = 128  # that look at all keys at once
_FIRST = 0  # the first call, within which cells see each other, too


@dataclasses.dataclass(frozen=True)
class Options:
  """How the release decodes this layout.

  Presence penalty, temperature, top_k, top_p and min_p follow each other in this order; without
  temperature none of them counts.

  Attributes:
    max_new_tokens: of each assistant, its end token included.
    max_steps: calls after the first.
    same_step: whether an assistant sees the user's token that is fed together with its own.
    temperature: 0 takes the likeliest token.
    top_k: only so many likeliest, and those as likely as the last; 0: all.
    top_p: only the likeliest that make up no more than this share, the first of them in any case.
    min_p: only tokens of at least this probability, of those that are left; the likeliest where
      none has it.
    presence_penalty: is taken once from the logits of all tokens that the assistant has said.
  """

  max_new_tokens: int = 512
  max_steps: int = 4096
  same_step: bool = False
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  presence_penalty: float = 0.0

  def __post_init__(self):
    """Checks every field."""
    for name, ok, expected in (
      ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
      ("max_steps", self.max_steps >= 0, "0 or more"),
      ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
      ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
      ("presence_penalty", np.isfinite(self.presence_penalty), "a number"),
    ):
      if not ok:
        raise InputError(f"{name}: {getattr(self, name)}; expected {expected}")


_DEFAULT = Options()


def generate(
  model: Unrolled,
  opening: Mapping[str, Sequence[int]],
  question: Sequence[int],
  end_id: int,
  options: Options = _DEFAULT,
  seed: int = 0,
  system: str = "system",
  user: str = "user",
) -> Iterator[dict[str, int]]:
  """Answers a question while it is read.

  The first call reads what stands at the beginning, and each assistant writes its first token.
  Every further one reads a token of the question and one of each assistant, at once.

  Args:
    model: prepared, on the mesh in use: `Unrolled.of(msjax.load(DIR).module)`.
    opening: what stands at the beginning, token ids by stream: the system's message with its
      headers, or none; the user's header; a header and a prefix for each assistant. Whoever has an
      opening besides system and user is an assistant.
    question: token ids, its end token among them; no part of the opening.
    end_id: the token that ends an assistant, which is not fed; others go on.
    options: see there.
    seed: of what is drawn.
    system: the stream that comes first; it need not exist where it has no opening.
    user: the stream that is fed the question.

  Returns:
    The new tokens by assistant, call by call, up to the last one's end.

  Raises:
    InputError: no such stream or token, no assistant, an assistant without a header, a model that
      is prepared otherwise.
    RunError: while tokens are made, for the model's logits are not finite.
  """
  openings = _checked(model, opening, question, end_id, system, user)
  return _Answer(model, openings, question, end_id, options, seed, system, user).calls()


def answer(*args: Any, **kwargs: Any) -> dict[str, list[int]]:
  """As `generate`, but returns all tokens by assistant, the end token included."""
  said: dict[str, list[int]] = {}
  for tokens in generate(*args, **kwargs):
    for name, id in tokens.items():
      said.setdefault(name, []).append(id)
  return said


def chat(
  encode: Callable[[str], Sequence[int]], question: str, system: str = "", prefix: str = ""
) -> tuple[dict[str, list[int]], list[int]]:
  """Returns opening and question in the release's words, for streams system, user and assistant.

  Args:
    encode: from text to ids, that takes <|im_start|> and <|im_end|> for the tokens they are, as
      tokenizers of transformers do; msjax's own spell them.
    question: what the user asks.
    system: what stands before it.
    prefix: what the assistant has begun with.
  """
  opening = {
    "system": f"<|im_start|>system\n{system}<|im_end|>\n" if system else "",
    "user": "<|im_start|>user\n",
    "assistant": f"<|im_start|>assistant\n{prefix}",
  }
  ids = {name: list(encode(text)) if text else [] for name, text in opening.items()}
  return ids, [*encode(question), *encode("<|im_end|>")]


def _checked(model, opening, question, end_id, system, user) -> dict[str, list[int]]:
  """The openings that are not empty, by stream."""
  if not isinstance(model, Unrolled):
    raise InputError(f"model: {type(model).__name__}; expected Unrolled.of(msjax.load(DIR).module)")
  streams, V = model.trunk.streams, model.vocab_size
  streams.id(user)
  given = [*opening.items(), ("the question", question), ("end_id", [end_id])]
  for name, ids in given:
    if name in opening and len(ids):
      streams.id(name)
    wrong = [ids] if isinstance(ids, str) else [id for id in ids if not 0 <= id < V]
    if wrong:
      raise InputError(f"{name}: {wrong[0]!r} is no token; expected ids from 0 to {V - 1}")
  heads = [name for name in opening if name not in (system, user)]
  empty = [name for name in heads if not len(opening[name])]
  if empty or not heads:
    raise InputError(
      f"opening: {f'nothing for {empty[0]!r}' if empty else 'no assistant'}; expected the tokens "
      "of a header for each stream that is to answer"
    )
  return {name: list(ids) for name, ids in opening.items() if len(ids)}


class _Fed(NamedTuple):
  """Cells of one call, int32 [C] each: token, stream, position, and the cell of this call that it
  sees in any case (by index among them)."""

  tokens: np.ndarray
  streams: np.ndarray
  positions: np.ndarray
  sees: np.ndarray

  @classmethod
  def of(cls, cells: Sequence[tuple[int, int, int]], room: int) -> "_Fed":
    """Cells (token, stream, position), each of which sees itself, padded."""
    padded = np.zeros((room, 3), np.int32)
    padded[: len(cells)] = cells
    return cls(*padded.T, np.arange(room, dtype=np.int32))


class _Answer:
  """One question on its way."""

  def __init__(self, model, openings, question, end_id, options, seed, system, user):
    """Takes what has been checked."""
    streams = model.trunk.streams
    self.model, self.options, self.end_id = model, options, end_id
    self.user, self.question = streams.id(user), [int(id) for id in question]
    self.heads = [name for name in openings if name not in (system, user)]
    self.ids = [streams.id(name) for name in self.heads]
    self.pending: list[int | None] = [None] * len(self.heads)  # written, but not fed
    self.counts = [0] * len(self.heads)
    first = len(openings.get(system, ()))
    names = [name for name in (system, user) if name in openings] + self.heads
    start = lambda name: 0 if name == system else first
    self.opening = [
      (id, streams.id(name), start(name) + i)
      for name in names
      for i, id in enumerate(openings[name])
    ]
    self.next = {
      s: first + len(openings.get(name, ()))
      for name, s in ((user, self.user), *zip(self.heads, self.ids))
    }
    self.cells = _room(model, _power(max(len(self.opening), _LEAST_ROOM)), len(self.heads))
    self.draws = _Draws.of(options, len(self.heads))
    self.key = jax.random.key(seed)
    self.fed = self.call = 0

  def calls(self) -> Iterator[dict[str, int]]:
    """See `generate`."""
    last = {s: i for i, (_, s, _) in enumerate(self.opening)}
    fed = _Fed.of(self.opening, _power(max(len(self.opening), _LEAST_CELLS)))
    yield self._feed(fed, len(self.opening), [last[s] for s in self.ids])
    while self._going and self.call <= self.options.max_steps:
      yield self._feed(*self._step())

  @property
  def _going(self) -> bool:
    return any(id is not None for id in self.pending)

  def _step(self) -> tuple[_Fed, int, list[int]]:
    """The user's next token and those of assistants that go on."""
    cells, ask = [], [0] * len(self.heads)
    if self.question:
      cells.append((self.question.pop(0), self.user, self._position(self.user)))
    reads = len(cells)
    for head, id in enumerate(self.pending):
      if id is not None:
        ask[head] = len(cells)
        cells.append((id, self.ids[head], self._position(self.ids[head])))
    fed = _Fed.of(cells, 1 + len(self.heads))
    if reads and self.options.same_step:
      fed.sees[1 : len(cells)] = 0
    return fed, len(cells), ask

  def _position(self, s: int) -> int:
    self.next[s] += 1
    return self.next[s] - 1

  def _feed(self, fed: _Fed, count: int, ask: list[int]) -> dict[str, int]:
    """Feeds cells; returns the tokens that assistants write, and takes them for pending."""
    while self.cells.capacity < self.fed + len(fed.tokens):
      self.cells = self.cells.grown()
    counters = np.array([self.fed, count, self.call], np.int32)
    writes = np.array([self.call == _FIRST or id is not None for id in self.pending])
    self.cells, drawn = _call(
      *(self.model, self.cells, fed, counters, np.array(ask, np.int32), writes),
      *(self.draws, self.key),
    )
    self.fed, self.call = self.fed + count, self.call + 1
    return self._take(np.asarray(drawn).tolist(), writes)

  def _take(self, drawn: list[int], writes: np.ndarray) -> dict[str, int]:
    """Notes what was drawn, and who ends."""
    told = {}
    for head in np.flatnonzero(writes).tolist():
      id, self.counts[head] = drawn[head], self.counts[head] + 1
      if id == NOT_FINITE:
        raise RunError(f"call {self.call - 1}: logits are not finite; are the parameters?")
      told[self.heads[head]] = id
      ends = id == self.end_id or self.counts[head] >= self.options.max_new_tokens
      self.pending[head] = None if ends else id
    return told


def _power(cells: int) -> int:
  """The next power of two."""
  return 1 << (cells - 1).bit_length()


# On the devices.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Cells:
  """What was fed, in this order.

  Attributes:
    k: rotated keys of each layer, [1, K, M, H].
    v: values, alike.
    positions: int32 [M].
    calls: int32 [M], in which each was fed.
    had: bool [heads, V], what each assistant has said, of the chip's tokens.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: jax.Array
  calls: jax.Array
  had: jax.Array

  @property
  def capacity(self) -> int:
    """M."""
    return len(self.calls)

  def grown(self) -> "_Cells":
    """The same with twice the room."""
    M = self.capacity
    more = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, M), (0, 0)])
    k, v = jax.tree.map(more, (self.k, self.v))
    calls = jnp.pad(self.calls, (0, M), constant_values=_NEVER)
    return _Cells(k, v, jnp.pad(self.positions, (0, M)), calls, self.had)


def _specs(cells: _Cells) -> _Cells:
  """How they are cut."""
  heads = tuple(sharding.spec(None, "heads") for _ in cells.k)
  return _Cells(heads, heads, sharding.spec(), sharding.spec(), sharding.spec(None, "vocab"))


def _room(model: Unrolled, M: int, heads: int) -> _Cells:
  """Nothing was fed."""
  cfg, dtype = model.trunk.cfg, model.trunk.dtype

  def empty():
    zeros = lambda: tuple(
      jnp.zeros((1, cfg.kv_heads, M, cfg.head_dim), dtype) for _ in range(cfg.layers)
    )
    calls = jnp.full(M, _NEVER, jnp.int32)
    had = jnp.zeros((heads, len(model.unembed)), bool)
    return _Cells(zeros(), zeros(), jnp.zeros(M, jnp.int32), calls, had)

  return sharding.made(empty, _specs(jax.eval_shape(empty)))()


class _Draws(NamedTuple):
  """Options as arrays, so that one program serves all."""

  knobs: Knobs
  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any
  presence_penalty: Any

  @classmethod
  def of(cls, options: Options, heads: int) -> "_Draws":
    """Cuts are made here, as the release's are others than those of policies."""
    hot = options.temperature > 0
    return cls(
      Knobs.of([[Policy(float(hot))] * heads]),
      np.float32(options.temperature if hot else 1.0),
      np.int32(options.top_k),
      np.float32(options.top_p),
      np.float32(options.min_p),
      np.float32(options.presence_penalty),
    )


@functools.partial(jax.jit, donate_argnames="cells")
def _call(
  model: Unrolled,
  cells: _Cells,
  fed: _Fed,
  counters: jax.Array,
  ask: jax.Array,
  writes: jax.Array,
  draws: _Draws,
  key: jax.Array,
) -> tuple[_Cells, jax.Array]:
  """Feeds C cells and draws what assistants write.

  Args:
    model: prepared, on the mesh in use.
    cells: donated; with room for C more.
    fed: C cells.
    counters: int32 [3]: cells fed before, how many of C count, the number of the call.
    ask: int32 [heads], the cell of these that tells what an assistant writes.
    writes: bool [heads], who does.
    draws: how.
    key: with the call's number, says what is drawn.

  Returns:
    The cells; int32 [heads], -1 where logits are not finite.
  """
  whole = jax.tree.map(lambda _: sharding.spec(), (fed, counters, ask, writes, draws, key))
  return sharding.on_chips(
    _called,
    in_specs=(axes.specs(model), _specs(cells), *whole),
    out_specs=(_specs(cells), sharding.spec()),
  )(model, cells, fed, counters, ask, writes, draws, key)


def _called(model, cells, fed, counters, ask, writes, draws, key):
  trunk, (at, count, call) = model.trunk, counters
  C = len(fed.tokens)
  put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (at,))
  calls = put(cells.calls, jnp.where(jnp.arange(C) < count, call, _NEVER))
  positions = put(cells.positions, fed.positions)
  earlier = (calls < call) | ((call == _FIRST) & (calls == _FIRST))
  seen = earlier & (positions < fed.positions[:, None])
  own = jnp.arange(cells.capacity) - at
  seen |= (own == jnp.arange(C)[:, None]) | (own == fed.sees[:, None])

  turn, k, v = trunk.turn(fed.positions[None]), [], []
  x = _embedded(trunk, fed)
  for block, k_old, v_old in zip(model.blocks, cells.k, cells.v):
    attend = functools.partial(_attend, k_old, v_old, (k, v), at, seen, turn)
    x = block(x, attend, sharding.CELLS_WHOLE)
  hidden = trunk.normed(x[:, ask])
  logits = model.logits(hidden, fed.tokens[ask][None])
  drawn = _drawn(logits, cells.had, draws, jax.random.fold_in(key, call))
  own = drawn - sharding.index("vocab") * cells.had.shape[1]
  said = (jnp.arange(cells.had.shape[1]) == own[:, None]) & writes[:, None]
  return _Cells(tuple(k), tuple(v), positions, calls, cells.had | said), drawn


def _embedded(trunk, fed):
  """Token plus stream embedding, [1, C, D]."""
  columns = trunk.embed[...].at[fed.tokens].get(mode="promise_in_bounds")
  x = sharding.gather(columns, "table_dim", 1) + trunk.stream_embed[...][fed.streams]
  return x.astype(trunk.dtype)[None]


def _attend(k_old, v_old, new, at, seen, turn, q, k, v, q_scale, k_scale):
  """Writes keys and values [1, C, K, H] behind those of earlier calls, then attends to them."""
  q, k = turn(q, q_scale), turn(k, k_scale)
  put = lambda old, x: jax.lax.dynamic_update_slice(
    old, jnp.swapaxes(x, 1, 2).astype(old.dtype), (0, 0, at, 0)
  )
  k, v = put(k_old, k), put(v_old, v)
  new[0].append(k)
  new[1].append(v)
  C, N, H = q.shape[1:]
  q = q.reshape(C, k.shape[1], -1, H)

  def look(queries):
    q, seen = queries
    scores = jnp.einsum("kgh,kmh->kgm", q, k[0], preferred_element_type=jnp.float32)
    odds = jax.nn.softmax(jnp.where(seen, scores / np.sqrt(H), -jnp.inf))
    return jnp.einsum("kgm,kmh->kgh", odds.astype(v.dtype), v[0])

  out = jax.lax.map(look, (q, seen), batch_size=min(C, _QUERIES))
  return out.reshape(1, C, N, H).astype(q.dtype)


def _drawn(logits, had, draws: _Draws, key):
  """One token for each assistant, int32 [heads], from logits [1, heads, V] of the chip's tokens."""
  heads = logits.shape[1]
  alike = Streams(tuple(Stream(f"{head}", "output", 1.0) for head in range(heads)), silence_id=0)
  hot = (draws.knobs.temperature > 0).any()
  scores = jax.lax.cond(hot, lambda: _cut(logits[0], had, draws)[None], lambda: logits)
  past, nobody_reads = Past.empty(1, alike, 0), jnp.zeros(1, bool)
  drawn = sample(scores, draws.knobs, past, nobody_reads, alike.silence_id, key[None])[0]
  top = logits[0].max(-1)
  top = jnp.where(jnp.isnan(top), jnp.inf, top)  # for the highest of chips may leave out a NaN
  return jnp.where(jnp.isfinite(sharding.highest(top, "vocab")), drawn, NOT_FINITE)


def _cut(logits, had, draws: _Draws):
  """Scores [heads, V] of the chip's tokens; -inf for those that are not drawn. See `Options`."""
  scores = sharding.gather((logits - draws.presence_penalty * had) / draws.temperature, "vocab", 1)
  order = jnp.argsort(-scores)
  best = jnp.take_along_axis(scores, order, 1)
  rank = jnp.arange(best.shape[1])
  least = best[:, jnp.clip(draws.top_k - 1, 0, len(rank) - 1)][:, None]
  best = jnp.where((best >= least) | (draws.top_k == 0), best, -jnp.inf)
  share = jnp.cumsum(jax.nn.softmax(best), 1)
  best = jnp.where((share <= draws.top_p) | (draws.top_p >= 1) | (rank == 0), best, -jnp.inf)
  best = jnp.where((jax.nn.softmax(best) >= draws.min_p) | (rank == 0), best, -jnp.inf)
  in_order_of_ids = jnp.take_along_axis(best, jnp.argsort(order), 1)
  return sharding.part(in_order_of_ids, "vocab", 1)
