"""Trains a run, its baseline with it, and reports: `python -m msjax.train --config=FILE`.

The same command goes on where it was stopped. `--config.FIELD=VALUE` changes a field.
"""

from msjax import early

if __name__ == "__main__":
  early.listen()

import json

import jax
from absl import flags, logging

from msjax import cli, config_flag, processes
from msjax.config import Config
from msjax.data import load as data
from msjax.errors import InputError
from msjax.evals import reports
from msjax.training.goodput import process_began
from msjax.training.loop import train
from msjax.workdir import WorkDir

_CONFIG = config_flag.define()
processes.define()
flags.declare_key_flag("config")  # for --help
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "directory of the run; by default the config's, if it has one"
)
_ON_BAD_RECORD = flags.DEFINE_enum(
  "on_bad_record",
  None,
  ["stop", "skip"],
  "what a wrong record of a data file does: stop with its line, or skip it, counted and listed",
)
_BASELINE = flags.DEFINE_bool("baseline", True, "train the config's baseline too")
_PROGRAM = flags.DEFINE_string(
  "program", None, "file that msjax.compile --save wrote, in place of compiling here"
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "print the resolved config and end")


def main(_) -> None:
  """Trains, then trains the baseline if the config has one, then reports."""
  config = config_flag.resolve(_CONFIG)
  config.workdir = _WORKDIR.value or config.workdir
  config.data.on_bad_record = _ON_BAD_RECORD.value or config.data.on_bad_record
  if not _BASELINE.value:
    config.baseline = {}
  if _PRINT_CONFIG.value:
    print(json.dumps(config.to_json(), indent=2))
    return
  if not config.workdir:
    raise InputError("--workdir: not given, and this config has no default; expected a directory")
  began = process_began()
  with processes.joined():
    _run(config, began)


def _run(config: Config, began: float) -> None:
  """What all processes do together."""
  if jax.process_count() == 1:
    early.end_by_sigterm()
  if config.report and jax.process_count() > 1:
    raise InputError(
      f"config.report: {config.report!r} is measured by one process, here are "
      f"{jax.process_count()}; leave it out by --config.report="
    )
  workdir = WorkDir(config.workdir)
  logging.info("work directory %s", workdir.path)
  if config.baseline:
    _check_baseline(config)
  trained, baseline = train(config, workdir, began, _PROGRAM.value), None
  if config.baseline:
    changes = ", ".join(f"{name}={value}" for name, value in config.baseline.items())
    logging.info("baseline: the same run with %s", changes)
    baseline = train(config.baseline_run(), workdir.baseline)
  if config.report:
    report = reports.REPORTS[config.report]
    trained, baseline = (run and run.on_one_device() for run in (trained, baseline))
    figures = report.measure(trained, baseline)
    workdir.write_report(figures)
    report.show(trained, figures)


def _check_baseline(config: Config) -> None:
  """Checks before the first run what would else end the second."""
  try:
    data.check(config.baseline_run())
  except InputError as error:
    raise InputError(f"config.baseline: {error}; --nobaseline trains the run alone") from None


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  cli.run(main, check=config_flag.check)
