"""Many sessions of one model: what each writes, and what that does not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
  AT_ONCE,
  HOT,
  PLACES,
  ROWS,
  SILENCE,
  VOCAB,
  engine,
  model,
  prompt,
  run,
  small_key_blocks,  # noqa: F401
  unrolled,
)

from msjax.decoding import tick
from msjax.decoding.engine import Engine, fill
from msjax.decoding.policy import Policy, Silence
from msjax.decoding.session import Slide
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.kernels import xla
from msjax.streams import HOLE
from msjax.text.tokenizer import ByteTokenizer


def written(grid, rows=ROWS, temperature=0.0, seed=0):
  """The grid [B, R, S] filled up."""
  return fill(Engine(unrolled(), len(grid), rows), grid, Policy(temperature), seed)


def listening(same=False):
  """Two sessions with random user text, if wanted the same, the rest free."""
  grid = np.full((2, ROWS, 3), FREE, np.int32)
  grid[:, :, 1] = np.random.default_rng(0).integers(0, VOCAB, (1 if same else 2, ROWS))
  return grid


def test_what_is_given_stands_and_the_rest_is_written():
  grid = listening()
  grid[1, 4:7, 2] = [5, HOLE, 6]
  out = written(grid)
  assert out.dtype == np.int32
  assert np.all((out >= HOLE) & (out < VOCAB))
  np.testing.assert_array_equal(out[grid != FREE], grid[grid != FREE])


def test_free_cells_are_the_likeliest_by_a_whole_pass():
  grid = listening()
  grid[1, :3] = HOLE  # a ragged start
  grid[0, 6, 0] = HOLE
  out = written(grid)
  logits = jax.jit(lambda m, tokens: m.logits(m(tokens), tokens))(model(), out)
  expected = np.where(out == HOLE, SILENCE, np.argmax(logits, -1))[:, :-1]
  free = grid[:, 1:] == FREE
  np.testing.assert_array_equal(out[:, 1:][free], expected[free])
  assert len(np.unique(out[:, 1:][free])) > 3


def test_where_nothing_was_read_silence_is_written():
  grid = listening()
  grid[1, :3] = HOLE
  grid[0, 6, 0] = HOLE
  out = written(grid, temperature=1.0)
  np.testing.assert_array_equal(out[0, 0, [0, 2]], SILENCE)  # the very first row
  np.testing.assert_array_equal(out[1, 3, [0, 2]], SILENCE)  # after holes
  assert out[0, 7, 0] == SILENCE


def test_a_session_goes_on_where_it_was():
  whole = written(grid := listening(), temperature=1.0)
  engine = Engine(unrolled(), 2, rows=4)
  sessions = [engine.join(policies=Policy(1.0), script=rows[:5]) for rows in grid]
  for r in range(ROWS):
    for session, rows in zip(sessions, grid):
      if r == 5:
        session.follow(rows[5:])
    engine.step()
  np.testing.assert_array_equal([session.rows for session in sessions], whole)


def test_broken_parameters_write_nothing():
  broken = jax.tree.map(lambda p: p, unrolled())
  broken = dataclasses.replace(broken, columns=broken.columns.at[:, 7].set(jnp.nan))
  with pytest.raises(RunError, match="session 0, row 1: logits are not finite"):
    fill(Engine(broken, 2), listening())
  here = Engine(broken, 2)
  session = here.join(prompt(1))
  here.step()
  assert (session.reason, len(session.rows)) == ("logits are not finite", len(prompt(1)))


def test_greedy_writing_depends_on_neither_seed_nor_room():
  first = written(listening())
  np.testing.assert_array_equal(written(listening(), seed=5), first)
  np.testing.assert_array_equal(written(listening(), rows=ROWS // 4), first)  # grows twice


def test_draws_depend_on_seed_session_row_and_stream_alone():
  grid = listening(same=True)
  first = written(grid, temperature=1.0, seed=5)
  np.testing.assert_array_equal(written(grid, temperature=1.0, seed=5, rows=ROWS // 4), first)
  np.testing.assert_array_equal(written(grid[:1], temperature=1.0, seed=5), first[:1])
  assert np.any(written(grid, temperature=1.0, seed=6) != first)
  assert np.any(first[0] != first[1])  # sessions that were told the same
  assert np.any(first[:, :, 0] != first[:, :, 2])  # streams
  assert len(np.unique(first[0, 1:, 0])) > 3  # rows


def test_rows_come_as_they_are_made():
  """What is given next may answer what was just written."""
  engine = Engine(unrolled(), rows=ROWS)
  session = engine.join()
  for _ in range(ROWS):
    ((same, row),) = engine.step()
    assert same is session and (row == session.rows[-1]).all()
    session.say("user", [int(row[0])])  # repeats what the output said
  out = np.stack(session.rows)
  np.testing.assert_array_equal(out[1:, 1], out[:-1, 0])


# Sessions come and go.


def live(numbers, steps=14):
  """Lets sessions run together, each of which is told something on the way; returns their rows."""
  together = engine()
  sessions = [
    together.join(prompt(n), HOT, seed=3, number=n, stop=Stop(rows=len(prompt(n)) + steps))
    for n in numbers
  ]
  while together.sessions:
    together.step()
    for session in sessions:
      if len(session.rows) == len(prompt(session.number)) + 4:
        session.say("user", [1, 2, session.number])
  return {session.number: np.stack(session.rows) for session in sessions}


def test_a_session_writes_the_same_alone_and_among_others():
  alone = {n: live([n])[n] for n in range(6)}
  for order in ([0, 1, 2], [5, 3, 1, 4, 2, 0]):  # some wait for a place
    for n, rows in live(order).items():
      np.testing.assert_array_equal(rows, alone[n])
  for n, rows in alone.items():
    given, told = prompt(n), rows[len(prompt(n)) :]
    np.testing.assert_array_equal(rows[: len(given)], given)
    np.testing.assert_array_equal(told[:8, 1], [SILENCE] * 4 + [1, 2, n, SILENCE])
  assert len({rows[-1].tobytes() for rows in alone.values()}) > 3


def test_what_was_read_in_blocks_is_what_was_read_row_by_row():
  given = prompt(2)
  assert len(given) > 2 * AT_ONCE
  block, rows = engine(), engine()
  read = block.join(given, stop=Stop(rows=20))
  fed = rows.join(script=given, stop=Stop(rows=20))
  for each in (block, rows):
    while each.sessions:
      each.step()
  np.testing.assert_array_equal(read.rows, fed.rows)
  logits = jax.jit(lambda m, tokens: m.logits(m(tokens), tokens))(
    model(), np.stack(read.rows)[None]
  )
  written = np.argmax(logits[0], -1)[len(given) - 1 : -1, [0, 2]]
  np.testing.assert_array_equal(np.stack(read.rows)[len(given) :, [0, 2]], written)


def test_who_is_read_in_holds_nobody_up():
  here = engine()
  first = here.join()
  here.step()
  here.join(np.tile(prompt(2), (6, 1)))
  for row in range(2, 20):
    assert next(session for session, _ in here.step()) is first
    assert len(first.rows) == row
    if row == 3:
      late = here.join()
  assert len(late.rows) == 16


def test_room_grows_with_what_is_read_and_no_more():
  here = engine(rows=12)
  cells = here.state.cache.capacity
  session = here.join(np.tile(prompt(2), (2, 1))[:11])  # by itself it has room for 16 rows
  while len(session.rows) < 12:
    here.step()
  assert here.state.cache.capacity == cells
  here.step()
  assert here.state.cache.capacity == 2 * cells


def test_a_token_enters_with_the_next_row():
  here = engine()
  session, other = here.join(), here.join()
  for _ in range(3):
    here.step()
  session.say("user", [7, 8])
  session.force("think", [5])
  ((_, row), (_, of_other)) = here.step()
  assert row[1:].tolist() == [7, 5] and of_other[1] == SILENCE
  assert here.step()[0][1][1] == 8
  assert other.rows[-1][1] == SILENCE


def test_a_pause_changes_nothing_but_when():
  whole = live([1])[1]
  here = engine()
  session = here.join(prompt(1), HOT, seed=3, number=1, stop=Stop(rows=len(whole)))
  other = here.join()
  while session.status != "ended":
    here.step()
    if len(session.rows) in (len(prompt(1)) + 2, len(prompt(1)) + 9):
      session.pause()
      before = len(session.rows), len(other.rows)
      for _ in range(3):
        here.step()
      assert (len(session.rows), len(other.rows)) == (before[0], before[1] + 3)
      session.resume()
      here.step()
    if len(session.rows) == len(prompt(1)) + 4:
      session.say("user", [1, 2, 1])
  np.testing.assert_array_equal(session.rows, whole)


def test_nothing_is_compiled_once_it_is_warm():
  live(range(6))
  programs = tick.tick, tick.ticks, tick.prefill, tick.put, tick.begin, tick.take
  before = [program._cache_size() for program in programs]
  live([3, 1, 5, 0, 4])
  assert [program._cache_size() for program in programs] == before


def test_the_context_has_an_end():
  here = engine(max_rows=10)
  session, other = here.join(), here.join(stop=Stop(rows=4))
  while here.sessions:
    here.step()
  assert (session.reason, len(session.rows)) == ("context is full", 10)
  assert (other.reason, len(other.rows)) == ("rows", 4)
  assert repr(session) == "Session(0, context is full, row 10)"
  read = here.join(np.tile(prompt(2), (2, 1))[:10])
  while here.sessions:
    here.step()
  assert (read.reason, len(read.rows)) == ("context is full", 10)


@pytest.mark.parametrize(
  ("stop", "script", "rows", "reason"),
  [
    (Stop(end_id=5, end_streams=("think",)), [[0, 0, 0], [5, 5, 0], [0, 0, 5]], 3, "end token"),
    (Stop(silent_rows=2), [[SILENCE] * 3, [SILENCE, 1, SILENCE], [HOLE] * 3], 4, "silence"),
    (Stop(tokens={"output": 2}), [[SILENCE] * 3, [1, 1, 1], [HOLE, 1, 1], [2, 2, 2]], 4, "tokens"),
    (Stop(rows=2), [[0, 0, 0]], 2, "rows"),
  ],
)
def test_rules_to_stop(stop, script, rows, reason):
  here = engine()
  session = here.join(script=np.array(script + [[SILENCE] * 3] * 4, np.int32), stop=stop)
  while here.sessions:
    here.step()
  assert (session.reason, len(session.rows)) == (reason, rows)


def test_who_is_ended_makes_room():
  here = engine()
  sessions = [here.join() for _ in range(PLACES)]
  last, reading = here.join(np.tile(prompt(2), (6, 1))), here.join(np.tile(prompt(2), (6, 1)))
  here.step()
  assert last.status == "waiting" and here.sessions == [*sessions, last, reading]
  sessions[1].end("enough")
  here.step()
  assert len(last.rows) == AT_ONCE
  last.end("enough, too")
  reading.end("not even begun")
  assert here.sessions == [sessions[0], sessions[2]]
  here.join()
  assert len(here.step()) == PLACES
  assert len(sessions[1].rows) == 1


@pytest.mark.parametrize("field", ["places", "rows", "max_rows", "rows_at_once"])
def test_there_is_room_for_something(field):
  with pytest.raises(InputError, match=f"^{field}: 0; expected 1 or more$"):
    Engine(unrolled(), **{field: 0})


def test_policies_are_those_of_each_stream_and_session():
  here = engine(remembers=True)
  mute, bent = Policy(ablated=True), Policy(logit_bias={9: 1e6})
  first = here.join(policies={"think": mute, "output": bent})
  second = here.join(policies={"think": Policy(1.0, presence_penalty=1e6)})
  for _ in range(10):
    here.step()
  rows, others = np.stack(first.rows), np.stack(second.rows)
  assert (rows[1:, 0] == 9).all() and (rows[:, 2] == SILENCE).all()
  said = others[1:, 2][others[1:, 2] != SILENCE]
  assert len(set(said)) == len(said) > 3


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      {"prompt": np.zeros((2, 2), int)},
      r"session 4: block of int64, shape \(2, 2\); expected int",
    ),
    ({"prompt": np.full((1, 3), FREE)}, r"session 4: block of .*, -1 \(hole\) to 19"),
    ({"prompt": np.full((1, 3), VOCAB)}, "expected integers"),
    (
      {"prompt": np.zeros((99, 3), int)},
      "block of 99 rows; expected at most 64, for which there is room in a context of 64",
    ),
    ({"script": np.zeros((1, 3), float)}, r"session 4: script of float64, .* -2 \(free\)"),
    ({"policies": {"thinks": Policy()}}, "stream 'thinks' is unknown: .* did you mean 'think'"),
    (
      {"policies": Policy(temperature=-1.0)},
      "session 4, stream 'output': temperature: -1.0; expected 0 or more",
    ),
    ({"policies": Policy(presence_penalty=1.0)}, "expected an Engine made with remembers=True"),
    ({"stop": Stop(tokens={"outputs": 3})}, "stream 'outputs' is unknown"),
  ],
)
def test_what_is_wrong_is_refused_and_the_others_go_on(words, message):
  here = engine(max_rows=64)
  session = here.join()
  here.step()
  with pytest.raises(InputError, match=message):
    here.join(number=4, **words)
  here.step()
  assert here.sessions == [session] and len(session.rows) == 2


@pytest.mark.parametrize(
  ("verb", "words", "message"),
  [
    ("say", ("think", [1]), "session 0: stream 'think' is written by the model; .*user"),
    ("say", ("users", [1]), "stream 'users' is unknown: .* did you mean 'user'"),
    ("say", ("user", [VOCAB]), "session 0: stream 'user': 20 is no token; expected 0 to 19"),
    ("say", ("user", [1] * 9), "session 0: stream 'user': 0 tokens wait .* limit of 8"),
    ("force", ("user", [1]), "session 0: stream 'user' is an input; say it"),
    ("say", ("user", "hi"), "session 0: 'hi': expected token ids; encode text first"),
  ],
)
def test_what_cannot_be_said_is_refused(verb, words, message):
  here = engine(queue_limit=8)
  session = here.join()
  with pytest.raises(InputError, match=message):
    getattr(session, verb)(*words)
  here.step()
  assert len(session.rows) == 1


# Many rows in one dispatch.


@pytest.mark.parametrize("policy", [Policy(), HOT], ids=["likeliest", "drawn"])
def test_many_rows_at_once_are_those_one_by_one(policy):
  def rows(**options):
    here = engine()
    for n in range(4):
      here.join(prompt(n), policy, seed=3, number=n, stop=Stop(rows=len(prompt(n)) + 9 + n))
    sessions = here.sessions
    run(here, **options)
    return [np.stack(session.rows) for session in sessions]

  for ours, theirs in zip(rows(rows=5), rows()):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  "stop",
  [
    Stop(end_id=5, end_streams=("think",)),
    Stop(silent_rows=2),
    Stop(tokens={"output": 2}),
    Stop(rows=2),
  ],
  ids=["end", "silence", "tokens", "rows"],
)
def test_many_rows_end_where_one_by_one_do(stop):
  script = np.full((12, 3), SILENCE, np.int32)
  script[[0, 3, 5, 6, 9], [1, 0, 2, 0, 0]] = [4, 5, 5, 7, FREE]

  def ended(**options):
    here = engine()
    first, other = here.join(script=script, stop=stop), here.join(stop=Stop(rows=17))
    run(here, **options)
    assert len(other.rows) == 17
    return first.reason, np.stack(first.rows).tolist()

  assert ended(rows=8) == ended()


def test_who_ends_early_is_not_waited_for():
  """The loop ends with the last session, and what was not fed is not told."""
  here = engine()
  script = np.full((64, 3), SILENCE, np.int32)
  session = here.join(script=script, stop=Stop(silent_rows=3))
  assert len(here.step(rows=32)) == 3 == len(session.rows)
  np.testing.assert_array_equal(here.state.cache.row, [3, 0, 0])


def test_a_script_that_ended_in_one_dispatch_goes_on_in_the_next():
  here = engine()
  session = here.join(script=np.full((3, 3), 7, np.int32))
  here.step(rows=2)
  session.say("user", [9])
  here.step(rows=2)
  here.step(rows=2)
  assert [row[1] for row in session.rows] == [7, 7, 7, 9, SILENCE, SILENCE]


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
  cells = xla.KEY_BLOCK * 3  # of whole rows and whole blocks
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
