"""The official release's decoding of tables, against a plain loop around transformers."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_cases import (
  FIGURES,
  SILENCE,
  VOCAB,
  RoundingDecidesError,
  dense_logits,
  likeliest,
  module,
)

from msjax.config import Config, ModelConfig
from msjax.decoding import official
from msjax.decoding.engine import Engine, fill
from msjax.decoding.official import Options
from msjax.decoding.policy import Policy, Silence
from msjax.decoding.prepared import Unrolled
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.streams import Stream, Streams
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.state import Learner

TEN = Streams(tuple(map(Stream.parse, official.STREAMS)), SILENCE)
SEEDS = dict(zip(TEN.names[2:], FIGURES["seed_row"][2:].tolist()))
TEXT = FIGURES["user_tokens"].tolist()
TABLE = FIGURES["input_ids"][0].reshape(-1, 10)
GREEDY = Options(seeds=SEEDS, temperature=0.0, max_rows=16, silence_penalty=0.0, early_exit=0)


@functools.cache
def engine(skip_silence=False):
  model = official.skipping_silence(Unrolled.of(module(TEN)), skip_silence)
  return Engine(model, 2, rows=32, rows_at_once=16)  # so few sizes that little is compiled


# The oracle.


def next_logits(rows, skip_silence):
  """[S, V] for the row after some [R, S]."""
  R, S = np.shape(rows)
  ids = np.ravel(rows)
  row, stream = np.divmod(np.arange(R * S), S)
  seen = row < row[:, None]
  if skip_silence:
    seen &= ids != SILENCE
  seen |= np.eye(R * S, dtype=bool)
  return dense_logits(ids, stream, row, seen)[-S:]


def ramp(quiet_rows):
  return min(1.0, quiet_rows / 5)


def scripted_share(row, start, end, during_user_talk, after_prefill):
  """Of the silence penalties in a row, where the user speaks from `start` to `end`."""
  if after_prefill:
    return 0.0
  if row >= end:
    return ramp(row - end + 1)
  return ramp(row - start + 1) if during_user_talk and row >= start else 0.0


def write(rows, options, share, skip_silence):
  """The next row by the likeliest tokens, the user's silent."""
  logits = next_logits(rows, skip_silence)
  logits[1, SILENCE] -= options.silence_penalty * share
  logits[2:, SILENCE] -= options.think_silence_penalty * share
  free = [s for s in range(1, len(TEN)) if TEN.names[s] not in options.ablated]
  row = np.full(len(TEN), SILENCE)
  row[free] = likeliest(logits[free])
  return row


def first_rows(options):
  given = options.prefill if options.warm_start is None else options.warm_start
  seeds = [options.seeds.get(name, SILENCE) for name in TEN.names]
  rows = [np.array(seeds)] if given is None else [row.copy() for row in given]
  for row in rows:
    row[[TEN.id(name) for name in options.ablated]] = SILENCE
  return rows, 0 if given is None else len(rows)


def scripted(text, options, skip_silence=False):
  """What the release writes while it reads a text."""
  rows, read = first_rows(options)
  start = read if options.warm_start is not None else max(options.pre_think, read)
  end = start + len(text)
  if start == 0 and text:
    rows[0][0] = text[0]
  silent = 0
  for index in range(len(rows), len(rows) + options.max_rows):
    share = scripted_share(index, start, end, options.during_user_talk, read > 0 and index == read)
    row = write(rows, options, share, skip_silence)
    if start <= index < end:
      row[0] = text[index - start]
    silent = silent + 1 if index >= end and (row == SILENCE).all() else 0
    if options.early_exit and silent >= options.early_exit:
      break
    rows.append(row)
  return np.array(rows)


def live(sent, options, skip_silence=False):
  """What the release writes while words are sent, {row: token}."""
  rows, read = first_rows(options)
  heard, streak = False, 0
  for index in range(read and read - 1, len(rows) + options.max_rows):
    if index >= len(rows):
      rows.append(write(rows, options, ramp(streak), skip_silence))
    if index in sent:
      rows[index][0] = sent[index]
    if index < read:
      continue
    if rows[index][0] != SILENCE:
      heard, streak = True, streak if options.during_user_talk else 0
    elif heard:
      streak += 1
  return np.array(rows)


