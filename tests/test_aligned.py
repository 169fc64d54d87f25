"""The official release's decoding of the aligned layout, against a loop around transformers."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from golden_cases import SILENCE, VOCAB, RoundingDecidesError, dense_logits, likeliest, module

from msjax.decoding import aligned
from msjax.decoding.aligned import Options
from msjax.decoding.engine import Engine, fill
from msjax.decoding.prepared import Unrolled
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.streams import HOLE, Stream, Streams

SPECS = ("system:input", "user:input", "assistant:output", "critic:output")
STREAMS = Streams(tuple(map(Stream.parse, SPECS)), SILENCE)
SYSTEM, USER = 0, 1
NO_END = VOCAB - 1


@functools.cache
def model():
  return Unrolled.of(module(STREAMS))


# The oracle.


def visible(cells, same_step):
  """bool [L, L] of cells (token, stream, position, call), as the release has it."""
  seen = np.zeros((len(cells), len(cells)), bool)
  for q, (_, q_stream, q_y, q_call) in enumerate(cells):
    for k, (_, k_stream, k_y, k_call) in enumerate(cells):
      if q_call == 0:  # as in training
        seen[q, k] = k_call == 0 and (k_y < q_y or (k_stream == q_stream and k <= q))
      else:
        seen[q, k] = (k_y < q_y and k_call < q_call) or k == q
        seen[q, k] |= same_step and k_stream == USER and q_stream > USER and k_call == q_call
  return seen


def last_logits(cells, streams, same_step):
  """[V] for each of some streams, after its last cell."""
  tokens, stream, y, _ = np.transpose(cells)
  logits = dense_logits(tokens, stream, y, visible(cells, same_step))
  return logits[[np.flatnonzero(stream == s)[-1] for s in streams]]


def first_cells(opening):
  n = len(opening.get("system", ()))
  return [
    (token, s, (0 if s == SYSTEM else n) + i, 0)
    for s, name in enumerate(STREAMS.names)
    for i, token in enumerate(opening.get(name, ()))
  ]


def answered(opening, question, end_id, options, choose=lambda logits, _: likeliest(logits)):
  """What the release writes, by stream."""
  cells = first_cells(opening)
  heads = [STREAMS.id(name) for name in opening if name not in ("system", "user")]
  n = len(opening.get("system", ()))
  y = {s: n + len(opening.get(STREAMS.names[s], ())) for s in (USER, *heads)}
  said = {s: [] for s in heads}
  going = list(heads)
  for call in range(options.max_steps + 1):
    if call:
      pending = [(USER, question[call - 1])] if call <= len(question) else []
      for s, token in [*pending, *((s, said[s][-1]) for s in going)]:
        cells.append((token, s, y[s], call))
        y[s] += 1
    logits = last_logits(cells, going, options.same_step)
    for s, token in zip(list(going), choose(logits, [said[s] for s in going])):
      said[s].append(int(token))
      if token == end_id or len(said[s]) == options.max_new_tokens:
        going.remove(s)
    if not going:
      break
  return {STREAMS.names[s]: tokens for s, tokens in said.items()}


def cases(lengths, question):
  """Openings of these lengths and questions, one after another."""
  for salt in range(40):
    rng = np.random.default_rng(salt)
    opening = {n: rng.integers(0, NO_END, count).tolist() for n, count in lengths.items()}
    yield opening, rng.integers(0, NO_END, question).tolist()


def clear_case(lengths, question, end_id, options):
  """The first of `cases` where rounding does not decide, and what is answered."""
  for opening, asked in cases(lengths, question):
    with contextlib.suppress(RoundingDecidesError):
      return opening, asked, answered(opening, asked, end_id, options)
  raise AssertionError("rounding decides everywhere")


FEW = Options(max_new_tokens=14)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(
  ("system", "user", "assistant", "question"),
  [
    (5, 3, 3, 6),
    (5, 3, 4, 6),
    (5, 3, 8, 6),  # its prefix is as long as the question
    (0, 2, 14, 4),  # or longer
    (0, 3, 3, 5),
    (7, 0, 2, 20),  # more than it answers
    (4, 6, 2, 5),  # the user is ahead
    (3, 2, 4, 0),
  ],
)
def test_a_question_is_answered_as_by_the_release(system, user, assistant, question, same_step):
  lengths = {"system": system, "user": user, "assistant": assistant}
  options = dataclasses.replace(FEW, same_step=same_step)
  opening, asked, expected = clear_case(lengths, question, NO_END, options)
  assert aligned.answer(model(), opening, asked, NO_END, options) == expected


@pytest.mark.parametrize("same_step", [False, True])
def test_several_answer_each_to_its_own_end(same_step):
  lengths = {"system": 3, "user": 2, "assistant": 3, "critic": 7}
  options = dataclasses.replace(FEW, same_step=same_step)
  opening, asked, endless = clear_case(lengths, 5, NO_END, options)
  assert aligned.answer(model(), opening, asked, NO_END, options) == endless
  apart = 0
  for name, at in (("assistant", 4), ("critic", 6), ("critic", 0)):
    with contextlib.suppress(RoundingDecidesError):
      end_id = endless[name][at]
      expected = answered(opening, asked, end_id, options)
      assert aligned.answer(model(), opening, asked, end_id, options) == expected
      apart += len(expected["assistant"]) != len(expected["critic"])
  assert apart


@pytest.mark.parametrize("max_steps", [0, 1, 5])
def test_it_ends_after_so_many_steps(max_steps):
  options = Options(max_steps=max_steps)
  opening, asked, expected = clear_case({"user": 2, "assistant": 5}, 3, NO_END, options)
  assert len(expected["assistant"]) == 1 + max_steps
  opening["nobody"] = []  # has no stream, and needs none
  calls = list(aligned.generate(model(), opening, asked, NO_END, options, system="nobody"))
  assert calls == [{"assistant": token} for token in expected["assistant"]]


def test_a_long_opening_and_a_cache_that_grows(monkeypatch):
  monkeypatch.setattr(aligned, "_LEAST_ROOM", 32)
  monkeypatch.setattr(aligned, "_QUERIES", 12)  # does not divide the padded opening
  lengths = {"system": 23, "user": 2, "assistant": 6}  # 31: padded, it just fits
  options = Options(max_new_tokens=20)
  opening, asked, expected = clear_case(lengths, 9, NO_END, options)
  assert aligned.answer(model(), opening, asked, NO_END, options) == expected


def test_without_a_prefix_it_is_what_the_engine_writes():
  opening, asked, _ = clear_case({"system": 4, "user": 3, "assistant": 3}, 5, NO_END, FEW)
  grid = np.full((1, 4 + 3 + FEW.max_new_tokens, 4), HOLE, np.int32)
  grid[0, :4, SYSTEM], grid[0, 4:7, USER], grid[0, 4:7, 2] = opening.values()
  grid[0, 7:12, USER], grid[0, 7:, 2] = asked, FREE
  written = fill(Engine(model(), rows=32), grid)[0, 7:, 2].tolist()
  assert aligned.answer(model(), opening, asked, NO_END, FEW) == {"assistant": written}


# What is drawn.


def odds_of(logits, said, options):
  """[V], as the release draws: penalty, temperature, top_k, top_p, min_p."""
  scores = np.float64(logits)
  scores[np.unique(said).astype(int)] -= options.presence_penalty
  scores /= options.temperature
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  if options.top_k:
    scores[scores < np.sort(scores)[::-1][min(options.top_k, scores.size) - 1]] = -np.inf
  if options.top_p < 1:
    order = np.argsort(-scores, kind="stable")
    removed = np.cumsum(softmax(scores)[order]) > options.top_p
    removed[0] = False
    scores[order[removed]] = -np.inf
  unlikely = softmax(scores) < options.min_p
  if unlikely.all():
    unlikely = np.arange(scores.size) != scores.argmax()
  scores[unlikely] = -np.inf
  return softmax(scores)


SAMPLED = [
  {"temperature": 0.6},
  {"temperature": 1.3, "top_k": 4},
  {"temperature": 1.0, "top_k": 5, "presence_penalty": 1.5},
  {"temperature": 1.0, "top_p": 0.63},
  {"temperature": 0.8, "top_p": 0.0},
  {"temperature": 0.7, "top_k": 9, "top_p": 0.71, "min_p": 0.083, "presence_penalty": -0.4},
  {"temperature": 1.0, "min_p": 0.99},
  {"temperature": 1.0, "top_k": 100, "min_p": 0.021},
]
cut = jax.jit(aligned._cut)


@pytest.mark.parametrize("fields", SAMPLED)
def test_tokens_are_as_likely_as_in_the_release(fields):
  options = Options(**fields)
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(0, 2, (2, 40)), 1).astype(np.float32)  # with ties
  had = rng.random((2, 40)) < 0.2
  scores = np.asarray(cut(logits, had, aligned._Draws.of(options, 2)))
  for head in range(2):
    expected = odds_of(logits[head], np.flatnonzero(had[head]), options)
    np.testing.assert_allclose(jax.nn.softmax(scores[head]), expected, atol=1e-5)


def test_only_what_is_likely_enough_is_drawn_and_what_was_said_counts():
  options = Options(max_new_tokens=12, temperature=0.9, top_k=3, presence_penalty=30.0)
  opening, asked = next(cases({"system": 3, "user": 2, "assistant": 5, "critic": 2}, 4))
  found = aligned.answer(model(), opening, asked, NO_END, options)
  order, turn = [*found], dict.fromkeys(found, 0)
  likeliest_ones = []

  def replay(logits, said):
    tokens = []
    for name, of_head, so_far in zip(order, logits, said):
      token = found[name][turn[name]]
      turn[name] += 1
      odds = odds_of(of_head, so_far, options)
      assert odds[token] > 0
      likeliest_ones.append(odds.argmax() == token)
      tokens.append(token)
    return tokens

  assert answered(opening, asked, NO_END, options, replay) == found
  assert all(len(set(tokens)) == 12 for tokens in found.values())
  assert 0.2 < np.mean(likeliest_ones) < 0.9
  assert aligned.answer(model(), opening, asked, NO_END, options) == found
  assert aligned.answer(model(), opening, asked, NO_END, options, seed=1) != found


def test_every_call_and_assistant_draws_anew():
  options = Options(max_new_tokens=12, temperature=1e5)  # all are equally likely
  opening, asked = next(cases({"assistant": 5, "critic": 2}, 0))
  found = aligned.answer(model(), opening, asked, NO_END, options)
  assert all(len(set(tokens)) > 9 for tokens in found.values())
  assert not any(one == other for one, other in zip(*found.values()))


def test_greedy_minds_no_penalty():
  opening, asked, expected = clear_case({"user": 2, "assistant": 5}, 3, NO_END, FEW)
  options = dataclasses.replace(FEW, presence_penalty=9.0, top_k=2, top_p=0.1, min_p=0.9)
  assert aligned.answer(model(), opening, asked, NO_END, options) == expected


# Text; what is refused.


def test_chats_are_in_the_words_of_the_release():
  opening, question = aligned.chat(lambda text: [text], "Why?", "Be kind.", "Well,")
  assert opening == {
    "system": ["<|im_start|>system\nBe kind.<|im_end|>\n"],
    "user": ["<|im_start|>user\n"],
    "assistant": ["<|im_start|>assistant\nWell,"],
  }
  assert question == ["Why?", "<|im_end|>"]
  assert aligned.chat(lambda text: [text], "Why?")[0]["system"] == []


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_new_tokens": 0}, "^max_new_tokens: 0; expected 1 or more"),
    ({"max_steps": -1}, "^max_steps: -1; expected 0 or more"),
    ({"temperature": float("nan")}, "^temperature: nan; expected 0 or more"),
    ({"top_k": -1}, "^top_k: -1; expected 0"),
    ({"top_p": 1.5}, "^top_p: 1.5; expected 0 to 1"),
    ({"min_p": -0.5}, "^min_p: -0.5; expected 0 to 1"),
    ({"presence_penalty": float("inf")}, "^presence_penalty: inf; expected a number"),
  ],
)
def test_wrong_options_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    Options(**fields)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"opening": {"assistent": [1]}}, "^stream 'assistent' is unknown: .*'assistant'"),
    ({"opening": {"user": [1]}}, "^opening: no assistant; expected the tokens of a header"),
    ({"opening": {"assistant": []}}, "^opening: nothing for 'assistant'; expected"),
    (
      {"opening": {"assistant": [VOCAB]}},
      "^assistant: 512 is no token; expected ids from 0 to 511",
    ),
    ({"question": "why"}, "^the question: 'why' is no token"),
    ({"end_id": -1}, "^end_id: -1 is no token"),
    ({"user": "caller"}, "^stream 'caller' is unknown"),
    ({"model": None}, "^model: NoneType; expected Unrolled.of"),
  ],
)
def test_wrong_questions_are_refused(changes, message):
  given = {"model": model(), "opening": {"assistant": [1]}, "question": [2], "end_id": 3, **changes}
  with pytest.raises(InputError, match=message):
    aligned.generate(**given)


def test_broken_parameters_write_nothing():
  broken = dataclasses.replace(model(), unembed=model().unembed.at[7].set(np.nan))
  with pytest.raises(RunError, match=r"^call 0: logits are not finite"):
    aligned.answer(broken, {"assistant": [1, 2]}, [3], NO_END, FEW)
