import io
import json
import re
import subprocess
import sys

import forked
import numpy as np
import pytest
from rich.cells import cell_len

from msjax.data import show
from msjax.data.formats import RecordStream, Table, read
from msjax.errors import InputError
from msjax.streams import HOLE, Stream, Streams
from msjax.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SILENCE, END = BYTES.silence_id, BYTES.end_id
CHAT = {
  "id": "greeting",
  "messages": [
    {"role": "user", "content": "hi", "time": 5},
    {"role": "assistant", "content": "ho", "time": 9},
  ],
}
SCRIPT = {
  "streams": ["user", "output"],
  "spans": [
    {"stream": "user", "row": 0, "text": "<b>"},
    {"stream": "output", "row": 2, "text": "X"},
  ],
}


@pytest.fixture
def prepare(tmp_path):
  """Runs the command in a directory with `in.jsonl` made of the records."""

  def call(records, *flags):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return forked.run("msjax.prepare", *flags, cwd=tmp_path)

  return call


def printed(done):
  assert done.returncode == 0, done.stderr
  return [line.split() for line in done.stdout.splitlines()]


# The command.


def test_messages_become_spans_and_spans_the_same_tables(prepare, tmp_path):
  layout = ("--layout=wait_k", "--wait_k=3")
  done = prepare([CHAT], "--input=in.jsonl", "--output=spans.jsonl", "--to=spans", *layout)
  assert done.stdout == "1 records written to spans.jsonl (spans)\n"
  ((_, script),) = read(tmp_path / "spans.jsonl")
  assert [(s.stream, s.row, s.text, s.end) for s in script.spans] == [
    ("user", 0, "hi", True),
    ("output", 3, "ho", True),
  ]
  prepare([CHAT], "--input=in.jsonl", "--output=direct.jsonl", *layout)
  prepare([CHAT], "--input=spans.jsonl", "--output=tables.jsonl")
  assert (tmp_path / "direct.jsonl").read_bytes() == (tmp_path / "tables.jsonl").read_bytes()
  assert json.loads((tmp_path / "tables.jsonl").read_text())["num_rows"] == 6


