"""Logs of sessions, and the same rows once more."""

import json

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
from msjax.decoding.log import Log, Logged, engine_options, replay
from msjax.decoding.policy import OFFICIAL_LIVE, OFFICIAL_SCRIPTED, Policy, Silence
from msjax.decoding.session import Slide
from msjax.decoding.stop import Stop
from msjax.errors import InputError, RunError

LEADS = {
  "think": Policy(1.0, silence=OFFICIAL_SCRIPTED, logit_bias={7: 0.5}),
  "output": Policy(0.5, top_k=9, silence=Silence(penalty=1.0, ramp=3, shortest=2, longest=5)),
}


def eventful(here, path, policies=HOT, **options):
  """A session that waits, reads, is told things and paused, slides, and is logged."""
  session = here.join(prompt(2), policies, seed=5, stop=Stop(rows=40), **options)
  with Log(path, here, session) as log:
    while session.reason is None:
      here.step()
      rows = len(session.rows) if session.status == "running" else 0
      if rows == 13:
        session.say("user", [1, 2, 3])
        session.force("think", [9, 8])
      if rows == 16:
        session.pause()
        here.step()
        session.resume()
        session.read("user", [4, 5, 6, 7, 8, 9, 10])
      log.write()
  return session


@pytest.mark.parametrize(
  ("policies", "sizes", "options"),
  [
    (HOT, {}, {}),
    (LEADS, {}, {}),
    (Policy(1.0, silence=OFFICIAL_LIVE), {"max_rows": 20}, {"slide": Slide(2, 6), "looks": 2}),
    (Policy(1.0, repetition_penalty=1.3), {"remembers": True}, {}),
  ],
  ids=["drawn", "leads", "slides", "remembers"],
)
def test_a_log_gives_the_same_rows(tmp_path, policies, sizes, options):
  here = engine(**sizes)
  others = [here.join(policies=HOT, seed=8, stop=Stop(rows=30)) for _ in range(PLACES)]
  session = eventful(here, tmp_path / "log", policies, **options)
  assert all(other.reason is not None for other in others)
  logged = Logged.read(tmp_path / "log")
  there = Engine(unrolled(), rows=8, **logged.engine)
  there.join(prompt(5), HOT)
  np.testing.assert_array_equal(list(replay(there, logged)), session.rows)
  assert len(session.rows) == 40


def test_a_log_of_a_fork_begins_with_its_parent(tmp_path):
  here = engine()
  parent = here.join(prompt(3), HOT, seed=3)
  for _ in range(6):
    here.step()
  fork = here.restore(here.snapshot(parent), number=7)
  for _ in range(4):
    here.step()
  with Log(tmp_path / "log", here, fork):
    pass
  there = engine()
  np.testing.assert_array_equal(list(replay(there, Logged.read(tmp_path / "log"))), fork.rows)
  assert (np.stack(fork.rows) != np.stack(parent.rows)[: len(fork.rows)]).any()


def test_a_log_of_a_fork_made_while_it_read(tmp_path):
  here = engine()
  parent = here.join(prompt(5), HOT, seed=3)
  here.step()
  assert parent.context == 4 < len(prompt(5)) - 1
  fork = here.restore(here.snapshot(parent), number=7)
  for _ in range(12):
    here.step()
  with Log(tmp_path / "log", here, fork):
    pass
  there = engine()
  other = there.join()
  np.testing.assert_array_equal(list(replay(there, Logged.read(tmp_path / "log"))), fork.rows)
  assert len(fork.rows) > 12 and other.reason is None


def test_a_log_that_was_cut_off_gives_what_it_has(tmp_path):
  here, path = engine(), tmp_path / "log"
  session = eventful(here, path)
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  for cut in (len(lines[0]), len(b"".join(lines[:2])), len(whole) - 5):
    path.write_bytes(whole[:cut])
    rows = list(replay(engine(), Logged.read(path)))
    np.testing.assert_array_equal(np.reshape(rows, (-1, 3)), np.stack(session.rows)[: len(rows)])
  assert len(rows) == 39


def test_a_row_that_comes_out_otherwise_is_told(tmp_path):
  path = tmp_path / "log"
  eventful(engine(), path)
  lines = path.read_text().splitlines()
  at = next(i for i, line in enumerate(lines) if '"row"' in line and i > 8)
  event = json.loads(lines[at])
  event["row"][2] = (event["row"][2] + 1) % 20
  path.write_text("\n".join([*lines[:at], json.dumps(event), *lines[at + 1 :], ""]))
  with pytest.raises(RunError, match=r"row \d+, stream 'think': token \d+ here, \d+ in the log"):
    list(replay(engine(), Logged.read(path)))


def test_another_model_or_engine_is_refused(tmp_path):
  path = tmp_path / "log"
  named = lambda name: Engine(unrolled(), PLACES, rows=8, rows_at_once=4, identity=lambda: name)
  here = named("one")
  with Log(path, here, here.join(stop=Stop(rows=2))):
    run(here)
  logged = Logged.read(path)
  assert len(list(replay(named("one"), logged))) == 2
  with pytest.raises(InputError, match="log: is of model one, this one is other; replay it with"):
    list(replay(named("other"), logged))
  for options in ({"max_rows": 9}, {"rows_at_once": 5}, {"remembers": True}):
    there = Engine(unrolled(), **{**engine_options(here), **options}, identity=lambda: "one")
    with pytest.raises(InputError, match=r"log: is of an Engine with .*; expected that, not"):
      list(replay(there, logged))
  logged.header["streams"]["silence_id"] = 4
  with pytest.raises(InputError, match=r"log: is of streams .*; expected"):
    list(replay(named("one"), logged))


def test_another_mesh_is_refused(tmp_path):
  with Log(tmp_path / "log", engine(), engine().join()):
    pass
  logged = Logged.read(tmp_path / "log")
  logged.header["chips"]["heads"] = 2
  with pytest.raises(InputError, match=r"cuts .*'heads': 2.*'heads': 1.*--model_chips=2"):
    list(replay(engine(), logged))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "format None; this msjax reads 'msjax log 2'"),
    ('{"format": "msjax log 0"}\n', "format 'msjax log 0'; this msjax reads"),
    ("{\n", ":1: line: no JSON"),
    ("[]\n", r":1: line: '\[\]'; expected a JSON object"),
  ],
)
def test_what_is_no_log_is_refused(tmp_path, text, message):
  (tmp_path / "log").write_text(text)
  with pytest.raises(InputError, match=message):
    Logged.read(tmp_path / "log")
  with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
    Logged.read(tmp_path / "nowhere")


def test_a_grammar_cannot_be_logged(tmp_path):
  here = engine()
  session = here.join(policies={"think": Policy(grammar=lambda said: None)})
  with pytest.raises(InputError, match="session 0: has a grammar, which no file can hold"):
    Log(tmp_path / "log", here, session)
  with pytest.raises(InputError, match="cannot be written: No such file"):
    Log(tmp_path / "none" / "log", here, here.join())
