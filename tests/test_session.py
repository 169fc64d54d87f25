"""What one session reads and is told, and what that does to others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
  AT_ONCE,
  HOT,
  PLACES,
  SILENCE,
  VOCAB,
  engine,
  model,
  prompt,
  run,
  small_key_blocks,  # noqa: F401
  unrolled,
)

from msjax.decoding import prepared
from msjax.decoding.engine import Engine, fill
from msjax.decoding.policy import Policy, Silence
from msjax.decoding.session import Slide
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError
from msjax.streams import HOLE
from msjax.text.tokenizer import ByteTokenizer

# Blocks.


def test_a_block_is_read_at_once_and_the_others_go_on():
  here, whole = engine(), engine()
  session, other = here.join(prompt(2), HOT, number=2), here.join(policies=HOT, number=5)
  for _ in range(8):
    here.step()
  session.say("user", [1, 2])
  before, ids = len(session.rows), list(range(10))
  session.read("user", ids)
  assert session.status == "reading"
  for n in range(3):
    assert [s for s, _ in here.step()] == ([other] if n < 2 else [session, other])
  rows = np.stack(session.rows)
  np.testing.assert_array_equal(rows[before:, 1], [1, 2, *ids])
  np.testing.assert_array_equal(rows[before:, [0, 2]], SILENCE)
  for _ in range(5):
    here.step()
  # What comes then is what comes where all of it is given row by row.
  again = whole.join(policies=HOT, number=2, script=rows, stop=Stop(rows=len(rows) + 5))
  run(whole)
  np.testing.assert_array_equal(again.rows, session.rows)


def test_the_end_of_a_block_ends_nothing():
  here = engine()
  stop = Stop(end_id=5, end_streams=("user", "think"), silent_rows=1)
  given = np.full((6, 3), SILENCE, np.int32)
  given[5, 2] = 5
  for options in ({}, {"rows": 4}):
    session = here.join(given, policies=Policy(logit_bias={9: 1e6}), stop=stop)
    for _ in range(4):
      here.step(**options)
    assert session.reason is None and len(session.rows) > 6
    session.end("enough")


def test_a_block_needs_room():
  here = engine(max_rows=10)
  session = here.join(prompt(1))
  here.step()
  with pytest.raises(InputError, match="session 0: block of 7 rows; expected at most 5"):
    session.read("user", [1] * 7)
  session.read("user", [1] * 5)
  run(here)
  assert (session.reason, len(session.rows)) == ("context is full", 10)


# Sliding.


def test_who_slides_goes_on_as_if_the_rest_had_never_been():
  here = engine(max_rows=16)
  session = here.join(prompt(2), Policy(0.0), slide=Slide(3, 6), stop=Stop(rows=40))
  other = here.join(stop=Stop(rows=12))
  run(here)
  assert len(session.rows) == 40 and len(other.rows) == 12
  rows = np.stack(session.rows)
  slid = [i for i, event in enumerate(session.events) if "slide" in event]
  assert len(slid) == 4
  # The row after the slide was proposed before it; those after that see what is left.
  kept = np.concatenate([rows[:3], rows[10:16], rows[16:17]])
  there = engine()
  fresh = there.join(script=kept, stop=Stop(rows=16))
  run(there)
  np.testing.assert_array_equal(np.stack(fresh.rows)[10:], rows[17:23])


@pytest.mark.parametrize("slide", [Slide(3, 0), Slide(-1, 3), Slide(8, 8)])
def test_a_slide_keeps_something_and_makes_room(slide):
  with pytest.raises(InputError, match=r"session 0: Slide\(.*; expected the last row at least"):
    engine(max_rows=16).join(slide=slide)


# Texts and grammars.


def test_a_text_ends_a_session_wherever_tokens_cut_it():
  here = Engine(unrolled(), 1, decoder=ByteTokenizer().stream_decoder)
  said = [[9, 0, 9], [HOLE, 0, 11], [11, 0, 12], [HOLE, 12, 9], [12, 12, 11]]
  stop = Stop(texts={"output": ("no", "\x0b\x0c")}, rows=8)
  session = here.join(script=np.array(said + [[1, 1, 1]] * 3, np.int32), stop=stop)
  run(here, rows=2)
  assert (session.reason, len(session.rows)) == ("text", 5)


def test_texts_need_a_decoder():
  with pytest.raises(InputError, match=r"session 0: stop.texts .*; expected an Engine with"):
    engine().join(stop=Stop(texts={"output": ("x",)}))


def test_a_grammar_is_asked_before_each_row():
  def even_then_odd(said):
    return (np.arange(VOCAB) % 2 == len(said) % 2) | (np.arange(VOCAB) == SILENCE)

  here = engine()
  bias = {SILENCE: -1e6}
  bound = here.join(policies={"think": Policy(1.0, grammar=even_then_odd, logit_bias=bias)})
  free = here.join(policies={"think": Policy(1.0, logit_bias=bias)})
  for _ in range(12):
    here.step(rows=4)
  said = np.stack(bound.rows)[1:, 2]
  np.testing.assert_array_equal(said % 2, np.arange(1, 12) % 2)
  assert len(set(said)) > 3
  assert any(np.stack(free.rows)[1:, 2] % 2 != np.arange(1, 12) % 2)


def test_a_grammar_that_forbids_to_speak_is_obeyed():
  only = np.arange(VOCAB) == SILENCE
  policy = Policy(grammar=lambda said: only, silence=Silence(longest=2))
  here = engine()
  session = here.join(policies={"think": policy})
  for _ in range(6):
    here.step()
  assert (np.stack(session.rows)[:, 2] == SILENCE).all()


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.zeros(VOCAB, bool), np.ones(VOCAB)])
def test_a_grammar_says_which_tokens(mask):
  here = engine()
  here.join(policies={"think": Policy(grammar=lambda said: mask)})
  with pytest.raises(InputError, match=r"stream 'think': its grammar gave .* bool \[20\]"):
    here.step()


# Looks.


def test_a_look_tells_what_the_model_thought_of_a_row():
  here = engine()
  session = here.join(prompt(1), HOT, looks=3, stop=Stop(rows=11))
  plain = here.join(prompt(1), HOT, number=0, stop=Stop(rows=11))
  run(here)
  np.testing.assert_array_equal(session.rows, plain.rows)
  assert not plain.looks and sorted(session.looks) == list(range(5, 12))
  rows = np.stack(session.rows)
  logits = jax.jit(lambda m, tokens: m.logits(m(tokens), tokens))(model(), rows[None])[0]
  log_probs = jax.nn.log_softmax(logits)
  for row, look in session.looks.items():
    there = log_probs[row - 1]
    np.testing.assert_allclose(look.entropy, -(np.exp(there) * there).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(look.ids, np.argsort(-there, axis=-1)[:, :3])
    np.testing.assert_allclose(look.log_probs, np.sort(there)[:, ::-1][:, :3], atol=1e-4)


def test_a_look_tells_where_attention_went():
  here = engine()
  session = here.join(prompt(1), looks=1, stop=Stop(rows=9))
  run(here)
  for row, look in session.looks.items():
    np.testing.assert_allclose(look.attention.sum(-1), 1.0, atol=1e-5)
    assert (look.attention > 0).all(), row


def test_other_numbers_of_places_give_the_same_logits():
  """To 1e-4; bits are promised among as many places alone."""

  def lived(places, policy):
    here = Engine(unrolled(), places, rows=64, rows_at_once=AT_ONCE)
    session = here.join(prompt(2), policy, seed=3, looks=4, stop=Stop(rows=30))
    for n in range(1, places):
      here.join(prompt(n), policy, number=n)
    while session.reason is None:
      here.step()
    return session

  for policy in (Policy(), HOT):
    one, other = lived(1, policy), lived(PLACES, policy)
    np.testing.assert_array_equal(one.rows, other.rows)
    for row, look in one.looks.items():
      np.testing.assert_allclose(look.log_probs, other.looks[row].log_probs, atol=1e-4)


# What one session does to others, or to itself, at the wrong moment.


def test_a_place_that_went_wrong_is_clean_for_the_next():
  """NaN times nought is NaN: keys and values that nobody sees are cleared."""
  broken = jax.tree.map(lambda p: p, unrolled())
  trunk = jax.tree.map(lambda p: p, broken.trunk)
  trunk.embed = type(trunk.embed)(trunk.embed[...].at[7].set(jnp.nan))
  here = Engine(dataclasses.replace(broken, trunk=trunk), 2, rows=64)
  script = np.full((8, 3), SILENCE, np.int32)
  other = here.join(script=np.tile(script, (3, 1)), stop=Stop(rows=20))
  script[5, 1] = 7
  session = here.join(script=script)
  while session.reason is None:
    here.step()
  assert session.reason == "logits are not finite"
  late = here.join(script=np.tile(script[:5], (2, 1)), stop=Stop(rows=10))
  run(here)
  assert (late.reason, other.reason) == ("rows", "rows")


@pytest.mark.parametrize("max_rows", [64, 24])
def test_a_block_may_become_longer_while_it_is_read(max_rows):
  here, there = engine(max_rows=max_rows), engine(max_rows=max_rows)
  filler = here.join(np.tile(prompt(2), (2, 1)), HOT, stop=Stop(rows=22))  # leaves its keys behind
  while filler.reason is None:
    here.step()
  slide = Slide(2, 5)
  session = here.join(policies=HOT, number=7, slide=slide, stop=Stop(rows=40))
  here.step()
  session.read("user", [1] * 6)
  here.step()
  session.read("user", [2] * (16 if max_rows > 24 else 9))
  run(here)
  assert len(session.rows) == 40 and session.context <= max_rows
  if max_rows > 40:
    whole = there.join(policies=HOT, number=7, script=np.stack(session.rows), stop=Stop(rows=40))
    again = there.join(
      policies=HOT, number=7, script=np.stack(session.rows)[:30], stop=Stop(rows=40)
    )
    run(there)
    np.testing.assert_array_equal(whole.rows, again.rows)


def test_what_others_do_after_a_block_ends_leaves_its_last_row_alone():
  cells = prepared.KEY_BLOCK * 3  # of whole rows and whole blocks
  rows = cells // 3
  given = np.tile(prompt(2), (5, 1))[:rows]

  def written(others, **options):
    here = engine(rows=rows)
    assert here.state.cache.capacity == cells
    session = here.join(given, HOT, number=7, stop=Stop(rows=rows + 8))
    for n in range(others):
      here.join(policies=HOT, number=n)
    while session.reason is None:
      here.step(**options)
    return np.stack(session.rows)

  np.testing.assert_array_equal(written(2, rows=8), written(0, rows=8))
  np.testing.assert_array_equal(written(2, rows=8), written(2))


def test_who_slides_asks_for_no_more_room():
  here = engine(max_rows=16, rows=16)
  cells = here.state.cache.capacity
  here.join(slide=Slide(4, 8), stop=Stop(rows=60))
  here.join(stop=Stop(rows=15))
  run(here, rows=4)
  assert here.state.cache.capacity == cells


def test_a_grammar_that_fails_takes_nothing_from_others():
  here, fails = engine(), [True]

  def grammar(said):
    if len(said) == 3 and fails.pop():
      raise ValueError("no idea")

  first, bound = here.join(), here.join(policies={"think": Policy(grammar=grammar)})
  first.say("user", [1, 2, 3, 4])
  for _ in range(2):
    here.step()
  with pytest.raises(ValueError, match="no idea"):
    here.step()
  fails.append(False)
  for _ in range(2):
    here.step()
  assert [row[1] for row in first.rows] == [1, 2, 3, 4]
  assert len(bound.rows) == 4


def test_an_ended_session_hears_nothing():
  here = engine()
  session = here.join(stop=Stop(rows=1))
  run(here)
  with pytest.raises(InputError, match=r"session 0 has ended \(rows\); nothing is read any more"):
    session.say("user", [1])


def test_a_grid_longer_than_a_context_is_refused():
  with pytest.raises(InputError, match="grid: 12 rows; expected at most the 9 of a context"):
    fill(Engine(unrolled(), 2, max_rows=9), np.full((2, 12, 3), FREE))
