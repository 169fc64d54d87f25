"""What a multi-stream grid means: cells, order, positions, who sees whom, what predicts what.

Everything else asks this file: the attention kernels and the cache for `Visibility`, the loss for
`labels`, the data code for names and kinds. A grid is `tokens` int32 [B, R, S]; -1 is a hole.

Within a row, attention puts the input streams first, then the others, each by stream id. In that
order every variant of the rule is one interval of keys plus the cell itself, so nothing that
computes attention has to know which variant it computes.
"""

import dataclasses
import json
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.errors import InputError, nearest

HOLE = -1
KINDS = ("input", "output", "internal")
SAME_ROW = ("hidden", "inputs", "ordered", "visible")
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stream:
  """One role's token sequence.

  Attributes:
    name: what people and files call it.
    kind: `input` (fed from outside, never sampled), `output` (shown) or `internal` (thought).
    weight: loss weight of its cells; by default 0 for inputs and 1 for the others.
  """

  name: str
  kind: str
  weight: float

  def __post_init__(self):
    """Checks every field."""
    if not (isinstance(self.name, str) and self.name):
      raise InputError(f"stream {self.name!r}: expected a name")
    if self.kind not in KINDS:
      raise InputError(
        f"stream {self.name!r}: kind {self.kind!r} is none of {', '.join(KINDS)}"
        f"{nearest(str(self.kind), KINDS)}"
      )
    if not (isinstance(self.weight, int | float) and 0 <= self.weight < float("inf")):
      raise InputError(
        f"stream {self.name!r}: weight {self.weight!r}; expected a number, finite and not negative"
      )

  @classmethod
  def parse(cls, spec: str) -> "Stream":
    """Reads `name:kind` or `name:kind:weight`, as in `user:input`; a name may hold colons."""
    name, _, kind = spec.rpartition(":")
    weight = None
    if kind not in KINDS and name.rpartition(":")[2] in KINDS:
      weight = kind
      name, _, kind = name.rpartition(":")
    if not name:
      raise InputError(f"stream {spec!r}: expected name:kind or name:kind:weight, as in user:input")
    try:
      weight = float(kind != "input") if weight is None else float(weight)
    except ValueError:
      raise InputError(f"stream {spec!r}: weight {weight!r} is no number") from None
    return cls(name, kind, weight)

  def __str__(self) -> str:
    """Returns the `name:kind:weight` that `parse` reads."""
    return f"{self.name}:{self.kind}:{self.weight}"


class Visibility(NamedTuple):
  """Who sees whom, as one interval of keys a query; all in attention order.

  Query q sees key k iff `k == itself[q]`, or `start[q] <= k < end[q]` and `key_ok[k]`.

  Attributes:
    start: int32 [B, L], first key of the interval.
    end: int32 [B, L], one past its last key.
    itself: int32 [B, L], the query's own key, always visible.
    key_ok: bool [B, M], keys that may be seen by others (no hole, not hidden as silent).
  """

  start: jax.Array
  end: jax.Array
  itself: jax.Array
  key_ok: jax.Array

  def dense(self) -> jax.Array:
    """Returns the rule as a bool [B, L, M] mask (True: visible); for tests and oracles only."""
    k = jnp.arange(self.key_ok.shape[1])
    inside = (k >= self.start[..., None]) & (k < self.end[..., None]) & self.key_ok[:, None]
    return inside | (k == self.itself[..., None])


