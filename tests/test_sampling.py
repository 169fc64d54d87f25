"""Draws against the distribution they are drawn from; penalties and silence against plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msjax.decoding import sampling
from msjax.decoding.policy import Knobs, Policy, Silence
from msjax.decoding.sampling import Past, sample
from msjax.streams import HOLE, Stream, Streams

LOGITS = np.array([1.0, 0.0, -1.0, 2.0, -1e9], np.float32)
DRAWS = 4000
STREAMS = Streams(tuple(map(Stream.parse, ("user:input", "output:output"))), silence_id=0)
SILENCE = STREAMS.silence_id
jitted = jax.jit(sample, static_argnames="silence_id")
least_drawn = jax.jit(sampling._least)


def draw(logits, policy, keys=None, past=None, reading=None, silence_id=-1):
  """One token for each cell of logits [B, S, V], all by one policy, or by [B][S] of them."""
  B, S, V = logits.shape
  policies = policy if isinstance(policy, list) else [[policy] * S] * B
  keys = jax.random.split(jax.random.key(0), B) if keys is None else keys
  past = past or Past.empty(B, STREAMS, V)
  reading = np.zeros(B, bool) if reading is None else reading
  return np.asarray(jitted(logits, Knobs.of(policies), past, reading, silence_id, keys))


def draws(policy, seed=0):
  logits = np.broadcast_to(LOGITS, (DRAWS, 2, LOGITS.size))
  return draw(logits, policy, jax.random.split(jax.random.key(seed), DRAWS))


def chi_square(counts, expected):
  return float(((counts - expected) ** 2 / expected).sum())


def assert_drawn_by(tokens, p):
  counts = np.bincount(tokens, minlength=p.size)
  assert not counts[p == 0].any()
  assert chi_square(counts[p > 0], DRAWS * p[p > 0]) < 25  # few degrees of freedom


def softmax(logits):
  p = np.exp(np.float64(logits) - np.max(logits))
  return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_they_should(temperature):
  tokens = draws(Policy(temperature))
  for s in range(2):
    assert_drawn_by(tokens[:, s], softmax(LOGITS / temperature))


def test_streams_are_drawn_apart():
  first, second = draws(Policy(1.0)).T
  together = np.bincount(4 * first + second, minlength=16).reshape(4, 4)
  expected = together.sum(1, keepdims=True) * together.sum(0) / DRAWS
  assert chi_square(together, expected) < 35  # 9 degrees of freedom


def test_temperature_zero_takes_the_likeliest():
  logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
  logits[0, 0] = [1, 7, 7, 0, 7]  # the first of equals
  tokens = draw(logits, Policy())
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, logits.argmax(-1))
  np.testing.assert_array_equal(draw(logits, Policy(1e-4))[1:], tokens[1:])
  cut = Policy(top_k=2, top_p=0.1, min_p=0.5)  # say nothing of the likeliest
  np.testing.assert_array_equal(draw(logits, cut), tokens)


def test_a_session_depends_on_its_key_and_policy_alone():
  logits = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 4)
  some = Policy(1.0), Policy(), Policy(2.0, top_p=0.9), Policy(0.5, top_k=3)
  policies = [[one, other] for one, other in zip(some, some[1:] + some[:1])]
  tokens = draw(logits, policies, keys)
  order = np.array([2, 0, 3, 1])
  shuffled = draw(logits[order], [policies[b] for b in order], keys[order])
  np.testing.assert_array_equal(shuffled, tokens[order])
  alone = [draw(logits[[b]], [policies[b]], keys[b : b + 1])[0] for b in range(4)]
  np.testing.assert_array_equal(alone, tokens)


def test_keys_make_the_difference():
  np.testing.assert_array_equal(draws(Policy(1.0), seed=1), draws(Policy(1.0), seed=1))
  assert np.any(draws(Policy(1.0), seed=1) != draws(Policy(1.0), seed=2))


# What is cut off.


def kept(scores, policy):
  """Which tokens may be drawn, by sorting."""
  ok = np.ones(scores.size, bool)
  if policy.top_k:
    ok &= scores >= np.sort(scores)[::-1][: policy.top_k][-1]
  p = np.where(ok, softmax(scores), 0)
  p /= p.sum()
  if policy.top_p < 1:
    above = np.array([p[scores > score].sum() for score in scores])
    ok &= above < policy.top_p
  return ok & (p >= policy.min_p * p.max())


logits = st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
  logits=logits,
  top_k=st.integers(0, 14),
  top_p=st.sampled_from([0.07, 0.31, 0.77, 0.93, 1.0]),
  min_p=st.sampled_from([0.0, 0.013, 0.21, 0.9]),
  temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_what_is_cut_off_is_never_drawn_and_the_rest_may_be(
  logits, top_k, top_p, min_p, temperature
):
  V, policy = 12, Policy(temperature, top_k, top_p, min_p)
  padded = np.full(V, -1e9, np.float32)
  padded[: len(logits)] = logits
  ok = kept(padded / np.float32(temperature), policy)
  # A token that is likely by far more than noise can be is drawn unless it is cut off.
  lifted = np.tile(padded, (V, 2, 1)).astype(np.float32)
  tokens = draw(lifted, policy)
  assert ok[tokens].all()
  drawn = draw(np.tile(padded, (512, 2, 1)), policy, jax.random.split(jax.random.key(1), 512))
  odds = np.where(ok, softmax(padded / temperature), 0)
  expected = odds / odds.sum()
  assert set(np.unique(drawn)) <= set(np.flatnonzero(ok))
  assert set(np.flatnonzero(expected > 0.05)) <= set(np.unique(drawn))


@settings(deadline=None, max_examples=40)
@given(
  seed=st.integers(0, 2**16),
  spread=st.sampled_from([0.01, 1.0, 4.0]),
  steps=st.sampled_from([0, 2, 100]),
  top_k=st.sampled_from([0, 1, 7, 127, 128, 129, 300, 999]),
  top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
  min_p=st.sampled_from([0.0, 0.3]),
)
# Ties with the last that is drawn by top_k, beyond those that are looked at first.
@example(seed=0, spread=0.01, steps=100, top_k=127, top_p=0.1, min_p=0.0)
def test_what_is_cut_off_of_many_tokens(seed, spread, steps, top_k, top_p, min_p):
  """Also where more are drawn, or are equally good, than are looked at first."""
  rng, policy = np.random.default_rng(seed), Policy(1.0, top_k, top_p, min_p)
  scores = (spread * rng.normal(size=(1, 2, 400))).astype(np.float32)
  scores = np.round(scores * steps) / steps if steps else scores
  knobs = Knobs.of([[policy, Policy(1.0, top_k=3)]])
  least = np.asarray(least_drawn(scores.astype(np.float32), knobs))[0]
  for s, of_stream in enumerate((policy, Policy(1.0, top_k=3))):
    ok = kept(scores[0, s].astype(np.float64), of_stream)
    ours = scores[0, s].astype(np.float32) >= least[s]
    wrong = np.unique(scores[0, s][ok != ours])
    assert wrong.size <= (of_stream.top_p < 1)  # one that is drawn or not as sums are rounded
    for score in wrong:
      p = softmax(np.where(kept(scores[0, s], Policy(1.0, top_k)), scores[0, s], -np.inf))
      assert (
        abs(p[scores[0, s] > score].sum() - top_p) < 1e-5
        or abs(p.max() * min_p - p[scores[0, s] == score][0]) < 1e-6
      )


@pytest.mark.parametrize(
  ("policy", "odds"),
  [
    (Policy(1.0, top_k=2), [1, 0, 0, 1, 0]),
    (Policy(1.0, top_p=0.7), [1, 0, 0, 1, 0]),
    (Policy(1.0, top_p=0.6), [0, 0, 0, 1, 0]),
    (Policy(1.0, min_p=0.1), [1, 1, 0, 1, 0]),
    (Policy(1.0, top_k=3, top_p=0.9, min_p=0.2), [1, 0, 0, 1, 0]),
  ],
)
def test_what_is_left_comes_as_often_as_it_should(policy, odds):
  p = softmax(LOGITS) * np.array(odds)
  assert_drawn_by(draws(policy)[:, 1], p / p.sum())


# What counts against tokens.


@functools.cache
def with_row():
  return jax.jit(lambda past, tokens: past.with_row(tokens, STREAMS))


def past_of(rows, V):
  """After rows [R, S] of one session."""
  past = Past.empty(1, STREAMS, V)
  for row in rows:
    past = with_row()(past, np.array([row], np.int32))
  return past


def test_biases_are_added():
  policy = Policy(logit_bias={1: 2.5, 4: 2e9, 0: -5.0})
  assert (draws(policy) == 4).all()
  p = softmax(LOGITS + np.array([-5.0, 2.5, 0, 0, 0], np.float32))
  bias = {1: 2.5, 0: -5.0}
  assert_drawn_by(draws(Policy(1.0, logit_bias=bias))[:, 0], p)
  mixed = [[Policy(logit_bias={2: 9.0}), Policy()]]
  np.testing.assert_array_equal(draw(np.tile(LOGITS, (1, 2, 1)), mixed), [[2, 3]])


@pytest.mark.parametrize(("repetition", "presence"), [(1.7, 0.0), (1.0, 1.3), (1.4, -0.6)])
def test_what_was_said_counts_against_it_in_its_own_stream(repetition, presence):
  rows = [[SILENCE, 2], [3, 2], [HOLE, 1], [2, SILENCE]]
  past = past_of(rows, LOGITS.size)
  told = np.zeros((2, LOGITS.size), bool)
  told[0, [3, 2]] = told[1, [2, 1]] = True  # silence and holes do not count
  np.testing.assert_array_equal(past.had[0], told)
  expected = np.where(LOGITS > 0, LOGITS / repetition, LOGITS * repetition) - presence
  expected = np.where(told, expected, LOGITS)
  policy = Policy(1.0, repetition_penalty=repetition, presence_penalty=presence)
  many = jax.tree.map(lambda x: jnp.repeat(x, DRAWS, 0), past)
  tiled = np.broadcast_to(LOGITS, (DRAWS, 2, LOGITS.size))
  keys = jax.random.split(jax.random.key(0), DRAWS)
  tokens = draw(tiled, policy, keys, many)
  for s in range(2):
    assert_drawn_by(tokens[:, s], softmax(expected[s]))


# Silence.


def penalties(silence, users, foresees):
  """What is taken from the logit of silence in each row from the second on, as measured: the other
  token's logit at which it is as likely."""
  taken = []
  for r in range(1, len(users) + 1):
    past = past_of([[token, SILENCE] for token in users[:r]], 0)
    reading = np.array([foresees and r < len(users) and users[r] != SILENCE])
    low, high = -64.0, 64.0
    for _ in range(12):  # the answer is a multiple of 1/16 or near it
      middle = (low + high) / 2
      logits = np.array([[[0, -1e9], [0, middle]]], np.float32)
      spoke = draw(logits, Policy(silence=silence), past=past, reading=reading, silence_id=0)[0, 1]
      low, high = (low, middle) if spoke else (middle, high)
    taken.append(-high)
  return np.array(taken)