def told(text, options, skip_silence=False):
  return list(official.generate(engine(skip_silence), text, options))


def tokens(rows):
  rows = list(rows)
  assert [row.index for row in rows] == list(range(len(rows)))
  return np.array([row.tokens for row in rows])


def conversed(sent, options, skip_silence=False):
  rows = official.converse(engine(skip_silence), options)
  found = [next(rows)]
  while True:
    try:
      found.append(rows.send(sent.get(found[-1].index)))
    except StopIteration:
      return found


def with_options(**options):
  return dataclasses.replace(GREEDY, **options)


# Rows.


def test_the_golden_rows():
  options = with_options(pre_think=2, max_rows=20)
  rows = told(TEXT, options)
  np.testing.assert_array_equal(tokens(rows), FIGURES["dec_seed_greedy_tokens"])
  assert [row.given for row in rows] == FIGURES["dec_seed_greedy_is_prefill"].tolist()
  np.testing.assert_array_equal(scripted(TEXT, options), FIGURES["dec_seed_greedy_tokens"])


def cases(words, options):
  """Words (a list, or by row) and options like these, again and again, with other tokens."""
  yield words, with_options(**options)
  for salt in range(1, 40):
    drawn = np.random.default_rng(salt).integers(SILENCE + 1, VOCAB, (20, 10)).astype(np.int32)
    others = {"seeds": {name: int(id) for name, id in zip(SEEDS, drawn[-1])}, **options}
    others |= {n: drawn[: len(options[n])] for n in ("prefill", "warm_start") if n in options}
    if isinstance(words, dict):
      changed = {
        r: old if old == SILENCE else int(id) for (r, old), id in zip(words.items(), drawn[-2])
      }
    else:
      changed = [old if old == SILENCE else int(id) for old, id in zip(words, drawn[-2])]
    yield changed, with_options(**others)


def clear_case(oracle, words, options, skip_silence):
  """The first of `cases` where rounding does not decide, and its rows."""
  for said, case in cases(words, options):
    with contextlib.suppress(RoundingDecidesError):
      return said, case, oracle(said, case, skip_silence)
  raise AssertionError("rounding decides everywhere")


HUSHED = {"silence_penalty": -2.0, "think_silence_penalty": -3.0}  # so that all fall silent
DUMB = {"silence_penalty": -20.0, "think_silence_penalty": -20.0}
DASHES = [*TEXT[:2], SILENCE, *TEXT[2:], SILENCE]  # " -" among the words
AT_ONCE = {"during_user_talk": True}
SCRIPTED = {
  "plain": (TEXT, {}),
  "speaks_at_once": (TEXT, {"pre_think": 0}),
  "thinks_first": (TEXT, {"pre_think": 6, **HUSHED}),
  "no_seeds": (TEXT, {"pre_think": 3, "seeds": {}}),
  "nothing_said": ([], {"silence_penalty": 0.7, "think_silence_penalty": 0.6}),
  "longer_than_rows": (TEXT, {"max_rows": 4}),
  "penalty": (TEXT, {"silence_penalty": 0.8, "pre_think": 3}),
  "penalty_of_thoughts": (TEXT, {"think_silence_penalty": 0.5}),
  "hushed": (TEXT, {**HUSHED, "pre_think": 2}),
  "while_talking": (TEXT, {**HUSHED, **AT_ONCE, "pre_think": 2}),
  "while_talking_at_once": (TEXT, {**HUSHED, **AT_ONCE, "pre_think": 0}),
  "dashes": (DASHES, {**HUSHED, "pre_think": 2}),
  "dashes_while_talking": (DASHES, {**HUSHED, **AT_ONCE}),
  "ablated": (TEXT, {"ablated": ("output", "void", "synthesis")}),
  "early_exit": (TEXT, {**DUMB, "early_exit": 1}),
  "early_exit_late": (TEXT, {**DUMB, "early_exit": 3}),
  "early_exit_of_ablated": (TEXT, {"ablated": TEN.names[1:], "pre_think": 5, "early_exit": 1}),
  "prefill": (TEXT, {"prefill": TABLE[:6]}),
  "prefill_then_thinks": (TEXT, {"prefill": TABLE[:4], "pre_think": 7, **HUSHED}),
  "prefill_of_one": (TEXT, {"prefill": TABLE[:1], **HUSHED}),
  "prefill_while_talking": (TEXT, {"prefill": TABLE[:5], **HUSHED, **AT_ONCE}),
  "prefill_nothing_said": ([], {"prefill": TABLE[:5], **DUMB}),
  "prefill_ablated": (TEXT, {"prefill": TABLE[:5], "ablated": ("skeptical",)}),
  "warm_start": (TEXT, {"warm_start": TABLE[:11], "prefill": TABLE[:3], "pre_think": 14}),
}


