"""How a session's streams are written: how tokens are drawn, what counts against them, when a
stream is silent."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msjax.errors import InputError, nearest
from msjax.streams import Streams


@dataclasses.dataclass(frozen=True)
class Silence:
  """When a stream that the model writes says nothing.

  Rows in which no input stream speaks, after one has spoken, are quiet. Without input streams all
  rows are.

  Attributes:
    penalty: taken from the logit of silence in quiet rows.
    ramp: quiet rows until it is whole; it grows by as much with each.
    lead: whether the row that is written is one of them if no input waits for it, as the official
      release has it where the text is known beforehand; else only rows that have been fed count.
    while_read: whether the penalty grows while inputs speak, too: with `lead` from their first
      token on, and anew once they have ended; else it goes on where it was when they broke in.
    shortest: rows; who falls silent stays so as long.
    longest: rows; who was silent as long has to speak. 0: no limit.
    duty: the share of a session's rows in which a stream may speak at most.
    since: row of the session from which on inputs are heard; of several streams' the latest holds.
    shares: of the penalty, that count in the rows from `since` on, whatever inputs say, the last of
      them in all that follow. Empty: as the ramp has it.
    apart: whether it is drawn first if the stream says nothing, as likely as the model has it less
      the penalty; temperature, top_k, top_p and min_p are for its words alone then. As one draw,
      they cut off the few words that break a silence.
  """

  penalty: float = 0.0
  ramp: int = 1
  lead: bool = False
  while_read: bool = False
  shortest: int = 0
  longest: int = 0
  duty: float = 1.0
  since: int = 0
  shares: tuple[float, ...] = ()
  apart: bool = False


# Which tokens may come after those that a stream has had, silence among both: bool [V], or None for
# all. The same tokens get the same answer.
Grammar = Callable[[Sequence[int]], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Policy:
  """How one stream is written.

  What counts against tokens comes first, then the temperature, then what is cut off.

  Attributes:
    temperature: 0 takes the likeliest token.
    top_k: only so many likeliest are drawn, and those that are as likely as the last; 0: all.
    top_p: only the likeliest that make up this share, the one that completes it included.
    min_p: only those that are at least this share as likely as the likeliest.
    repetition_penalty: logits of tokens that the stream has had are divided by it if positive, else
      multiplied. Silence does not count.
    presence_penalty: what is taken from the logits of these.
    logit_bias: what is added to the logits of tokens, by id.
    silence: when the stream says nothing.
    ablated: whether it always says nothing.
    grammar: which tokens may be written; asked by the host before each row.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  silence: Silence = Silence()
  ablated: bool = False
  grammar: Grammar | None = None

  def check(self, where: str, vocab_size: int) -> None:
    """Refuses what is out of range; `where` names session and stream."""
    s = self.silence
    if not isinstance(s, Silence):
      raise InputError(f"{where}: silence: {s!r}; expected a Silence")
    self._check_kinds(where)
    for name, value, ok, expected in (
      ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
      ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
      ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
      ("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more, less than 1"),
      (
        "repetition_penalty",
        self.repetition_penalty,
        0 < self.repetition_penalty < math.inf,
        "more than 0",
      ),
      ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a number"),
      ("silence.penalty", s.penalty, math.isfinite(s.penalty), "a number"),
      ("silence.ramp", s.ramp, s.ramp >= 1, "1 row or more"),
      ("silence.shortest", s.shortest, s.shortest >= 0, "0 rows or more"),
      ("silence.longest", s.longest, s.longest >= 0, "0 (no limit) or more rows"),
      ("silence.duty", s.duty, 0 <= s.duty <= 1, "0 to 1"),
      ("silence.since", s.since, s.since >= 0, "row 0 or later"),
      ("silence.shares", s.shares, all(0 <= share <= 1 for share in s.shares), "0 to 1 each"),
    ):
      if not ok:
        raise InputError(f"{where}: {name}: {value}; expected {expected}")
    if s.longest and s.shortest > s.longest:
      raise InputError(
        f"{where}: silence.shortest: {s.shortest} rows; expected at most silence.longest "
        f"({s.longest})"
      )
    for token, bias in self.logit_bias.items():
      if not (0 <= token < vocab_size and bias < math.inf):
        raise InputError(
          f"{where}: logit_bias: {bias} for token {token}; expected numbers for tokens 0 to "
          f"{vocab_size - 1}"
        )

  def _check_kinds(self, where: str) -> None:
    """Refuses what is no number, or no whole one."""
    for prefix, owner in (("", self), ("silence.", self.silence)):
      for field in dataclasses.fields(owner):
        value, kind = getattr(owner, field.name), type(field.default)
        method = {int: "__index__", float: "__float__"}.get(kind)
        if method and not hasattr(value, method):
          what = "a whole number" if kind is int else "a number"
          raise InputError(f"{where}: {prefix}{field.name}: {value!r}; expected {what}")

  @property
  def remembers(self) -> bool:
    """Whether it asks which tokens the stream has had."""
    return self.repetition_penalty != 1 or self.presence_penalty != 0

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads; a grammar is not in it."""
    plain = dataclasses.replace(self, grammar=None, logit_bias=dict(self.logit_bias))
    return {k: v for k, v in dataclasses.asdict(plain).items() if k != "grammar"}

  def changed(self, words: str) -> "Policy":
    """Returns it with what `NAME=VALUE,...` says; `silence.NAME` for a field of `Silence`.

    Raises:
      InputError: a name that is none, or a value that cannot be read.
    """
    mine, silence = {}, {}
    for word in filter(None, words.split(",")):
      name, equals, value = word.partition("=")
      of, known, found = mine, _settable(Policy), name
      if name.startswith("silence."):
        of, known, found = silence, _settable(Silence), name.removeprefix("silence.")
      if found not in known or not equals:
        names = [*_settable(Policy), *(f"silence.{n}" for n in _settable(Silence))]
        raise InputError(
          f"policy {word!r}: expected NAME=VALUE, NAME one of {', '.join(names)}"
          f"{nearest(name, names)}"
        )
      of[found] = _read(word, type(known[found]), value)
    return dataclasses.replace(self, **mine, silence=dataclasses.replace(self.silence, **silence))

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Policy":
    """Reads what `to_json` made, after it has been through JSON."""
    bias = {int(id): value for id, value in data["logit_bias"].items()}
    silence = {**data["silence"], "shares": tuple(data["silence"]["shares"])}
    return cls(**{**data, "silence": Silence(**silence), "logit_bias": bias})


def _settable(cls: type) -> dict[str, Any]:
  """Fields that a word can set, with their defaults."""
  fields = ((f.name, f.default) for f in dataclasses.fields(cls))
  return {name: value for name, value in fields if type(value) in (bool, int, float)}


def _read(word: str, kind: type, value: str) -> bool | int | float:
  try:
    return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
  except (KeyError, ValueError):
    expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise InputError(f"policy {word!r}: expected {expected}") from None


def of_streams(
  policies: Mapping[str, Policy] | Policy, streams: Streams, other: Policy
) -> dict[str, Policy]:
  """Returns a policy by stream; where only some streams have theirs, `other` is that of the rest.

  Raises:
    InputError: a stream that is unknown, or something else than policies.
  """
  if isinstance(policies, Policy):
    return dict.fromkeys(streams.names, policies)
  if not isinstance(policies, Mapping):
    raise InputError(f"policies: {policies!r}; expected a Policy, or a dict of them by stream")
  for name, policy in policies.items():
    streams.id(name)
    if not isinstance(policy, Policy):
      raise InputError(f"policies: {policy!r} for stream {name!r}; expected a Policy")
  return {**dict.fromkeys(streams.names, other), **policies}


def by_stream(words: Sequence[str], names: Sequence[str], base: Policy = Policy()) -> dict:
  """Reads policies as commands take them.

  Args:
    words: each `NAME=VALUE,...` for all streams, or `STREAM:NAME=VALUE,...` for one; later ones
      change what earlier ones say.
    names: of the streams.
    base: what is changed.

  Returns:
    A policy by stream.
  """
  found = dict.fromkeys(names, base)
  for given in words:
    stream, colon, rest = given.partition(":")
    if colon and stream not in names:
      raise InputError(
        f"policy {given!r}: stream {stream!r} is unknown: there are {', '.join(names)}"
        f"{nearest(stream, names)}"
      )
    for name in [stream] if colon else names:
      found[name] = found[name].changed(rest if colon else given)
  return found


_LEAST_SHARES = 16  # so that short texts share a program

# What is drawn unless something else is asked for: a stream speaks as often as in its data, and
# says likely things, but not the same for ever. Whoever takes the likeliest token, silence among
# them, is mute where silence is likelier than any one word, and else repeats itself.
TALK = Policy(0.8, top_p=0.95, silence=Silence(apart=True))

# The official release's: its Section 7 model, text known beforehand and live.
OFFICIAL_SCRIPTED = Silence(penalty=10.0, ramp=5, lead=True)
OFFICIAL_LIVE = Silence(penalty=10.0, ramp=5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
  """The policies of all sessions and streams as arrays [B, S], for the devices.

  Attributes are those of `Policy` and `Silence`; `bias_ids`, `bias` and `shares` are [B, S, n],
  unused places have id or share -1; `allowed` is bool [B, S, V] by the grammars, or [B, S, 0] where
  there are none.
  """

  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any
  repetition_penalty: Any
  presence_penalty: Any
  bias_ids: Any
  bias: Any
  ablated: Any
  penalty: Any
  ramp: Any
  lead: Any
  while_read: Any
  shortest: Any
  longest: Any
  duty: Any
  since: Any
  shares: Any
  apart: Any
  allowed: Any

  @classmethod
  def of(cls, policies: Sequence[Sequence[Policy]]) -> "Knobs":
    """Lines up the policies [B][S]."""

    def array(get, dtype):
      return np.array([[get(policy) for policy in of_session] for of_session in policies], dtype)

    of = lambda name, dtype: array(lambda policy: getattr(policy, name), dtype)
    of_silence = lambda name, dtype: array(lambda policy: getattr(policy.silence, name), dtype)
    ids, bias = _biases(policies)
    return cls(
      temperature=of("temperature", np.float32),
      top_k=of("top_k", np.int32),
      top_p=of("top_p", np.float32),
      min_p=of("min_p", np.float32),
      repetition_penalty=of("repetition_penalty", np.float32),
      presence_penalty=of("presence_penalty", np.float32),
      bias_ids=ids,
      bias=bias,
      ablated=of("ablated", bool),
      penalty=of_silence("penalty", np.float32),
      ramp=of_silence("ramp", np.int32),
      lead=of_silence("lead", bool),
      while_read=of_silence("while_read", bool),
      shortest=of_silence("shortest", np.int32),
      longest=of_silence("longest", np.int32),
      duty=of_silence("duty", np.float32),
      since=of_silence("since", np.int32),
      shares=_shares(policies),
      apart=of_silence("apart", bool),
      allowed=np.ones((*ids.shape[:2], 0), bool),
    )


def _biases(policies: Sequence[Sequence[Policy]]) -> tuple[np.ndarray, np.ndarray]:
  """Token ids int32 [B, S, n] and what is added float32 [B, S, n]; n a power of two or 0."""
  n = _room(len(p.logit_bias) for of_session in policies for p in of_session)
  shape = len(policies), len(policies[0]), n
  ids, bias = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
  for b, of_session in enumerate(policies):
    for s, policy in enumerate(of_session):
      for i, (token, value) in enumerate(sorted(policy.logit_bias.items())):
        ids[b, s, i], bias[b, s, i] = token, value
  return ids, bias


def _shares(policies: Sequence[Sequence[Policy]]) -> np.ndarray:
  """Shares of silence penalties, float32 [B, S, n], the last repeated; n a power of two or 0."""
  n = _room(len(p.silence.shares) for of_session in policies for p in of_session)
  n = max(n, _LEAST_SHARES) if n else 0
  shares = np.full((len(policies), len(policies[0]), n), -1, np.float32)
  for b, of_session in enumerate(policies):
    for s, policy in enumerate(of_session):
      if given := policy.silence.shares:
        shares[b, s] = np.pad(given, (0, n - len(given)), mode="edge")
  return shares


def _room(lengths: Iterable[int]) -> int:
  """The next power of two from the greatest length on, so that a few programs serve all; or 0."""
  most = max(lengths, default=0)
  return 1 << (most - 1).bit_length() if most else 0
