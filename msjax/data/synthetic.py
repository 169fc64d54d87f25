"""Running arithmetic mod 10: a task where streams matter and every answer can be checked.

A question is a digit, operations and `=`, one token each: `7+3*7=`. The thought stream follows the
state after every token it has heard; the answer is the last state. The single-stream form of the
same task is a chat: the whole question, then the thoughts, then the answer.
"""

import zlib
from typing import NamedTuple

import numpy as np

from msjax.data.pipeline import SPLITS
from msjax.data.source import Example
from msjax.errors import InputError
from msjax.streams import Streams
from msjax.text.tokenizer import ByteTokenizer, Tokenizer

OPERATIONS = (*(f"+{k}" for k in range(1, 10)), "*3", "*7", "*9")
_LENGTH = 2**24  # questions are made by index; no epoch of them is ever finished
_HELD_OUT = 8  # one question in so many, by its hash


def tokenizer() -> ByteTokenizer:
  """Bytes, and one token for every operation."""
  return ByteTokenizer(added=OPERATIONS)


class Question(NamedTuple):
  """One question and its solution.

  Attributes:
    words: digit, operations, `=`; one token each.
    states: the running value after the digit and after each operation; the last is the answer.
  """

  words: tuple[str, ...]
  states: tuple[int, ...]

  @property
  def text(self) -> str:
    """What a user would type."""
    return "".join(self.words)


def solve(start: int, operations: tuple[str, ...]) -> Question:
  """Computes every state of a question."""
  states = [start]
  for op in operations:
    k = int(op[1:])
    states.append((states[-1] + k if op[0] == "+" else states[-1] * k) % 10)
  return Question((str(start), *operations, "="), tuple(states))


def question(split: str, seed: int, index: int, min_ops: int, max_ops: int) -> Question:
  """Returns the question at an index: the same whenever asked, never one of the other split."""
  rng = np.random.default_rng((seed, SPLITS.index(split), index))
  while True:
    picks = rng.integers(len(OPERATIONS), size=rng.integers(min_ops, max_ops + 1))
    found = solve(int(rng.integers(10)), tuple(OPERATIONS[i] for i in picks))
    if (zlib.crc32(found.text.encode()) % _HELD_OUT == 0) == (split == "valid"):
      return found


class Arithmetic:
  """Random access to laid-out questions: `source[i]` is an `Example`."""

  def __init__(
    self,
    split: str,
    streams: Streams,
    tokens: Tokenizer,
    ops: tuple[int, int],
    chat: bool,
    rows: int,
    seed: int,
  ):
    """Takes streams of kinds (input, internal, output), or one output stream for a chat;
    questions have `ops[0]` to `ops[1]` operations and examples at most `rows` rows."""
    needed = ("output",) if chat else ("input", "internal", "output")
    kinds = tuple(s.kind for s in streams.streams)
    if sorted(kinds) != sorted(needed):
      raise InputError(
        f"streams: arithmetic{' as a chat' if chat else ''} needs one stream of each kind "
        f"{', '.join(needed)}; found {', '.join(map(str, streams.streams))}"
      )
    longest = 2 * ops[1] + 4 if chat else ops[1] + 2 + streams.lag
    if rows < longest:
      raise InputError(
        f"config.data.rows: {rows}; arithmetic with {ops[1]} operations takes {longest}"
      )
    self.split, self.streams, self.tokens = split, streams, tokens
    self.ops, self.chat, self.rows, self.seed = ops, chat, rows, seed
    self.ids = {w: tokens.encode(w)[0] for w in (*OPERATIONS, *"0123456789=")}

  def __len__(self) -> int:
    """Returns how many indices there are."""
    return _LENGTH

  def __getitem__(self, index: int) -> Example:
    """Returns the example at an index."""
    return self.lay_out(question(self.split, self.seed, int(index), *self.ops))

  def length(self, index: int) -> int:
    """Returns the number of rows of an example."""
    return len(self[index].tokens) if self.chat else self.rows

  def record_id(self, index: int) -> str:
    """Names an example for messages."""
    return f"arithmetic/{self.split}:{index}"

  @property
  def fingerprint(self) -> str:
    """The config says it all."""
    return ""

  def lay_out(self, q: Question) -> Example:
    """Puts question, thoughts and answer into a grid, as early as the rule lets them be known.

    The rows after the answer are silence in every stream: who has answered waits.
    """
    heard = [self.ids[w] for w in q.words]
    thoughts = [self.ids[str(s)] for s in q.states]
    if self.chat:
      cells = [*heard, *thoughts, thoughts[-1]]
      weights = np.ones((len(cells), 1), np.float32)
      weights[: len(heard)] = 0
      return Example(np.array(cells, np.int32)[:, None], weights)
    lag = self.streams.lag
    tokens = np.full((self.rows, 3), self.tokens.silence_id, np.int32)
    user, think, output = (self.streams.of_kind(k)[0] for k in ("input", "internal", "output"))
    tokens[: len(heard), user] = heard
    tokens[lag : lag + len(thoughts), think] = thoughts
    tokens[len(heard) - 1 + lag, output] = thoughts[-1]
    return Example(tokens, np.ones(tokens.shape, np.float32))