@pytest.mark.parametrize("skip_silence", [False, True])
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_text_is_answered_as_by_the_release(name, skip_silence):
  text, options, expected = clear_case(scripted, *SCRIPTED[name], skip_silence)
  rows = told(text, options, skip_silence)
  np.testing.assert_array_equal(tokens(rows), expected)
  given = options.prefill if options.warm_start is None else options.warm_start
  read = 0 if given is None else len(given)
  assert [row.given for row in rows] == [index < read for index in range(len(rows))]


SENT = {0: 40, 3: 7, 4: 9, 9: 11, 10: SILENCE, 14: 30}
LIVE = {
  "plain": (SENT, {}),
  "nothing_said": ({}, {**HUSHED}),
  "hushed": (SENT, HUSHED),
  "late": ({4: 8, 5: 9, 13: 10}, {**HUSHED, **DUMB, "early_exit": 1}),
  "while_talking": (SENT, {**HUSHED, **AT_ONCE}),
  "ablated": (SENT, {"ablated": ("output",), "think_silence_penalty": 0.5}),
  "prefill": ({8: 10, 9: 11, 14: 8}, {"prefill": TABLE[:6], **HUSHED}),
  "prefill_while_talking": ({8: 10, 14: 8}, {"prefill": TABLE[:6], **HUSHED, **AT_ONCE}),
  "prefill_of_one": ({1: 10, 4: 8}, {"prefill": TABLE[:1], **HUSHED}),
  "prefill_nothing_said": ({}, {"prefill": TABLE[:6], **DUMB}),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_conversation_goes_as_with_the_release(name):
  sent, options, expected = clear_case(live, *LIVE[name], False)
  rows = conversed(sent, options)
  np.testing.assert_array_equal(tokens(rows), expected)
  assert sum(row.given for row in rows) == len(() if options.prefill is None else options.prefill)


# What is drawn.


def test_what_is_drawn_is_what_the_release_may_draw():
  options = with_options(temperature=0.7, top_p=0.8, top_k=9, silence_penalty=1.0, max_rows=12)
  rows = tokens(told(TEXT, options))
  likeliest = 0
  for index in range(1, len(rows)):
    logits = next_logits(rows[:index], False)
    logits[1, SILENCE] -= scripted_share(index, 1, 1 + len(TEXT), False, False)
    for stream in range(1, 10):
      scores = logits[stream] / 0.7
      odds = np.where(scores >= np.sort(scores)[-9], np.exp(scores - scores.max()), 0)
      odds /= odds.sum()
      token = rows[index, stream]
      assert odds[token] > 0
      assert odds[odds > odds[token]].sum() <= 0.8 + 1e-5
      likeliest += scores.argmax() == token
  assert 0.2 < likeliest / (9 * 12) < 0.8
  np.testing.assert_array_equal(tokens(told(TEXT, options)), rows)
  other = list(official.generate(engine(), TEXT, options, seed=1))
  assert np.any(tokens(other)[:4] != rows[:4])


def test_looks_are_at_what_the_model_made_rows_of():
  options = with_options(silence_penalty=2.0, looks=2, max_rows=6)
  for rows in (told(TEXT[:3], options), conversed({1: 9}, options)):
    assert rows[0].look is None
    grid = tokens(rows)
    for index in range(1, len(rows)):
      logits = torch.tensor(next_logits(grid[:index], False))  # no penalty among them
      log_probs = torch.log_softmax(logits, -1)
      best = log_probs.topk(2)
      look = rows[index].look
      np.testing.assert_allclose(look.log_probs, best.values, atol=1e-4)
      np.testing.assert_array_equal(look.ids[:, 0], best.indices[:, 0])
      entropy = -(log_probs.exp() * log_probs).sum(-1)
      np.testing.assert_allclose(look.entropy, entropy, atol=1e-4)


def test_the_defaults_are_those_of_the_release():
  options = Options()
  assert (options.max_rows, options.pre_think, options.early_exit) == (200, 1, 1)
  assert (options.temperature, options.top_p, options.top_k) == (0.8, 0.95, 20)
  assert (options.silence_penalty, options.think_silence_penalty) == (10, 0)


# Streams, sessions.


def test_a_model_has_streams_of_its_own():
  specs = ("output:output", "tool:input", "caller:input", "think:internal")
  streams = Streams(tuple(map(Stream.parse, specs)), 3)
  tiny = ModelConfig(dim=32, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=64, dtype="float32")
  learner = Learner(Config(model=tiny), streams, 20)
  rng, shapes = np.random.default_rng(0), jax.eval_shape(learner.init, jax.random.key(0)).params
  draw = lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype)
  here = Engine(Unrolled.of(learner.model(jax.tree.map(draw, shapes))), rows=16)
  options = with_options(seeds={"think": 5}, user="caller", pre_think=2, max_rows=9)
  rows = tokens(official.generate(here, [7, 8, 9], options))
  grid = np.full((1, 10, 4), FREE, np.int32)
  grid[0, :, 1:3], grid[0, 0] = 3, [3, 3, 3, 5]
  grid[0, 2:5, 2] = [7, 8, 9]
  alike = Policy(silence=Silence(shares=(1.0,)))  # does nothing, but has the program of the other
  np.testing.assert_array_equal(rows, fill(here, grid, alike)[0])


