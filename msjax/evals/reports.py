"""What a run prints and writes when it is done: an example at work, then figures side by side."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import rich.box
from rich.console import Console
from rich.table import Table

from msjax.data.show import RowPrinter
from msjax.evals import arithmetic, likelihood
from msjax.model import Model
from msjax.training.loop import Trained

Figures = dict[str, Any]
_EXAMPLES = 2


class Report(NamedTuple):
  """One kind of report.

  Attributes:
    measure: a run and its baseline, or None -> what report.json holds.
    show: the run and those figures -> printed for people.
  """

  measure: Callable[[Trained, Trained | None], Figures]
  show: Callable[[Trained, Figures], None]


def _measure_arithmetic(run: Trained, baseline: Trained | None) -> Figures:
  """Accuracy and rows."""
  figures = lambda run: {**arithmetic.measure(_model(run)), "train_seconds": round(run.seconds, 1)}
  return {**figures(run), **({"baseline": figures(baseline)} if baseline else {})}


def _show_arithmetic(run: Trained, figures: Figures) -> None:
  """Questions being read and answered, then accuracy and rows side by side."""
  model = _model(run)
  for grid in arithmetic.shown(model, _EXAMPLES):
    print()
    printer = RowPrinter(model.streams.names)
    for index, row in enumerate(grid):
      printer.row(index, [model.tokenizer.cell_text(int(i)) for i in row], row)
  columns = {"multi-stream": figures}
  if "baseline" in figures:
    columns["chat baseline"] = figures["baseline"]
  lines = {
    f"accuracy on {figures['questions']} held-out questions": ("accuracy", ".3f"),
    "rows from the question's end to the answer": ("rows_to_first_answer", "g"),
    "rows of the whole exchange": ("rows_total", "g"),
    "seconds of training": ("train_seconds", ".0f"),
  }
  table = _table("", *columns, numbers=len(columns))
  for title, (name, form) in lines.items():
    table.add_row(title, *(format(column[name], form) for column in columns.values()))
  _print(table)


def _measure_likelihood(run: Trained, baseline: Trained | None) -> Figures:
  """Held-out loss by stream, of the model, of unigram frequencies and of the baseline."""

  def figures(run: Trained) -> Figures:
    scores = likelihood.model_scores(run.learner, run.params, run.data.valid, run.data.tokenizer)
    return {**scores, "train_seconds": round(run.seconds, 1)}

  data = run.data
  unigram = likelihood.unigram_scores(run.learner, data.train, data.valid, data.tokenizer)
  others = {"unigram": unigram, **({"baseline": figures(baseline)} if baseline else {})}
  return {**figures(run), **others}


def _show_likelihood(run: Trained, figures: Figures) -> None:
  """The same as a table."""
  titles = {
    "nats a token": "loss_per_token",
    "bits a byte": "bits_per_byte",
    "nats a silence": "loss_on_silence",
  }
  table = _table("", "stream", "tokens", *titles, numbers=1 + len(titles))
  models = {"model": figures, **{n: figures[n] for n in ("unigram", "baseline") if n in figures}}
  for name, scores in models.items():
    for stream, score in (*scores["streams"].items(), ("all", scores["all"])):
      numbers = (f"{score[title]:.3f}" for title in titles.values())
      table.add_row(name, stream, f"{score['tokens']:,}", *numbers)
  _print(table)


def _model(run: Trained) -> Model:
  return Model(run.learner.config, run.data.streams, run.data.tokenizer, run.params)


def _table(*titles: str, numbers: int) -> Table:
  """A table whose last `numbers` columns are numbers."""
  table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, title in enumerate(titles):
    is_text = i < len(titles) - numbers
    table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
  return table


def _print(table: Table) -> None:
  Console(file=sys.stdout).print(table)


REPORTS = {
  "arithmetic": Report(_measure_arithmetic, _show_arithmetic),
  "likelihood": Report(_measure_likelihood, _show_likelihood),
}
