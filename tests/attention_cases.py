"""What tests of attention share: random grids, dense attention in float64, gradients."""

import dataclasses
import functools

import jax
import numpy as np
from hypothesis import strategies as st

from msjax.streams import HOLE, SAME_ROW, Stream, Streams, Visibility

NAMES = ("out", "d_q", "d_k", "d_v")
SILENCE, WORD = 0, 1
# Compiling takes most of the time here, and LLVM's optimisation most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Grid:
  """A grid of S streams, whose cells are drawn at random.

  Attributes:
    S: streams, about half of them inputs.
    same_row: as of `Streams`.
    skip_silence: as of `Streams`.
    segment: rows of a packed segment at least, twice as many at most; 0 for one segment.
    holes: share of cells that are holes.
    silent: share of rows that are silent as a whole, and of cells in the others.
    seed: of all that is drawn, kinds of streams as well.
  """

  S: int
  same_row: str = "hidden"
  skip_silence: bool = False
  segment: int = 0
  holes: float = 0.0
  silent: float = 0.0
  seed: int = 0

  @property
  def streams(self) -> Streams:
    kinds = np.random.default_rng(self.seed).permutation(["input", "output"] * self.S)[: self.S]
    streams = tuple(Stream(str(i), str(kind), 1.0) for i, kind in enumerate(kinds))
    return Streams(streams, SILENCE, self.same_row, self.skip_silence)

  def visibility(self, B: int, L: int) -> Visibility:
    """Who sees whom among the first L of 512 cells, in numpy; the last row may be cut."""
    rng, R = np.random.default_rng(self.seed), -(-512 // self.S)
    draw = lambda share, width: rng.random((B, R, width)) < share
    tokens = np.full((B, R, self.S), WORD, np.int32)
    tokens[draw(self.silent, 1) | draw(self.silent, self.S)] = SILENCE
    tokens[draw(self.holes, self.S)] = HOLE
    segments = np.zeros((B, R), np.int32)
    if self.segment:
      lengths = rng.integers(self.segment, 2 * self.segment + 1, (B, R))
      segments = np.stack([np.arange(R).repeat(n)[:R] for n in lengths])
    see = self.streams.visibility(tokens, segments)
    return Visibility(*(np.asarray(x)[:, :L] for x in see))


GRIDS = st.builds(
  Grid,
  S=st.sampled_from([1, 2, 3, 5, 7, 10, 13, 16]),
  same_row=st.sampled_from(SAME_ROW),
  skip_silence=st.booleans(),
  segment=st.sampled_from([0, 1, 4, 20]),
  holes=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
  silent=st.sampled_from([0.0, 0.3, 1.0]),
  seed=st.integers(0, 99),
)


def differentiated(attend):
  """Returns a function of q, k, v, who sees whom and a cotangent: the output and the gradients."""

  def both(q, k, v, visibility, d_out):
    out, pull = jax.vjp(lambda *x: attend(*x, visibility), q, k, v)
    return out, *pull(d_out)

  return both


def cells(B, L) -> Visibility:
  """Shapes and dtypes of who sees whom."""
  x = jax.ShapeDtypeStruct((B, L), np.int32)
  return Visibility(x, x, x, jax.ShapeDtypeStruct((B, L), bool))


def dense(q, k, v, visibility, d_out, kept=1.0):
  """Softmax attention and its gradients in float64, as a textbook has them.

  `kept` [B, N, L, M] are the factors by which dropout multiplies probabilities.
  """
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  group = q.shape[1] // k.shape[1]
  k, v = (np.repeat(x, group, axis=1) for x in (k, v))
  see = np.asarray(visibility.dense())[:, None]
  scale = 1 / np.sqrt(q.shape[-1])
  t = lambda x: x.swapaxes(-1, -2)
  scores = np.where(see, q @ t(k) * scale, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = (p * kept) @ v
  d_p = d_out @ t(v) * kept
  d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
  over_group = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)
  d_q = d_s @ k
  d_k = over_group(t(d_s) @ q)
  d_v = over_group(t(p * kept) @ d_out)
  return out, d_q, d_k, d_v
