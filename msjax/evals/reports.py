"""What a run prints and writes when it is done: an example at work, then figures side by side."""

import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.table

from msjax.data.show import RowPrinter
from msjax.evals import arithmetic, likelihood
from msjax.model import Model
from msjax.training.loop import Trained

Figures = dict[str, Any]
_EXAMPLES = 2


def _arithmetic(run: Trained, baseline: Trained | None) -> Figures:
  """Questions being read and answered, then accuracy and rows."""
  figures = _arithmetic_figures(run)
  columns = {"multi-stream": figures}
  if baseline is not None:
    figures["baseline"] = columns["chat baseline"] = _arithmetic_figures(baseline)
  model = _model(run)
  for grid in arithmetic.shown(model, _EXAMPLES):
    print()
    printer = RowPrinter(model.streams.names)
    for index, row in enumerate(grid):
      printer.row(index, [model.tokenizer.cell_text(int(i)) for i in row], row)
  labels = {
    "accuracy": f"accuracy on {figures['questions']} held-out questions",
    "rows_to_first_answer": "rows from the question's end to the answer",
    "rows_total": "rows of the whole exchange",
    "train_seconds": "seconds of training",
  }
  lines = [
    (text, *(_number(name, column[name]) for column in columns.values()))
    for name, text in labels.items()
  ]
  _print_table(("", *columns), lines)
  return figures


def _arithmetic_figures(run: Trained) -> Figures:
  return {**arithmetic.measure(_model(run)), "train_seconds": round(run.seconds, 1)}


def _number(name: str, value: float) -> str:
  return {"accuracy": f"{value:.3f}", "train_seconds": f"{value:.0f}"}.get(name, f"{value:g}")


def _likelihood(run: Trained, baseline: Trained | None) -> Figures:
  """Held-out loss by stream, next to unigram frequencies and the baseline."""
  learner, data = run.learner, run.data
  models = {
    "model": likelihood.model_scores(learner, run.params, data.valid, data.tokenizer),
    "unigram": likelihood.unigram_scores(learner, data.train, data.valid, data.tokenizer),
  }
  seconds = {"train_seconds": round(run.seconds, 1)}
  if baseline is not None:
    models["baseline"] = likelihood.model_scores(
      baseline.learner, baseline.params, baseline.data.valid, baseline.data.tokenizer
    )
  lines = [
    (name, stream, f"{s['tokens']:,}", *(f"{s[k]:.3f}" for k in _LIKELIHOOD_COLUMNS))
    for name, scores in models.items()
    for stream, s in scores.items()
  ]
  titles = ("nats a token", "bits a byte", "nats a silence")
  _print_table(("", "stream", "tokens", *titles), lines)
  figures = {**models["model"], **seconds, "unigram": models["unigram"]}
  if baseline is not None:
    figures["baseline"] = {**models["baseline"], "train_seconds": round(baseline.seconds, 1)}
  return figures


_LIKELIHOOD_COLUMNS = ("loss_per_token", "bits_per_byte", "loss_on_silence")


def _model(run: Trained) -> Model:
  return Model(run.learner.config, run.data.streams, run.data.tokenizer, run.params)


def _print_table(titles: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  text = sum(1 for cell in lines[0] if not cell[:1].isdigit())
  for i, title in enumerate(titles):
    table.add_column(title, justify="left" if i < text else "right", no_wrap=True)
  for line in lines:
    table.add_row(*line)
  rich.console.Console(file=sys.stdout).print(table)


REPORTS: dict[str, Callable[[Trained, Trained | None], Figures]] = {
  "arithmetic": _arithmetic,
  "likelihood": _likelihood,
}