def test_a_conversation_waits_while_others_answer():
  here = engine()
  expected = tokens(told(TEXT, GREEDY)), tokens(conversed(SENT, GREEDY))
  rows = official.converse(here, GREEDY)
  found = [next(rows), *(rows.send(SENT.get(index)) for index in range(3))]
  answer = official.generate(here, TEXT, GREEDY)
  some = [next(answer) for _ in range(5)]
  found += [rows.send(SENT.get(index)) for index in range(3, GREEDY.max_rows)]
  np.testing.assert_array_equal(tokens([*some, *answer]), expected[0])
  found_tokens = tokens(found)
  found_tokens[-1, 0] = SENT.get(GREEDY.max_rows, SILENCE)  # the last was told, but not answered
  np.testing.assert_array_equal(found_tokens, expected[1])
  rows.close()
  assert not here.sessions


def test_who_waits_for_one_who_waits_is_told_so():
  here = engine()
  talks = [official.converse(here, GREEDY) for _ in range(here.places + 1)]
  for rows in talks[:-1]:
    next(rows), next(rows)
  next(talks[-1])
  with pytest.raises(RunError, match=r"waits for a place.*paused"):
    next(talks[-1])
  assert len(here.sessions) == here.places
  for rows in talks:
    rows.close()


def test_two_answers_are_made_side_by_side():
  texts = TEXT, TEXT[:2]
  expected = [tokens(told(text, GREEDY)) for text in texts]
  rows = zip(*(official.generate(engine(), text, GREEDY) for text in texts))
  for found, expectation in zip(zip(*rows), expected):
    np.testing.assert_array_equal(tokens(found), expectation)