def official(users, penalty, ramp, live, during_talk):
  """The official release's rule, as a loop over rows."""
  spoke = [token != SILENCE for token in users]
  first = spoke.index(True) if any(spoke) else None
  taken, streak = [], 0
  for row in range(1, len(users) + 1):
    if live:  # row - 1 has just been read
      if first is not None and row - 1 >= first:
        if spoke[row - 1]:
          streak = streak if during_talk else 0
        else:
          streak += 1
      taken.append(penalty * min(1, streak / ramp))
    else:
      talks = row < len(users) and spoke[row]
      end = max((r for r in range(min(row, len(users))) if spoke[r]), default=None)
      if talks and during_talk:
        taken.append(
          penalty * min(1, (row - (row if first is None else min(first, row)) + 1) / ramp)
        )
      elif talks or end is None:
        taken.append(0.0)
      else:
        taken.append(penalty * min(1, (row - end) / ramp))
  return np.array(taken)


@pytest.mark.parametrize("during_talk", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
  "users", [[0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0], [0] * 4]
)
def test_the_official_rule_of_silence(users, live, during_talk):
  silence = Silence(penalty=10.0, ramp=5, lead=not live, while_read=during_talk)
  measured = penalties(silence, users, foresees=not live)
  expected = official(users, 10.0, 5, live, during_talk)
  np.testing.assert_allclose(measured, expected, atol=0.05)


