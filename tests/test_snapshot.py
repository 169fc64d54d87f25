"""Sessions that are copied, parked and brought back."""

import numpy as np
import pytest
from engine_cases import (
  HOT,
  PLACES,
  engine,
  prompt,
  run,
  small_key_blocks,  # noqa: F401
  unrolled,
)

from msjax.decoding.engine import Engine
from msjax.decoding.policy import Policy
from msjax.decoding.session import Slide
from msjax.decoding.snapshot import Snapshot
from msjax.decoding.stop import Stop
from msjax.errors import InputError
from msjax.streams import HOLE

STOP = Stop(rows=24, tokens={"output": 100})


def begun(here, number=2, steps=6, **options):
  """A session of which some is still to be read."""
  session = here.join(prompt(number), HOT, seed=3, number=number, stop=STOP, **options)
  while len(session.rows) < len(prompt(number)) + steps:
    here.step()
  session.say("user", [1, 2, 3])
  return session


def whole():
  here = engine()
  session = begun(here)
  run(here)
  return np.stack(session.rows)


def test_a_session_comes_back_as_it_was(tmp_path):
  here = engine()
  snapshot = here.park(begun(here))
  assert not here.sessions
  snapshot.save(tmp_path / "session")
  for found in (snapshot, Snapshot.load(tmp_path / "session", unrolled())):
    there = engine()
    others = [there.join(policies=HOT) for _ in range(PLACES)]  # it waits for a place
    there.step()
    session = there.restore(found)
    others[1].end("made room")
    while session.reason is None:
      there.step()
    np.testing.assert_array_equal(session.rows, whole())
    assert (session.reason, session.number) == ("rows", 2)


def test_a_snapshot_changes_nothing():
  here = engine()
  session = begun(here)
  snapshot = here.snapshot(session)
  run(here)
  np.testing.assert_array_equal(session.rows, whole())
  for _ in range(2):  # it may be used again
    again = here.restore(snapshot)
    run(here)
    np.testing.assert_array_equal(again.rows, session.rows)


def test_a_fork_goes_its_own_way_from_where_it_began():
  here = engine()
  session = begun(here)
  before = len(session.rows)
  fork = here.fork(session)
  assert fork.number == 3
  run(here)
  ours, theirs = np.stack(session.rows), np.stack(fork.rows)
  np.testing.assert_array_equal(ours, whole())
  np.testing.assert_array_equal(ours[: before + 1], theirs[: before + 1])  # the next was drawn
  assert (ours != theirs).any()
  np.testing.assert_array_equal(theirs[before : before + 3, 1], [1, 2, 3])


@pytest.mark.parametrize("steps", [0, 1])
def test_whoever_has_not_begun_or_is_reading_is_copied_too(steps):
  here = engine()
  session = here.join(prompt(5), HOT, seed=3, number=2, stop=Stop(rows=20))
  assert len(prompt(5)) == 12
  for _ in range(steps):
    here.step()
  again = here.restore(here.snapshot(session))
  assert len(again.rows) == len(session.rows) == 4 * steps
  run(here)
  np.testing.assert_array_equal(again.rows, session.rows)


def test_one_that_slides_or_is_paused_is_copied_too():
  here = engine(max_rows=16)
  session = begun(here, steps=0, slide=Slide(2, 5))
  while session.context < 16:
    here.step()
  assert session.status == "reading"
  fork = here.restore(here.snapshot(session))
  fork.pause()
  again = here.restore(here.snapshot(fork))
  run_but = [here.step() for _ in range(12)]
  assert run_but and again.status == "paused"
  again.resume(), fork.resume()
  run(here)
  np.testing.assert_array_equal(again.rows, session.rows)
  np.testing.assert_array_equal(fork.rows, session.rows)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_in_the_middle_of_sliding_is_copied_too(steps):
  here = engine(max_rows=20)
  session = begun(here, steps=0, slide=Slide(3, 10))
  while session.context < 20:
    here.step()
  for _ in range(steps):  # of four
    here.step()
  assert session.status == "reading"
  again = here.restore(here.snapshot(session))
  run(here)
  np.testing.assert_array_equal(again.rows, session.rows)


