"""Decodes as the official PyTorch release does its ten-stream tables, on an `Engine`.

Its options, their defaults and the rows they give; none of its ten streams is taken for granted.
Where it has bugs, the docstrings say what is done instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from msjax.decoding.engine import Engine
from msjax.decoding.look import Look
from msjax.decoding.policy import Policy, Silence
from msjax.decoding.prepared import Prepared
from msjax.decoding.session import ENDED, Session
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError
from msjax.streams import Streams
from msjax.text.tokenizer import Tokenizer

# The release's streams in the order of their ids, for `--streams` and `read_checkpoint`.
STREAMS = (
  *("user:input", "output:output", "analytical:internal", "skeptical:internal"),
  *("intuitive:internal", "between:internal", "curious:internal", "void:internal"),
  *("instinct:internal", "synthesis:internal"),
)
# What its thoughts begin with.
SEED_WORDS = {
  "analytical": " thinking",
  "skeptical": " checking",
  "intuitive": " feeling",
  "between": " relating",
  "curious": " asking",
  "void": " drifting",
  "instinct": " watching",
  "synthesis": " integrating",
}
_RAMP = 5  # rows until a silence penalty is whole
_NUMBER = 0  # of every session, so that draws depend on the seed alone


@dataclasses.dataclass(frozen=True)
class Options:
  """How the release decodes.

  Attributes:
    seeds: tokens of row 0 by stream (see `seeds`), others are silent; without prefill only.
    prefill: int [R, S], the first rows, read at once. No silence penalty counts in the row after.
    warm_start: as prefill, and in its place. The release has such headers of 10 and 11 rows; they
      are data that msjax does not have.
    pre_think: row in which the user begins to speak; the row after the prefill if that is later,
      and after a warm start in any case. (The release drops what the user says in rows it is
      given.)
    max_rows: after those that are given; a longer text is cut off. (The release makes one more
      after a prefill.)
    temperature: 0 or less takes the likeliest token.
    top_p: only the likeliest that make up this share.
    top_k: only so many likeliest, and those as likely as the last; 0: all.
    silence_penalty: for output streams, once the user is silent, growing over 5 rows.
    think_silence_penalty: the same for internal streams.
    during_user_talk: whether the penalties grow while the user speaks, too.
    ablated: streams that are silent in every row, those that are given included.
    early_exit: so many rows without a word end it, and the last of them is not told; 0: never. They
      count from the end of the user's text on. (In the release silence before it ends it, too.)
    looks: how many of the likeliest tokens are told with each row that the model wrote, with the
      entropy; 0: none. (The release's `record_logits` has penalties in it; these have not.)
    user: the input stream that the text goes into; other input streams are silent.
  """

  seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
  prefill: np.ndarray | None = None
  warm_start: np.ndarray | None = None
  pre_think: int = 1
  max_rows: int = 200
  temperature: float = 0.8
  top_p: float = 0.95
  top_k: int = 20
  silence_penalty: float = 10.0
  think_silence_penalty: float = 0.0
  during_user_talk: bool = False
  ablated: Sequence[str] = ()
  early_exit: int = 1
  looks: int = 0
  user: str = "user"

  def __post_init__(self):
    """Checks what no session does."""
    for name, least in (("pre_think", 0), ("max_rows", 1), ("early_exit", 0)):
      if not getattr(self, name) >= least:
        raise InputError(f"{name}: {getattr(self, name)}; expected {least} or more")


class Row(NamedTuple):
  """One row.

  Attributes:
    index: from 0.
    tokens: int32 [S], by stream id.
    given: whether it stems from the prefill or the warm start.
    look: at what the model made it of, if asked for; None for rows that it did not make.
  """

  index: int
  tokens: np.ndarray
  given: bool
  look: Look | None = None


_DEFAULT = Options()


def generate(
  engine: Engine, text: Sequence[int], options: Options = _DEFAULT, seed: int = 0
) -> Iterator[Row]:
  """Reads what the user says, one token a row, and lets the model write the other streams.

  Its session comes to the engine at once and ends with the iterator.

  Args:
    engine: of a model that sees as it was trained; see `skipping_silence`.
    text: token ids, as of `cells`.
    options: see there.
    seed: on which alone depends what is drawn.

  Returns:
    All rows: those that are given, then at most `max_rows` more, if the context has room for them.

  Raises:
    InputError: no such stream or token, an option out of range.
    RunError: while rows are made: the model's logits are not finite, or no place gets free.
  """
  plan = _Plan.of(engine.streams, options)
  start = len(plan.rows) if options.warm_start is not None else max(options.pre_think, plan.read)
  total = len(plan.rows) + options.max_rows
  script = np.stack([*plan.rows, *[plan.free] * options.max_rows])
  said = _said(engine, text)
  end = start + len(said)
  script[start:end, plan.user] = said[: max(total - start, 0)]
  session = engine.join(
    prompt=script[: plan.read],
    script=script[plan.read :],
    policies=_policies(engine.streams, options, _scripted(options, start, end, plan.read)),
    seed=seed,
    number=_NUMBER,
    stop=Stop(rows=total),
    looks=options.looks,
  )
  return _told(engine, session, options.early_exit, end, plan)


def converse(
  engine: Engine, options: Options = _DEFAULT, seed: int = 0
) -> Generator[Row, int | None, None]:
  """Lets the user speak while the model does: `send` gives the user's cell of the row just told.

  ```
  rows = converse(engine, options)
  row = next(rows)
  while ...:
    row = rows.send(token)  # or None for silence
  ```

  A row is fed when the next is asked for; `row.tokens` then has the user's token. Nothing can be
  said in rows of a prefill, and what the user says there does not count for silence penalties.
  `pre_think` and `early_exit` have no meaning here. (In the release the model writes the user's
  cell of the row after a prefill; here it is silent.)

  Args:
    engine: as for `generate`; while nobody asks for rows the session is paused.
    options: see there.
    seed: on which alone depends what is drawn.

  Raises:
    InputError: no such stream or token, an option out of range; of tokens when they are sent.
    RunError: while rows are made: the model's logits are not finite, or no place gets free.
  """
  plan = _Plan.of(engine.streams, options)
  silence = {"ramp": _RAMP, "since": plan.read, "while_read": options.during_user_talk}
  policies = _policies(engine.streams, options, silence)
  how = {"policies": policies, "seed": seed, "number": _NUMBER, "looks": options.looks}
  join = functools.partial(engine.join, **how)
  return _conversation(engine, plan, join, len(plan.rows) + options.max_rows)


def cells(
  tokenizer: Tokenizer | Callable[[str], Sequence[int]], text: str, system: str = ""
) -> list[int]:
  """Returns the tokens of the user's text as the release has them: those of " " + word for each.

  Args:
    tokenizer: one of msjax, which spells a dash that stands alone so that it is not silence, or a
      function from text to ids: with that of the release, such a dash is.
    text: what the user says.
    system: a prompt that stands before it.
  """
  encode = tokenizer.encode if isinstance(tokenizer, Tokenizer) else tokenizer
  words = f"{system}\n\n{text}".split()
  return [int(id) for word in words for id in encode(f" {word}")]


def seeds(
  tokenizer: Tokenizer | Callable[[str], Sequence[int]],
  streams: Streams,
  words: Mapping[str, str] = SEED_WORDS,
) -> dict[str, int]:
  """Returns the first token of each stream's word, for those streams of `words` that there are."""
  encode = tokenizer.encode if isinstance(tokenizer, Tokenizer) else tokenizer
  return {name: int(encode(word)[0]) for name, word in words.items() if name in streams.names}


def texts(rows: Iterable[Row], streams: Streams, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns all that each stream said in some rows, given ones included."""
  decoders = {name: tokenizer.stream_decoder() for name in streams.names}
  said = dict.fromkeys(streams.names, "")
  for row in rows:
    for name, id in zip(streams.names, row.tokens.tolist()):
      said[name] += decoders[name].push(id) if id != streams.silence_id else ""
  return {name: text + decoders[name].flush() for name, text in said.items()}


def skipping_silence(model: Prepared, skip: bool = True) -> Prepared:
  """Returns the same model where silence is seen by no other cell, or is; arrays are shared."""
  trunk = jax.tree.map(lambda p: p, model.trunk)
  trunk.streams = dataclasses.replace(trunk.streams, skip_silence=skip)
  return dataclasses.replace(model, trunk=trunk)


class _Plan(NamedTuple):
  """The rows that are given [R, S], how many of them are read at once, a row that the model is to
  write, and the user's stream."""

  rows: np.ndarray
  read: int
  free: np.ndarray
  user: int

  @classmethod
  def of(cls, streams: Streams, options: Options) -> "_Plan":
    """Checks streams and rows that are given."""
    user, inputs = streams.id(options.user), list(streams.of_kind("input"))
    if user not in inputs:
      raise InputError(
        f"user: stream {options.user!r} is written by the model; expected an input stream; name "
        f"the streams of a checkpoint when it is imported, as in --streams={','.join(STREAMS)}"
      )
    ablated = [streams.id(name) for name in options.ablated]
    heard = sorted(streams.names[s] for s in {*ablated} & {*inputs})
    if heard:
      raise InputError(
        f"ablated: {heard[0]!r} is an input stream, which no model writes; give it nothing instead"
      )
    given = options.prefill if options.warm_start is None else options.warm_start
    if given is None or not len(given):
      rows, read = _seed_row(streams, options.seeds), 0
    else:
      rows = _rows(streams, given)
      read = len(rows)
    rows[:, ablated] = streams.silence_id
    free = np.full(len(streams), FREE, np.int32)
    free[inputs] = streams.silence_id
    return cls(rows, read, free, user)


def _seed_row(streams, seeds):
  row = np.full((1, len(streams)), streams.silence_id, np.int32)
  for name, id in seeds.items():
    row[0, streams.id(name)] = id
  return row


def _rows(streams, given):
  """Rows that are given, as int32 [R, S] of our own; the engine checks their tokens."""
  rows = np.array(given)
  if rows.ndim != 2 or rows.shape[1] != len(streams) or not np.issubdtype(rows.dtype, np.integer):
    raise InputError(
      f"prefill or warm_start: {rows.dtype} of shape {rows.shape}; expected integers "
      f"[R, {len(streams)}], streams {', '.join(streams.names)}"
    )
  return rows.astype(np.int32)


def _scripted(options, start, end, read):
  """When silence is penalised where the user speaks in the rows from `start` to `end`."""
  ramp = lambda rows: [min(1.0, (row + 1) / _RAMP) for row in range(rows)]
  since = start if options.during_user_talk else end
  shares = [*ramp(end - since), *ramp(_RAMP)]
  if since == read:
    shares[0] = 0.0  # the row after a prefill
  return {"since": since, "shares": tuple(shares)}


def _policies(streams, options, silence):
  """How each stream is written."""
  penalties = {"output": options.silence_penalty, "internal": options.think_silence_penalty}
  return {
    stream.name: Policy(
      max(options.temperature, 0.0),
      options.top_k,
      options.top_p,
      silence=Silence(penalties.get(stream.kind, 0.0), **silence),
      ablated=stream.name in options.ablated,
    )
    for stream in streams.streams
  }


def _told(engine, session, early_exit, end, plan):
  """A session's rows as they are made, up to its end or so many silent ones from row `end` on."""
  index = silent = 0
  try:
    while _has(engine, session, index):
      row = session.rows[index]
      spoke = (row != session.streams.silence_id).any()
      silent = silent + 1 if index >= end and not spoke else 0
      if early_exit and silent >= early_exit:
        return
      yield _row(plan, session, index, row.copy())
      index += 1
  finally:
    if session.status != ENDED:
      session.end("told")
  session.check()


def _row(plan: "_Plan", session: Session | None, index: int, tokens: np.ndarray) -> Row:
  """A row as it is told."""
  made = session is not None and index >= len(plan.rows)
  return Row(index, tokens, index < plan.read, session.looks.get(index) if made else None)


def _has(engine: Engine, session: Session, index: int) -> bool:
  """Takes steps until a session has the row, or has ended without it."""
  while len(session.rows) <= index and session.status != ENDED:
    engine.step_towards(session)
  return len(session.rows) > index


def _conversation(engine, plan, join, total):
  """See `converse`; `total` rows."""
  session = None
  try:
    for index in range(total):
      given = index < len(plan.rows)
      fed = (plan.rows[index] if given else plan.free).copy()
      told = fed.copy() if given else np.where(fed == FREE, engine.proposed(session), fed)
      word = yield _row(plan, session, index, told)
      if word is not None:
        fed[plan.user] = told[plan.user] = _word(engine, plan, index, word)
      if index < len(plan.rows) - 1 or index == total - 1:
        continue
      if session is None:
        session = join(plan.rows[:-1], script=fed[None])
      else:
        session.follow(fed[None])
        session.resume()
      if not _has(engine, session, index) or session.status == ENDED:
        break
      session.pause()
  finally:
    if session is not None and session.status != ENDED:
      session.end("told")
  if session is not None:
    session.check()


def _word(engine, plan, index, word) -> int:
  """Checks what is sent."""
  if index < plan.read:
    raise InputError(f"row {index} is given; expected None to be sent in the first {plan.read}")
  return int(_said(engine, [word])[0])


def _said(engine: Engine, text: Sequence[int]) -> np.ndarray:
  """Checks what the user says."""
  ids, V = np.asarray(text), engine.model.vocab_size
  is_tokens = ids.ndim == 1 and (not ids.size or np.issubdtype(ids.dtype, np.integer))
  if not is_tokens or (ids.size and not (ids.min() >= 0 and ids.max() < V)):
    raise InputError(f"text: {text!r:.60}; expected token ids from 0 to {V - 1}, as of `cells`")
  return ids.astype(np.int32)
