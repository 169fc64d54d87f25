"""Grids for people: rows of cells, one column a stream, on terminals, in plain text and in HTML."""

import html
import json
import sys
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from msjax.data.formats import RecordStream, Table
from msjax.errors import InputError, nearest
from msjax.streams import HOLE, Streams
from msjax.text.tokenizer import SILENCE_CELL, Tokenizer, printable

MODES = ("rich", "plain", "jsonl")
_WIDEST = 24  # columns of a table printed whole
_GAP = "  "


class RowPrinter:
  """Prints rows one at a time, as they are made, under a header with the names of the streams.

  `rich` has styles where the file is a terminal, `plain` never, `jsonl` is an object a row:
  `{"row": 0, "tokens": {name: id or null}, "text": {name: text}}`.
  """

  def __init__(
    self,
    names: Sequence[str],
    width: int | Sequence[int] = 12,
    file: TextIO | None = None,
    mode: str | None = None,
  ):
    """Prints the header.

    Args:
      names: of the columns.
      width: of a column or of each, in terminal cells; names that are longer widen theirs.
      file: by default standard output.
      mode: by default `rich` on a terminal and `plain` elsewhere.
    """
    self.names, self.file = tuple(names), file or sys.stdout
    self.mode = mode or ("rich" if self.file.isatty() else "plain")
    if self.mode not in MODES:
      raise InputError(
        f"mode {self.mode!r} is none of {', '.join(MODES)}{nearest(self.mode, MODES)}"
      )
    widths = [width] * len(self.names) if isinstance(width, int) else width
    self.widths = [max(w, cell_len(printable(n))) for w, n in zip(widths, self.names)]
    self._console = Console(file=self.file, highlight=False)
    if self.mode != "jsonl":
      self._line("row", self.names, ["bold"] * len(self.names))

  def row(self, index: int, texts: Sequence[str], tokens: Sequence[int]) -> None:
    """Prints a row.

    Args:
      index: of the row.
      texts: what each cell says; tables make it printable and cut what is too wide.
      tokens: id of each cell, -1 for a hole.
    """
    if self.mode == "jsonl":
      ids = {name: None if t == HOLE else int(t) for name, t in zip(self.names, tokens)}
      record = {"row": index, "tokens": ids, "text": dict(zip(self.names, texts))}
      print(json.dumps(record, ensure_ascii=False), file=self.file, flush=True)
    else:
      self._line(str(index), texts, ["dim" if t == SILENCE_CELL else "" for t in texts])

  def _line(self, index: str, texts: Sequence[str], styles: Sequence[str]) -> None:
    line = Text(f"{index:>5}", "dim")
    for text, width, style in zip(texts, self.widths, styles):
      line.append(_GAP).append(_fit(printable(text), width), style)
    line.rstrip()
    if self.mode == "rich":
      self._console.print(line, soft_wrap=True)
    else:
      print(line.plain, file=self.file)
    self.file.flush()


def _fit(text: str, width: int) -> str:
  """Fills up or cuts a text to `width` terminal cells; `…` marks a cut."""
  if cell_len(text) > width:
    text = set_cell_size(text, width - 1).rstrip() + "…"
  return set_cell_size(text, width)


def rows(table: Table, tokenizer: Tokenizer) -> list[list[str]]:
  """Returns what each cell shows, [R][S]: `·` for silence and nothing for a hole."""
  return [[tokenizer.cell_text(t) for t in row] for row in table.tokens.tolist()]


def _streams(table: Table) -> Sequence[RecordStream]:
  """The streams of a table, by number where it does not name them."""
  return table.streams or [RecordStream(str(s)) for s in range(table.tokens.shape[1])]


def print_table(
  table: Table, tokenizer: Tokenizer, file: TextIO | None = None, mode: str | None = None
) -> None:
  """Prints a table, every column as wide as it needs; see `RowPrinter`."""
  texts = rows(table, tokenizer)
  widths = [min(_WIDEST, max(map(cell_len, column))) for column in zip(*texts)]
  printer = RowPrinter([s.name for s in _streams(table)], widths, file, mode)
  for index, (row, tokens) in enumerate(zip(texts, table.tokens)):
    printer.row(index, row, tokens)


def to_html(table: Table, tokenizer: Tokenizer) -> str:
  """Returns a table as a page that needs no other file."""
  title = html.escape(table.id or str(table.where))
  head = "".join(
    f"<th>{html.escape(s.name)}<small>{s.kind or ''}</small></th>" for s in _streams(table)
  )
  body = "\n".join(
    f"<tr><th>{index}</th>{''.join(map(_html_cell, texts, tokens, weights))}</tr>"
    for index, (texts, tokens, weights) in enumerate(
      zip(rows(table, tokenizer), table.tokens.tolist(), table.weights.tolist())
    )
  )
  return (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
    f"<style>{_CSS}</style>\n<h1>{title}</h1>\n"
    f"<table><thead><tr><th>row</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></html>\n"
  )


def _html_cell(text: str, token: int, weight: float) -> str:
  if token == HOLE:
    return '<td class="hole"></td>'
  kind = ' class="silence"' if text == SILENCE_CELL else ""
  return f'<td{kind} title="token {token}, weight {weight:g}">{html.escape(text)}</td>'


_CSS = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; }
h1 { font-size: 1.2em; }
table { border-collapse: collapse; }
td, th { padding: 2px 10px; text-align: left; border-bottom: 1px solid #eee; white-space: pre; }
th { color: #888; font-weight: normal; }
thead th { position: sticky; top: 0; background: #fff; color: #222; font-weight: bold; }
small { font-weight: normal; color: #888; margin-left: .5em; }
.silence { color: #bbb; }
.hole { background: #f4f4f4; }
"""


class Census:
  """Counts over many tables with the run's columns: rows, and by stream silence, tokens and loss.

  Attributes:
    records: tables counted.
    rows: of all of them.
    too_long: tables of more than `max_rows` rows.
    cells: by stream, without holes, int [S]; likewise the next two.
    tokens: cells that are not silent.
    loss: tokens that are predicted with a weight above 0.
  """

  def __init__(self, streams: Streams, max_rows: int):
    """Starts at zero."""
    self.streams, self.max_rows = streams, max_rows
    self.records = self.rows = self.too_long = 0
    self.cells, self.tokens, self.loss = np.zeros((3, len(streams)), int)

  def add(self, table: Table) -> None:
    """Counts one more table."""
    cells = table.tokens != HOLE
    tokens = cells & (table.tokens != self.streams.silence_id)
    predicted = cells[:-1] & tokens[1:] & (table.weights[1:] * self.streams.weights > 0)
    self.records += 1
    self.rows += len(cells)
    self.too_long += len(cells) > self.max_rows
    self.cells += cells.sum(0)
    self.tokens += tokens.sum(0)
    self.loss += predicted.sum(0)

  def __str__(self) -> str:
    """Returns the figures as lines of text."""
    width = max(map(cell_len, ("stream", *self.streams.names)))
    lines = [
      f"{self.records} records, {self.rows} rows, "
      f"{self.too_long} records longer than {self.max_rows} rows",
      f"{_fit('stream', width)}{'cells':>12}{'tokens':>12}{'silence':>10}{'with loss':>12}",
    ]
    for name, cells, tokens, loss in zip(self.streams.names, self.cells, self.tokens, self.loss):
      silence = f"{1 - tokens / cells:.1%}" if cells else "-"
      lines.append(f"{_fit(name, width)}{cells:>12}{tokens:>12}{silence:>10}{loss:>12}")
    return "\n".join(lines)