def test_who_waits_to_read_has_nothing_of_who_was_there_before():
  here = engine()
  for n in range(PLACES):
    here.join(prompt(5), HOT, number=n, stop=Stop(rows=14))
  run(here)
  first = here.join(prompt(5), HOT, seed=3, number=5, stop=Stop(rows=20))
  second = here.join(prompt(2), HOT, seed=3, number=9, stop=Stop(rows=20))
  here.step()
  assert (first.context, second.context, second.status) == (4, 0, "reading")
  snapshot = here.park(second)
  again = here.restore(snapshot)
  there = engine()
  alone = there.join(prompt(2), HOT, seed=3, number=9, stop=Stop(rows=20))
  run(here), run(there)
  np.testing.assert_array_equal(again.rows, alone.rows)


def test_room_grows_for_who_comes_back():
  here, small = engine(rows=32), engine(rows=2)
  snapshot = here.snapshot(begun(here))
  session = small.restore(snapshot)
  run(small)
  np.testing.assert_array_equal(session.rows, whole())


def test_tokens_that_were_had_are_remembered(tmp_path):
  policy = Policy(1.0, presence_penalty=1e6)
  here, there = engine(remembers=True), engine(remembers=True)
  session = here.join(policies=policy, stop=Stop(rows=12))
  for _ in range(6):
    here.step()
  here.snapshot(session).save(tmp_path / "session")
  again = there.restore(Snapshot.load(tmp_path / "session", unrolled()))
  run(here), run(there)
  np.testing.assert_array_equal(again.rows, session.rows)
  said = np.stack(again.rows)[1:, 0]
  assert len(set(said)) == len(said)
  with pytest.raises(InputError, match="is of an Engine with remembers=True; expected that here"):
    engine().restore(Snapshot.load(tmp_path / "session", unrolled()))


def test_holes_and_scripts_survive(tmp_path):
  here = engine()
  script = np.full((8, 3), HOLE, np.int32)
  script[:, 0] = np.arange(8)
  session = here.join(script=script, stop=Stop(rows=12))
  session.force("think", [5])
  for _ in range(4):
    here.step()
  here.snapshot(session).save(tmp_path / "session")
  again = here.restore(Snapshot.load(tmp_path / "session", unrolled()))
  run(here)
  np.testing.assert_array_equal(again.rows, session.rows)
  assert np.stack(again.rows)[:8].tolist() == script.tolist()
  assert again.rows[8][2] == 5


# What is refused.


def test_another_model_is_refused(tmp_path):
  named = lambda name: Engine(unrolled(), PLACES, rows=8, identity=lambda: name)
  here = named("one")
  snapshot = here.snapshot(here.join())
  with pytest.raises(InputError, match="snapshot of session 0: is of model one, this one is other"):
    named("other").restore(snapshot)


def test_what_has_ended_is_not_kept():
  here = engine()
  session = here.join(stop=Stop(rows=1))
  run(here)
  with pytest.raises(InputError, match=r"session 0 has ended \(rows\); nothing is kept"):
    here.snapshot(session)


def test_a_grammar_is_kept_in_memory_alone(tmp_path):
  only = np.arange(unrolled().vocab_size) == 7
  here = engine()
  session = here.join(policies={"think": Policy(grammar=lambda said: only)}, stop=Stop(rows=6))
  for _ in range(3):
    here.step()
  snapshot = here.snapshot(session)
  fork = here.fork(session)
  run(here)
  assert (np.stack(fork.rows)[1:, 2] == 7).all() and len(fork.rows) == 6
  with pytest.raises(InputError, match="snapshot of session 0: has a grammar, which no file can"):
    snapshot.save(tmp_path / "session")
  assert not list(tmp_path.iterdir())


def test_files_that_are_none_are_refused(tmp_path):
  here, path = engine(), tmp_path / "session"
  with pytest.raises(InputError, match="expected a snapshot of a session"):
    Snapshot.load(path, unrolled())
  path.write_bytes(b"no snapshot")
  with pytest.raises(InputError, match="expected a snapshot of a session"):
    Snapshot.load(path, unrolled())
  here.snapshot(begun(here, steps=2)).save(path)
  path.write_bytes(path.read_bytes()[:-8])  # cut off
  with pytest.raises(InputError, match="expected a snapshot of a session"):
    Snapshot.load(path, unrolled())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  here, path = engine(), tmp_path / "session"
  session = here.join()
  here.snapshot(session).save(path)
  old = path.read_bytes()
  monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
  with pytest.raises(InputError, match="cannot be written: No space left"):
    here.snapshot(session).save(path)
  assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