def test_shares_of_a_penalty_go_by_row_whatever_inputs_say():
  silence = Silence(penalty=10.0, ramp=3, lead=True, since=2, shares=(0.5, 0.25, 1.0))
  measured = penalties(silence, [1, 0, 1, 1, 0, 0], foresees=True)
  np.testing.assert_allclose(measured, [0, 5, 2.5, 10, 10, 10], atol=0.05)
  others = [[Policy(silence=silence), Policy(silence=Silence(penalty=10.0))]]
  past = past_of([[1, SILENCE], [SILENCE, SILENCE], [SILENCE, SILENCE]], 0)
  for low, speaks in ((0.5, 1), (-0.5, 0)):  # 2.5 are taken of one, 10 of the other
    logits = np.array([[[0, low - 2.5], [0, low - 10]]], np.float32)
    tokens = draw(logits, others, past=past, silence_id=0)
    np.testing.assert_array_equal(tokens, [[speaks, speaks]])


def test_inputs_are_heard_from_a_row_on():
  past, counts = Past.empty(1, STREAMS, 0), []
  for token in (1, SILENCE, SILENCE, 1, SILENCE):
    past = past.with_row(np.array([[token, SILENCE]], np.int32), STREAMS, np.array([2]))
    counts.append([int(past.listened[0]), int(past.quiet[0]), int(past.quiet_in_all[0])])
  assert counts == [[-1, -1, -1]] * 3 + [[1, 0, 0], [2, 1, 1]]


