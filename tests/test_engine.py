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
from msjax.decoding.policy import Policy
from msjax.decoding.stop import Stop
from msjax.decoding.tick import FREE
from msjax.errors import InputError, RunError
from msjax.streams import HOLE


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
  broken = dataclasses.replace(broken, unembed=broken.unembed.at[7].set(jnp.nan))
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
    ({"policies": {"think": {"top_k": 3}}}, r"policies: {'top_k': 3} for stream 'think'; expected"),
    ({"stop": Stop(tokens={"outputs": 3})}, "stream 'outputs' is unknown"),
    ({"policies": 0.5}, r"policies: 0.5; expected a Policy, or a dict"),
    ({"stop": Stop(end_id=4)}, "session 4: stop.end_id: 4, and .* expected both or neither"),
    ({"stop": Stop(end_streams=("think",))}, "stop.end_id: None, and .* expected both or neither"),
    ({"stop": Stop(end_id=4, end_streams="think")}, "stop.end_streams: 'think'; expected a tuple"),
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
    ("say", ("user", [1.5]), "session 0: stream 'user': 1.5 is no token; expected 0 to 19"),
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
