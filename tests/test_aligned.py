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
from msjax.decoding.prepared import Unrolled
from msjax.streams import Stream, Streams

SPECS = ("system:input", "user:input", "assistant:output", "critic:output")
STREAMS = Streams(tuple(map(Stream.parse, SPECS)), SILENCE)
SYSTEM, USER = 0, 1
NO_END = VOCAB - 1


@pytest.fixture(scope="module", autouse=True)
def compiled_in_a_hurry():
  """Compiling takes most of the time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


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


def answered(opening, question, end_id, options, choose=likeliest):
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


def greedy(logits, _):
  return likeliest(logits)


def cases(lengths, question):
  """Openings of these lengths and questions, one after another."""
  for salt in range(40):
    draw = np.random.default_rng(salt).integers(0, NO_END, 100).tolist()
    take = lambda count: [draw.pop() for _ in range(count)]
    yield {name: take(count) for name, count in lengths.items()}, take(question)


def clear_case(lengths, question, end_id, options):
  """The first of `cases` where rounding does not decide, and what is answered."""
  for opening, asked in cases(lengths, question):
    with contextlib.suppress(RoundingDecidesError):
      return opening, asked, answered(opening, asked, end_id, options, greedy)
  raise AssertionError("rounding decides everywhere")


FEW = Options(max_new_tokens=14)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(
  ("system", "user", "assistant", "question"),
  [
    (5, 3, 3, 6),
    (5, 3, 4, 6),
    (5, 3, 9, 6),  # its prefix is as long as the question
    (0, 3, 14, 4),  # or longer
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
  opening, asked, open_end = clear_case(lengths, 5, NO_END, options)
  for name, at in (("assistant", 4), ("critic", 6), ("critic", 0)):
    end_id = open_end[name][at]
    try:
      expected = answered(opening, asked, end_id, options, greedy)
    except RoundingDecidesError:
      continue
    assert len(expected[name]) <= at + 1
    assert aligned.answer(model(), opening, asked, end_id, options) == expected