def test_streams_fall_silent_for_some_rows_and_not_for_ever():
  """Against a loop, row by row, of a stream that would speak at random."""
  rng = np.random.default_rng(0)
  silence = Silence(shortest=3, longest=6)
  past, spoken, run = Past.empty(1, STREAMS, 0), False, 0
  for _ in range(200):
    wants = rng.random() < 0.3
    logits = np.array([[[0, -1e9], [0, 1.0 if wants else -1.0]]], np.float32)
    token = draw(logits, Policy(silence=silence), past=past, silence_id=0)[0, 1]
    if spoken and 0 < run < 3:
      expected = False
    else:
      expected = wants or run >= 6
    assert (token == 1) == expected
    spoken, run = spoken or expected, 0 if expected else run + 1
    past = with_row()(past, np.array([[SILENCE, token]], np.int32))


@pytest.mark.parametrize("duty", [0.0, 0.25, 0.5])
def test_no_stream_speaks_more_than_its_share(duty):
  past, said = Past.empty(1, STREAMS, 0), 0
  for row in range(1, 41):
    token = draw(
      np.array([[[0, -1e9], [0, 5.0]]], np.float32),
      Policy(silence=Silence(duty=duty)),
      past=past,
      silence_id=0,
    )[0, 1]
    said += token == 1
    assert said <= duty * row
    past = with_row()(past, np.array([[SILENCE, token]], np.int32))
  assert said == int(duty * 40)


def test_an_ablated_stream_says_nothing():
  tiled = np.broadcast_to(LOGITS, (3, 2, LOGITS.size))
  policies = [[Policy(ablated=True), Policy()]] * 3
  tokens = draw(tiled, policies, silence_id=2)
  np.testing.assert_array_equal(tokens, [[2, 3]] * 3)


def test_a_past_begins_where_inputs_do_not_exist():
  alone = dataclasses.replace(STREAMS, streams=STREAMS.streams[1:])
  past = Past.empty(2, alone, 0)
  assert np.asarray(past.listened).tolist() == [0, 0]
  past = past.with_row(np.array([[SILENCE], [3]], np.int32), alone)
  assert np.asarray(past.quiet).tolist() == [1, 1]


# Whether to speak, apart from what is said.


def test_who_draws_it_apart_speaks_as_often_as_the_model_has_it():
  """However cold the words are, and however much is cut off."""
  rows, silence = 4000, 2
  logits = np.log(np.array([0.02, 0.03, 0.9, 0.05]))
  cold = Policy(0.1, top_k=1, silence=Silence(apart=True))
  drawn = many(logits, cold, silence, rows)
  assert abs(np.mean(drawn != silence) - 0.1) < 4 * (0.09 / rows) ** 0.5
  assert set(drawn[drawn != silence]) == {3}
  warm = many(logits, Policy(1.0, silence=Silence(apart=True)), silence, rows)
  counts = np.bincount(warm, minlength=4) / rows
  np.testing.assert_allclose(counts, [0.02, 0.03, 0.9, 0.05], atol=0.02)
  # As one draw, the silence is never broken.
  assert set(many(logits, Policy(0.1), silence, rows)) == {silence}
  penalised = Policy(0.1, silence=Silence(penalty=np.log(9), lead=True, apart=True))
  assert abs(np.mean(many(logits, penalised, silence, rows) == silence) - 0.5) < 0.04


def test_greedy_words_may_be_drawn_apart_from_silence_too():
  logits = np.log(np.array([0.1, 0.2, 0.6, 0.1]))
  drawn = many(logits, Policy(silence=Silence(apart=True)), 2, 2000)
  assert set(drawn) == {1, 2} and abs(np.mean(drawn == 2) - 0.6) < 0.05


def many(logits, policy, silence, rows):
  """Draws so many times from the same logits; one stream, no inputs."""
  streams = Streams((Stream.parse("out:output"),), silence)
  knobs = Knobs.of([[policy]])
  past = Past.empty(1, streams, 0)

  def draw(key):
    reading = jnp.zeros(1, bool)
    return sample(
      jnp.array(logits, jnp.float32)[None, None], knobs, past, reading, silence, key[None]
    )

  return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), rows)))[:, 0, 0]