def test_the_input_is_not_written_over(tmp_path):
  (tmp_path / "in.jsonl").write_text(json.dumps(CHAT))
  command = [sys.executable, "-m", "msjax.prepare", "--input=in.jsonl", "--output=./in.jsonl"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
  assert done.returncode == 2
  assert "--output: ./in.jsonl is the input, which would be lost; name another" in done.stderr
  assert json.loads((tmp_path / "in.jsonl").read_text()) == CHAT


def test_a_record_is_shown_checked_and_written_as_a_page(prepare, tmp_path):
  done = prepare(
    [CHAT, SCRIPT], "--input=in.jsonl", "--show=2", "--check", "--html=x.html", "--max_rows=3"
  )
  assert printed(done) == [
    ["in.jsonl:2:", "3", "rows"],
    ["row", "user", "output"],
    ["0", "<", "·"],
    ["1", "b", "·"],
    ["2", ">", "X"],
    ["2", "records,", "10", "rows,", "1", "records", "longer", "than", "3", "rows"],
    ["stream", "cells", "tokens", "silence", "with", "loss"],
    ["user", "10", "6", "40.0%", "0"],
    ["output", "10", "4", "60.0%", "4"],
  ]
  page = (tmp_path / "x.html").read_text()
  assert "&lt;" in page and '<td title="token 60, weight 1">&lt;</td>' in page


def test_a_check_alone_prints_figures_alone(prepare):
  done = prepare([SCRIPT, SCRIPT], "--input=in.jsonl", "--check")
  assert printed(done)[0][:4] == ["2", "records,", "6", "rows,"]
  assert len(printed(done)) == 4


def test_a_record_is_found_by_its_id_and_placed_by_the_flags(prepare):
  flags = ("--layout=timestamps", "--rows_per_second=0.5", "--noend_token", "--streams=user:input,")
  done = prepare([CHAT], "--input=in.jsonl", "--show=greeting", flags[3] + "bot:output", *flags[:3])
  assert printed(done)[2:] == [["0", "h", "·"], ["1", "i", "·"], ["2", "·", "h"], ["3", "·", "o"]]


def test_skip_goes_on_and_says_how_many(prepare, tmp_path):
  overlap = {**SCRIPT, "spans": SCRIPT["spans"] * 2}
  done = prepare(
    ["{", CHAT, overlap], *("--input=in.jsonl", "--output=o", "--to=spans", "--on_bad_record=skip")
  )
  assert done.stdout.splitlines()[-1] == "2 records skipped; the log lists them"
  assert "skipped: in.jsonl:1: json: " in done.stderr
  assert "skipped: in.jsonl:3: spans[2]: " in done.stderr
  assert [line for line, _ in read(tmp_path / "o")] == [1]


@pytest.mark.parametrize(
  "records, flags, line",
  [
    ([CHAT], "--output=o", "--input: missing; expected a JSONL file, or chitchat"),
    ([CHAT], "--input=in.jsonl", "nothing to do; expected --output=FILE, --show=RECORD or --check"),
    ([CHAT, "{"], "--input=in.jsonl --output=o", "in.jsonl:2: json: Expecting property name"),
    (["{"], "--input=in.jsonl --output=o --on_bad_record=skip", "in.jsonl: all 1 records are bad"),
    (
      [CHAT],
      "--input=in.jsonl --output=o --wait_k=3",
      "--wait_k: is an option of --layout=wait_k, not of",
    ),
    ([CHAT], "--input=in.jsonl --output=o --layout=wait_k --wait_k=1", "wait_k: 1 is too early"),
    ([CHAT], "--input=in.jsonl --output=o --to=spam", "level 'spam' is none of messages, spans"),
    ([CHAT], "--input=in.jsonl --output=o --silence=-", "--silence: the built-in bytes have"),
    ([CHAT], "--input=in.jsonl --output=o --tokenizer=none", "none: No such file"),
    ([CHAT], "--input=in.jsonl --check --html=o", "--html: expected --show=RECORD beside it"),
    ([CHAT], "--input=in.jsonl --show=3 --html=o", "--show: '3' is no id and no line of a usable"),
  ],
)
def test_what_a_user_got_wrong_is_one_line(prepare, tmp_path, records, flags, line):
  done = prepare(records, *flags.split())
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(f"msjax.prepare: error: {line}")
  assert "Traceback" not in done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# Grids for people.

TABLE = Table(
  np.array([[ord("a"), SILENCE], [10, HOLE], [ord("<"), END]], np.int32),
  np.array([[1, 1], [1, 1], [0.5, 0]], np.float32),
  (RecordStream("user", "input"), RecordStream("輸出", "output")),
)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_table_has_aligned_columns_and_no_styles_outside_a_terminal():
  out = io.StringIO()
  show.print_table(TABLE, BYTES, out)
  lines = out.getvalue().splitlines()
  assert lines == ["  row  user  輸出", "    0  a     ·", "    1  \\n", "    2  <     <end>"]
  assert {cell_len(line[: line.rindex(" ")]) for line in lines if "\\n" not in line} == {12}


def test_a_terminal_gets_styles_and_the_same_text(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.delenv("NO_COLOR", raising=False)
  plain, styled = io.StringIO(), Terminal()
  show.print_table(TABLE, BYTES, plain)
  show.print_table(TABLE, BYTES, styled)
  assert "\x1b[2m" in styled.getvalue()
  without = re.sub(r"\x1b\[[0-9;]*m", "", styled.getvalue())
  assert [x.rstrip() for x in without.splitlines()] == plain.getvalue().splitlines()


def test_rows_are_printed_as_they_come_in_columns_that_never_move():
  out = io.StringIO()
  printer = show.RowPrinter(["a", "long-name"], width=4, file=out)
  printer.row(0, ["x", "y"], [1, 2])
  assert out.getvalue().splitlines() == ["  row  a     long-name", "    0  x     y"]
  printer.row(1, ["你好嗎", "z\x1b[2J"], [1, 2])
  assert out.getvalue().splitlines()[-1] == "    1  你…   z\\x1b[2J"


def test_a_row_can_be_read_as_soon_as_it_is_made(tmp_path):
  for mode in show.MODES:
    with open(tmp_path / mode, "w") as file:
      show.RowPrinter(["a"], file=file, mode=mode).row(0, ["x"], [1])
      assert "x" in (tmp_path / mode).read_text()


def test_json_lines_have_ids_and_text_as_it_is():
  out = io.StringIO()
  show.RowPrinter(["a", "b"], file=out, mode="jsonl").row(3, ["x\n", ""], np.array([7, HOLE]))
  assert json.loads(out.getvalue()) == {
    "row": 3,
    "tokens": {"a": 7, "b": None},
    "text": {"a": "x\n", "b": ""},
  }


def test_the_mode_is_one_of_three():
  with pytest.raises(InputError, match=r"mode 'json' is none of rich, plain, jsonl; .* 'jsonl'"):
    show.RowPrinter(["a"], mode="json")


def test_a_page_escapes_what_it_shows_and_needs_nothing_else():
  named = Table(TABLE.tokens, TABLE.weights, (RecordStream("<i>"), RecordStream("b")), id="<x&y>")
  page = show.to_html(named, BYTES)
  assert "<title>&lt;x&amp;y&gt;</title>" in page
  assert "<th>&lt;i&gt;<small></small></th>" in page
  assert '<td title="token 60, weight 0.5">&lt;</td>' in page
  assert page.count('class="hole"') == page.count('class="silence"') == 1
  assert "http" not in page and "src=" not in page


def test_the_census_counts_what_the_streams_say_is_predicted():
  run = Streams(
    (Stream.parse("user:input"), Stream.parse("think:internal"), Stream.parse("output:output")),
    SILENCE,
  )
  census = show.Census(run, max_rows=5)
  rng = np.random.default_rng(0)
  expected = np.zeros(3, int)
  for rows in (3, 6, 6):
    tokens = rng.choice([HOLE, SILENCE, 65, 66], (rows, 3)).astype(np.int32)
    weights = rng.integers(0, 2, tokens.shape).astype(np.float32)
    census.add(Table(tokens, weights))
    labels, weights = run.labels(tokens[None], None, weights[None])
    expected += np.asarray((weights > 0) & (labels != SILENCE)).sum((0, 1))
  assert (census.records, census.rows, census.too_long) == (3, 15, 2)
  assert census.loss.tolist() == expected.tolist()
  assert expected[0] == 0 and expected[1:].all()