def test_who_asks_no_more_frees_the_place():
  for rows in (official.generate(engine(), TEXT, GREEDY), official.converse(engine(), GREEDY)):
    next(rows)
    next(rows)
    rows.close()
    assert not engine().sessions


# Text.


def test_text_becomes_cells_word_by_word():
  told_apart = []
  encode = lambda text: told_apart.append(text) or [len(text), 0]
  assert official.cells(encode, "wait,\n stop - now", "be  kind") == [
    3,
    0,
    5,
    0,
    6,
    0,
    5,
    0,
    2,
    0,
    4,
    0,
  ]
  assert told_apart == [" be", " kind", " wait,", " stop", " -", " now"]
  tokenizer = train_bpe(["to be - or not to be"], 300)
  ids = official.cells(tokenizer, "to  be - or")
  assert b"".join(map(tokenizer.text_bytes, ids)) == b" to be - or"
  assert tokenizer.silence_id not in ids


def test_seeds_are_the_first_tokens_of_the_streams_words():
  encode = lambda text: [len(text), 0]
  found = official.seeds(encode, TEN)
  assert list(found) == list(TEN.names[2:])
  assert found["analytical"] == len(" thinking") and found["synthesis"] == len(" integrating")
  few = Streams(TEN.streams[:4], SILENCE)
  assert list(official.seeds(encode, few)) == ["analytical", "skeptical"]
  assert official.seeds(encode, few, {"output": " so"}) == {"output": 3}


def test_texts_are_all_that_is_not_silence():
  tokenizer = train_bpe(["so it is - an é"], 300)
  streams = Streams(TEN.streams[:3], tokenizer.silence_id)
  grid = np.full((9, 3), tokenizer.silence_id)
  for stream, text in enumerate(("so it", "is é", "")):
    ids = tokenizer.encode(text)
    grid[1 : 1 + len(ids), stream] = ids
  rows = [official.Row(index, row, index < 2) for index, row in enumerate(grid)]
  expected = {"user": "so it", "output": "is é", "analytical": ""}
  assert official.texts(rows, streams, tokenizer) == expected


# What is refused.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pre_think": -1}, "^pre_think: -1; expected 0 or more"),
    ({"max_rows": 0}, "^max_rows: 0; expected 1 or more"),
    ({"early_exit": -2}, "^early_exit: -2; expected 0 or more"),
    ({"user": "output"}, "^user: stream 'output' is written by the model; expected an input"),
    ({"user": "usr"}, "^stream 'usr' is unknown: .*did you mean 'user'"),
    ({"ablated": ("void", "user")}, "^ablated: 'user' is an input stream"),
    ({"seeds": {"voids": 3}}, "^stream 'voids' is unknown"),
    ({"seeds": {"void": VOCAB}}, "script .* expected integers"),
    ({"prefill": TABLE[:, :9]}, r"^prefill or warm_start: int32 of shape \(12, 9\); expected"),
    ({"prefill": TABLE + VOCAB}, "block .* expected integers"),
    ({"top_p": 0.0}, "top_p: 0.0; expected more than 0"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    official.generate(engine(), TEXT, with_options(**options))
  with pytest.raises(InputError, match=message):
    next(conversed({}, with_options(**options)))


@pytest.mark.parametrize("text", ["wait", [VOCAB], [-1], [[1]], [0.5]])
def test_text_that_is_no_tokens_is_refused(text):
  with pytest.raises(InputError, match=r"^text: .*; expected token ids from 0 to 511"):
    official.generate(engine(), text, GREEDY)


def test_words_are_refused_that_no_row_takes():
  with pytest.raises(InputError, match=r"^row 1 is given"):
    conversed({1: 9}, with_options(prefill=TABLE[:3]))
  with pytest.raises(InputError, match=r"^text: .*; expected token ids"):
    conversed({2: VOCAB}, GREEDY)
  assert not engine().sessions