@dataclasses.dataclass(frozen=True)
class Streams:
  """The streams of a model and the rule they follow: static, hashable, stored with the checkpoint.

  Attributes:
    streams: in the order of their ids, which is their order in [B, R, S].
    silence_id: the token that means "nothing said in this row".
    same_row: what a cell sees of its own row: `hidden` nothing (the paper), `inputs` the input
      streams, `ordered` the cells before it in attention order, `visible` everything.
    skip_silence: hide silent cells from every query but themselves.
  """

  streams: tuple[Stream, ...]
  silence_id: int
  same_row: str = "hidden"
  skip_silence: bool = False

  def __post_init__(self):
    """Checks names and variant."""
    if not self.streams:
      raise InputError("streams: expected at least one, as in user:input,output:output")
    names = self.names
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
      raise InputError(f"streams: {doubled[0]!r} stands twice; names must differ")
    if not isinstance(self.silence_id, numbers.Integral):
      raise InputError(f"streams: silence_id {self.silence_id!r}; expected the id of a token")
    if self.same_row not in SAME_ROW:
      raise InputError(
        f"same_row: {self.same_row!r} is none of {', '.join(SAME_ROW)}"
        f"{nearest(self.same_row, SAME_ROW)}"
      )

  # Names and kinds.

  @property
  def names(self) -> tuple[str, ...]:
    """Names by id."""
    return tuple(s.name for s in self.streams)

  def __len__(self) -> int:
    """Returns S."""
    return len(self.streams)

  def id(self, name: str) -> int:
    """Returns the id of a stream, or says which names there are."""
    if name not in self.names:
      raise InputError(
        f"stream {name!r} is unknown: there are {', '.join(self.names)}{nearest(name, self.names)}"
      )
    return self.names.index(name)

  def of_kind(self, *kinds: str) -> tuple[int, ...]:
    """Returns the ids of the streams of these kinds."""
    return tuple(i for i, s in enumerate(self.streams) if s.kind in kinds)

  @property
  def weights(self) -> np.ndarray:
    """Loss weight of each stream, float32 [S]."""
    return np.array([s.weight for s in self.streams], np.float32)

  @property
  def lag(self) -> int:
    """Rows from an input token to the first cell of a written stream that can answer it.

    A token of row r is seen in row r + 1 under `hidden`, and what is computed there is the cell of
    row r + 2. Under every other variant an input token is seen in its own row.
    """
    return 2 if self.same_row == "hidden" else 1

  def lag_between(self, source: int, target: int) -> int:
    """Rows from a token of stream `source` to the first cell of stream `target` that can answer it.

    One where the target sees the source in its own row, or is the source; two elsewhere.
    """
    place = self.order.index
    seen = source == target or place(source) < self.seen_of_own_row[place(target)]
    return 1 if seen else 2

  @property
  def seen_of_own_row(self) -> np.ndarray:
    """How many cells of its own row, from the first on, the cell in each place sees; int32 [S]."""
    S = len(self)
    return {
      "hidden": np.zeros(S, np.int32),
      "inputs": np.full(S, len(self.of_kind("input")), np.int32),
      "ordered": np.arange(S, dtype=np.int32),
      "visible": np.full(S, S, np.int32),
    }[self.same_row]

  # Order of cells.

  @property
  def order(self) -> tuple[int, ...]:
    """Stream ids in attention order: input streams first, then the others, each by id."""
    return self.of_kind("input") + self.of_kind("output", "internal")

  def to_attention(self, grid: jax.Array) -> jax.Array:
    """[B, R, S, ...] by stream id -> [B, L, ...] in attention order."""
    if self.order != tuple(range(len(self))):
      grid = grid[:, :, np.array(self.order)]
    return grid.reshape(grid.shape[0], -1, *grid.shape[3:])

  def from_attention(self, cells: jax.Array) -> jax.Array:
    """[B, L, ...] in attention order -> [B, R, S, ...] by stream id."""
    grid = cells.reshape(cells.shape[0], -1, len(self), *cells.shape[2:])
    if self.order != tuple(range(len(self))):
      grid = grid[:, :, np.argsort(self.order)]
    return grid

  # The rule.

  def positions(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """RoPE index of every cell: its row, counted from the first row of its segment.

    Args:
      tokens: int32 [B, R, S].
      segments: int32 [B, R], rows of one number belong together and lie together; None for one.

    Returns:
      int32 [B, R, S].
    """
    rows = jnp.arange(tokens.shape[1]) - _segment_start(tokens, segments)
    return jnp.broadcast_to(rows[..., None], tokens.shape).astype(jnp.int32)

  def check_positions(
    self, positions: np.ndarray, tokens: np.ndarray, segments: np.ndarray | None = None
  ) -> None:
    """Refuses positions of another shape, or that run backwards in a stream of a segment.

    Later rows see earlier ones, so a cell that stands after another must not be placed before it.
    Takes arrays at hand, not traced ones; arguments as for `positions`, [B, R, S].
    """
    if positions.shape != tokens.shape:
      raise InputError(
        f"positions: shape {positions.shape}; expected {tokens.shape}, as tokens has"
      )
    told, positions = np.asarray(tokens) != HOLE, np.asarray(positions, np.int64)
    start = np.asarray(_segment_start(tokens, segments), np.int64)[..., None]
    lifted = np.where(told, positions + (start << 32), -1)  # so that segments lie apart
    before = np.maximum.accumulate(lifted, axis=1)[:, :-1]
    wrong = np.argwhere(told[:, 1:] & (lifted[:, 1:] < before))
    if len(wrong):
      b, r, s = wrong[0].tolist()
      at = b, r + 1, s
      raise InputError(
        f"positions: shape {positions.shape}, {positions[at]} at {at}, less than before; expected "
        f"them not to run backwards in a stream of a segment"
      )

  def visibility(self, tokens: jax.Array, segments: jax.Array | None = None) -> Visibility:
    """Who sees whom in one pass over whole grids; arguments as for `positions`."""
    rows = jnp.arange(tokens.shape[1])[None]
    return self._visibility(tokens, rows, _segment_start(tokens, segments), self.key_ok(tokens))

  def visibility_in_cache(self, tokens: jax.Array, row: jax.Array, key_ok: jax.Array) -> Visibility:
    """Who sees whom when rows are fed against a cache that already holds their keys.

    Args:
      tokens: int32 [B, R, S], the rows that are fed.
      row: int32 [B], index of the first of them in each session, which is its place in the cache.
      key_ok: bool [B, M], of the whole cache, these rows included.
    """
    rows = row[:, None] + jnp.arange(tokens.shape[1])
    return self._visibility(tokens, rows, jnp.zeros_like(rows), key_ok)

  def key_ok(self, tokens: jax.Array) -> jax.Array:
    """Which cells other cells may see: bool [B, L] in attention order, from [B, R, S]."""
    ok = tokens != HOLE
    if self.skip_silence:
      ok &= tokens != self.silence_id
    return self.to_attention(ok)

  def _visibility(self, tokens, rows, start_rows, key_ok) -> Visibility:
    S = len(self)
    place = jnp.arange(S)  # in attention order
    shape = tokens.shape  # [B, R, S]
    flat = lambda x: jnp.broadcast_to(x, shape).reshape(shape[0], -1).astype(jnp.int32)
    return Visibility(
      start=flat(start_rows[..., None] * S),
      end=flat(rows[..., None] * S + self.seen_of_own_row),
      itself=flat(rows[..., None] * S + place),
      key_ok=key_ok,
    )

  # What is predicted.

  def labels(
    self,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    weights: jax.Array | None = None,
    silence_weight: float = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """What every cell predicts, and with which loss weight.

    Cell (r, s) predicts cell (r + 1, s) if neither is a hole and both are in one segment.

    Args:
      tokens: int32 [B, R, S].
      segments: int32 [B, R] or None.
      weights: float32 [B, R, S] of the data, standing at the cell that is predicted, or None.
      silence_weight: factor for cells whose label is the silence token.

    Returns:
      labels int32 [B, R, S], -1 where nothing is predicted; weights float32 [B, R, S], 0 there.
    """
    following = jnp.roll(tokens, -1, axis=1)
    has_label = (tokens != HOLE) & (following != HOLE)
    has_label &= (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)[:, None]
    if segments is not None:
      has_label &= (segments == jnp.roll(segments, -1, axis=1))[..., None]
    weight = jnp.broadcast_to(self.weights, tokens.shape)
    if weights is not None:
      weight = weight * jnp.roll(weights, -1, axis=1)
    weight = jnp.where(following == self.silence_id, weight * silence_weight, weight)
    return jnp.where(has_label, following, HOLE), jnp.where(has_label, weight, 0.0)

  # On disk.

  def to_json(self) -> dict[str, Any]:
    """Returns what `streams.json` holds."""
    return {
      "format_version": FORMAT_VERSION,
      "streams": [dataclasses.asdict(s) for s in self.streams],
      "silence_id": self.silence_id,
      "same_row": self.same_row,
      "skip_silence": self.skip_silence,
    }

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> "Streams":
    """Reads what `to_json` wrote."""
    if data.get("format_version") != FORMAT_VERSION:
      raise InputError(
        f"streams.json: format_version {json.dumps(data.get('format_version'))}, "
        f"this msjax reads {FORMAT_VERSION}"
      )
    try:
      return cls(
        tuple(Stream(**s) for s in data["streams"]),
        data["silence_id"],
        data["same_row"],
        data["skip_silence"],
      )
    except (KeyError, TypeError) as error:
      raise InputError(f"streams.json: {error}; expected what msjax wrote there") from None


def _segment_start(tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
  """First row of each row's segment, int32 [B, R] (or [1, R] without segments)."""
  rows = jnp.arange(tokens.shape[1])
  if segments is None:
    return jnp.zeros_like(rows)[None]
  first = segments != jnp.roll(segments, 1, axis=1)
  return jax.lax.cummax(jnp.where(first.at[:, 0].set(True), rows, 0), axis=1)
