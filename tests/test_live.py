"""Sessions at a terminal."""

import io
import itertools
import json
import re

import numpy as np
import pytest
from talk_cases import BYTES, talker

from msjax.decoding.log import Logged
from msjax.decoding.policy import Policy
from msjax.errors import InputError, RunError
from msjax.talk import live
from msjax.talk.conversation import Prompt

NO_LOG = live.LogTo(None, {})
HOT = {"output": Policy(1.0)}
MUTE = {"output": Policy(ablated=True)}


def rows_of(text):
  return [json.loads(line) for line in text.splitlines()]


def interacted(capsys, lines, policies=MUTE, log=NO_LOG):
  live.interact(talker(), True, log, policies, seed=0, file=io.StringIO(lines))
  said = capsys.readouterr()
  return rows_of(said.out), said.err


def test_lines_are_read_and_the_end_is_quiet(capsys):
  rows, errors = interacted(capsys, "hello\nuser: you\n")
  assert "".join(row["text"]["user"] for row in rows) == "helloyou"
  assert len(rows) == len("helloyou") + 2 + 4 and not errors  # messages have ends
  assert [row["row"] for row in rows] == list(range(len(rows)))


def test_nothing_said_is_nothing_printed(capsys):
  assert interacted(capsys, "") == ([], "")


def test_who_answers_is_waited_for(capsys, monkeypatch):
  """Quiet rows count from the last word, and what is written between them is heard."""
  said = itertools.count()  # rows after the word and its end; the output speaks in some
  monkeypatch.setattr(live, "is_hushed", lambda *_: next(said) not in (2, 6, 10))
  rows, _ = interacted(capsys, "a\n")
  assert len(rows) == 2 + 11 + 4


def test_what_cannot_be_said_is_told_and_the_session_goes_on(capsys, monkeypatch):
  model = talker()
  monkeypatch.setattr(model, "said", lambda text: [999] if text == "x" else BYTES.encode(text))
  rows, errors = interacted(capsys, "x\nok\n")
  assert re.search(r"error: session 0: stream 'user': 999 is no token; expected 0 to 258", errors)
  assert "".join(row["text"]["user"] for row in rows) == "ok"


def test_what_is_said_to_a_stream_of_the_models_is_told(capsys):
  rows, errors = interacted(capsys, "output: hey\nps: ok\n")
  assert re.search(r"error: session 0: stream 'output' is written by the model", errors)
  assert "".join(row["text"]["user"] for row in rows) == "ps: ok"


def test_one_conversation_is_printed_logged_and_replayed(capsys, tmp_path):
  model, path = talker(), tmp_path / "log"
  log = live.LogTo(path, {"workdir": "somewhere"})
  prompt = Prompt({"user": "hi"}, [(5, "user", "you")], rows=12)
  live.show(model, prompt, True, log, HOT, seed=3)
  first = capsys.readouterr().out
  assert [row["tokens"] for row in rows_of(first)] == [
    row.tokens for row in model.generate({"user": "hi"}, [(5, "user", "you")], 12, None, 3, HOT)
  ]
  logged = Logged.read(path)
  assert logged.header["about"] == {"workdir": "somewhere"}
  live.replay(model, logged, True)
  assert capsys.readouterr().out == first


def test_a_table_ends_with_what_was_said(capsys):
  live.show(talker(), Prompt({"user": "hi"}, rows=4), False, NO_LOG, MUTE, seed=0)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["row", "user", "output"]
  assert lines[5:] == ["", "user: hi"]


def test_a_log_goes_on_while_the_session_does(capsys, tmp_path, monkeypatch):
  path, before = tmp_path / "log", []
  said = live.is_hushed
  monkeypatch.setattr(
    live, "is_hushed", lambda *words: before.append(len(Logged.read(path).events)) or said(*words)
  )
  rows, _ = interacted(capsys, "hello\n", log=live.LogTo(path, {}))
  events = Logged.read(path).events
  assert before == list(range(6, 6 + len(before)))  # those of the rows before
  assert [event["row"] for event in events] == [list(row["tokens"].values()) for row in rows]


def test_a_full_context_ends_it(capsys, monkeypatch):
  model = talker()
  made = model.engine
  monkeypatch.setattr(model, "engine", lambda **options: made(max_rows=6, **options))
  rows, _ = interacted(capsys, "hello, you\n")
  assert len(rows) == 6


def test_a_model_that_breaks_off_is_told(capsys, monkeypatch):
  model = talker()
  monkeypatch.setattr(model, "_prepared", None)
  broken = model.module.embed[...].at[:].set(np.nan)
  monkeypatch.setattr(model.module, "embed", type(model.module.embed)(broken))
  try:
    with pytest.raises(RunError, match="logits are not finite"):
      interacted(capsys, "hi\n", policies=HOT)
  finally:
    model._prepared = None


def test_without_input_streams_there_is_nobody_to_talk_to(monkeypatch):
  model = talker()
  monkeypatch.setattr(type(model.streams), "of_kind", lambda self, *kinds: ())
  with pytest.raises(InputError, match="--interactive: the model has no input stream"):
    live.interact(model, True, NO_LOG, {}, seed=0, file=io.StringIO(""))
