"""Files of prompts and their answers."""

import json

import numpy as np
import pytest
from talk_cases import talker

from msjax.decoding.policy import Policy
from msjax.errors import InputError
from msjax.talk.prompts import answer

PROMPTS = [
  {"inputs": {"user": "hello"}, "rows": 9},
  {"id": "second", "inputs": {"user": "a"}, "at": [[3, "user", "bc"]], "rows": 12},
  {"rows": 3},
  {"inputs": {"user": "grüße"}, "rows": 20},
]
HOT = {"output": Policy(1.0)}


@pytest.fixture(scope="module")
def model():
  return talker()


def written(path, lines=PROMPTS):
  path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
  return path


def answered(model, tmp_path, name="out", **options):
  out = tmp_path / name
  options = {"places": 2, "policies": HOT, "seed": 1, **options}
  answer(model, written(tmp_path / "prompts"), out, **options)
  return sorted(map(json.loads, out.read_text().splitlines()), key=lambda found: found["prompt"])


def test_each_prompt_gets_its_answer(model, tmp_path):
  found = answered(model, tmp_path)
  assert [len(one["tokens"]) for one in found] == [9, 12, 3, 20]
  assert [one.get("id") for one in found] == [None, "second", None, None]
  assert [one["text"]["user"] for one in found] == ["hello", "abc", "", "grüße"]
  assert {one["reason"] for one in found} == {"rows"}
  for n, one in enumerate(found):
    engine = model.engine(2)
    given = np.full((len(one["tokens"]), 2), -2, np.int32)
    given[:, 0] = np.array(one["tokens"])[:, 0]
    session = engine.join(policies=HOT, seed=1, number=n, script=given)
    while len(session.rows) < len(given):
      engine.step(rows=16)
    np.testing.assert_array_equal(session.rows[: len(given)], one["tokens"])


def test_what_is_answered_is_not_asked_again(model, tmp_path):
  whole = answered(model, tmp_path)
  out = tmp_path / "out"
  first, second, third, _ = out.read_bytes().splitlines(keepends=True)
  kept = first.replace(b'"reason": "rows"', b'"reason": "kept"')
  out.write_bytes(kept + second + third[:-20])  # killed while it wrote
  again = answered(model, tmp_path)
  assert [one["tokens"] for one in again] == [one["tokens"] for one in whole]
  assert sum(one["reason"] == "kept" for one in again) == 1
  before = out.read_bytes()
  answered(model, tmp_path)
  assert out.read_bytes() == before


@pytest.mark.parametrize("options", [{"seed": 2}, {"places": 4}, {"policies": {}}])
def test_answers_of_another_run_are_refused(model, tmp_path, options):
  answered(model, tmp_path)
  before = (tmp_path / "out").read_bytes()
  with pytest.raises(InputError, match=r"out:1: run: '.*'; answers another prompt, model, policy"):
    answered(model, tmp_path, **options)
  assert (tmp_path / "out").read_bytes() == before


def test_how_many_are_answered_is_told(model, tmp_path, capsys):
  for count, before in ((4, 0), (0, 4)):
    answered(model, tmp_path)
    told = f"{tmp_path / 'out'}: {count} answered, beside {before} that were there\n"
    assert capsys.readouterr().out == told


def test_answers_go_to_stdout(model, tmp_path, capsys):
  answer(model, written(tmp_path / "prompts"), None, places=3, policies=HOT, seed=1)
  assert sorted(json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()) == [
    *range(4)
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "prompts:2: line: no JSON"),
    ("[1]", r"prompts:2: line: '\[1\]'; expected a JSON object"),
    ('{"input": {}}', "prompts:2: input: unknown; expected id, inputs, at, rows"),
    ('{"inputs": "hi"}', "prompts:2: prompt: inputs: 'hi'; expected text by stream"),
    ('{"inputs": {"usr": "hi"}}', "prompts:2: prompt: stream 'usr' is unknown: .*'user'"),
    ('{"inputs": {"output": "hi"}}', "prompts:2: prompt: stream 'output': the model writes it"),
    ('{"inputs": {"user": 5}}', "prompts:2: prompt: text 5: expected a str"),
    ('{"at": 5}', r"prompts:2: prompt: at: 5; expected a list of .row, stream, text"),
    ('{"at": [[1, "user"]]}', r"prompts:2: prompt: at: \[1, 'user'\]; expected tuples"),
    ('{"at": [[-1, "user", "x"]]}', "prompts:2: prompt: row -1 for stream 'user'"),
    ('{"rows": 0}', "prompts:2: prompt: rows: 0; expected 1 or more"),
    ('{"rows": "9"}', "prompts:2: prompt: rows: '9'; expected 1 or more"),
    ('{"rows": 1, "inputs": {"user": "hi"}}', "prompts:2: prompt: rows: 1 end before the given"),
  ],
)
def test_a_prompt_that_is_none_stops_all_before_any_is_asked(model, tmp_path, line, message):
  (tmp_path / "prompts").write_text('{"rows": 2}\n' + line + "\n")
  with pytest.raises(InputError, match=message):
    answer(model, tmp_path / "prompts", tmp_path / "out", places=1, policies={}, seed=0)
  assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_are_told(model, tmp_path):
  with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
    answer(model, tmp_path / "nowhere", None, places=1, policies={}, seed=0)
  prompts = written(tmp_path / "prompts")
  with pytest.raises(InputError, match="cannot be written: No such file"):
    answer(model, prompts, tmp_path / "none" / "out", places=1, policies={}, seed=0)


def test_lines_end_at_line_feeds_alone(model, tmp_path):
  lines = [{"inputs": {"user": "a\u2028b"}, "rows": 9}, {"inputs": {"user": "c\u0085"}, "rows": 9}]
  written(tmp_path / "prompts", lines)
  for _ in range(2):  # again: it reads what it wrote
    answer(model, tmp_path / "prompts", tmp_path / "out", places=1, policies=HOT, seed=0)
  found = (tmp_path / "out").read_text().split("\n")
  assert json.loads(found[0])["text"]["user"] == "a\u2028b" and len(found) == 3


def test_a_file_of_something_else_is_not_cut(model, tmp_path):
  (tmp_path / "out").write_text("dear diary")
  with pytest.raises(InputError, match="out:1: line: b'dear diary'; expected an answer"):
    answered(model, tmp_path)
  assert (tmp_path / "out").read_text() == "dear diary"


def test_a_full_context_ends_an_answer(model, tmp_path, monkeypatch):
  made = model.engine
  monkeypatch.setattr(model, "engine", lambda *words, **how: made(*words, max_rows=10, **how))
  found = answered(model, tmp_path)
  assert [len(one["tokens"]) for one in found] == [9, 10, 3, 10]
  assert [one["reason"] for one in found] == ["rows", "context is full", "rows", "context is full"]
