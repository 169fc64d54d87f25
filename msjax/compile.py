"""Tells before a pod is rented whether a run fits: `python -m msjax.compile --config=FILE
--topology=v5e:8x8`.

Compiles the step that training or decoding would run, for TPUs that are not there, and prints what
a chip holds, moves and exchanges. `pip install -e '.[tpu-compiler]'` brings the compiler.
"""

import json
import signal

import jax
import rich.box
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from msjax import aot, cli, config_flag
from msjax.config import Config
from msjax.data import load as data
from msjax.errors import InputError
from msjax.training.state import Learner

_CONFIG = config_flag.define()
flags.declare_key_flag("config")  # for --help
_TOPOLOGY = flags.DEFINE_string("topology", None, "of a slice: v5e:8x8, v6e:4x4, v5p:2x2x2")
_SLICES = flags.DEFINE_integer("num_slices", None, "train: by default config.mesh.slices", 1)
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "decode"], "what to compile")
_SESSIONS = flags.DEFINE_integer("sessions", None, "decode: together; by default 1", 1)
_ROWS = flags.DEFINE_integer("rows", None, "decode: of a cache; by default config.data.rows", 1)
_SEARCH = flags.DEFINE_enum("search", None, ["batch"], "train: the largest batch that fits")
_SAVE = flags.DEFINE_string("save", None, "train: file for the step, for msjax.train --program")
_JSON = flags.DEFINE_bool("json", False, "print a JSON object instead of tables")
_MIB, _GIB = 2**20, 2**30


def main(_) -> int:
  """Compiles, prints, and returns 0 if the program fits."""
  config = config_flag.resolve(_CONFIG)
  if not _TOPOLOGY.value:
    raise InputError("--topology: not given; expected a slice, as in v5e:8x8")
  if _PROGRAM.value == "decode":
    _refuse("train", num_slices=_SLICES, search=_SEARCH, save=_SAVE)
  else:
    _refuse("decode", sessions=_SESSIONS, rows=_ROWS)
  config.mesh.slices = _SLICES.value or config.mesh.slices
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # the compiler would not hear Python's for minutes
  jax.config.update("jax_platforms", "cpu")  # the machine's own devices stay out of it
  learner = _learner(config)
  if _PROGRAM.value == "decode":
    rows = _ROWS.value or config.data.rows
    report = aot.decode_report(learner, _TOPOLOGY.value, _SESSIONS.value or 1, rows)
  elif _SEARCH.value:
    report = aot.largest_batch(learner, _TOPOLOGY.value)
  else:
    report = aot.train_report(learner, _TOPOLOGY.value, _SAVE.value)
  if _JSON.value:
    print(json.dumps(report.to_json()))
  else:
    _show(report)
    if _SAVE.value and report.fits:
      print(f"\nsaved as {_SAVE.value}")
  return 0 if report.fits else 1


def _refuse(program: str, **of_other: flags.FlagHolder) -> None:
  """Raises for flags that only the other program has."""
  for name, flag in of_other.items():
    if flag.value is not None:
      raise InputError(f"--{name}: {flag.value} is for --program={program}; leave it out")


def _learner(config: Config) -> Learner:
  """The run without its data. Which token is silence matters only to a step that is kept."""
  if config.model.vocab_size and not _SAVE.value:
    return Learner(config, config.stream_set(silence_id=0), config.model.vocab_size)
  try:
    tokenizer = data.tokenizer(config)
  except InputError as error:
    if not _SAVE.value:
      raise
    raise InputError(f"--save: the step knows which token is silence; {error}") from None
  return Learner(config, config.stream_set(tokenizer.silence_id), tokenizer.vocab_size)


def _show(report: aot.Report) -> None:
  """Prints a report for people."""
  console = Console(width=100, highlight=False)
  cut = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
  unit = "sessions" if report.program == "decode" else "sequences"
  searched = ""
  if _SEARCH.value:
    searched = ", the largest batch that fits" if report.fits else "; no batch is smaller"
  console.print(
    f"{report.program} on {report.chips} chips of {report.topology} ({cut or 'one chip'}): "
    f"{report.batch} {unit}, {report.tokens:,} tokens a step{searched}"
  )
  console.print()
  memory = report.hbm_per_chip_bytes
  facts = {
    "memory a chip": f"{sum(memory.values()) / _GIB:.2f} GiB of {report.capacity / _GIB:.2f}: "
    f"arguments {memory['arguments'] / _GIB:.2f}, temporaries {memory['temporaries'] / _GIB:.3f}",
    "fits": "yes"
    if report.fits
    else f"no, {report.short_by / _GIB:.2f} GiB too much: {_advice(report)}",
  }
  if report.remat:
    facts["kept for the backward pass"] = report.remat
  if report.xla_ms is not None:
    facts["XLA's operations"] = f"{report.xla_ms:,.1f} ms, without collectives and kernels"
    facts["memory traffic"] = _traffic(report)
    facts["Pallas kernels"] = ", ".join(report.kernels) or "none"
  if report.compile_seconds:
    facts["compiled in"] = f"{report.compile_seconds:.0f} s"
  table = Table(box=None, show_header=False, pad_edge=False)
  for name, fact in facts.items():
    table.add_row(name, fact)
  console.print(table)
  collectives = _collectives(report)
  if collectives.row_count:
    console.print()
    console.print(collectives)


def _traffic(report: aot.Report) -> str:
  least = report.hbm_bytes_min
  ratio = f", {report.hbm_bytes / least:.3f} of the least (weights and cache once)" if least else ""
  return f"{report.hbm_bytes / 1e9:,.2f} GB{ratio}"


def _collectives(report: aot.Report) -> Table:
  """Those of a step, largest first; small ones are added up."""
  table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for title in ("collective", "chips", "where", "times"):
    table.add_column(title, justify="right" if title in ("chips", "times") else "left")
  for title in ("MiB each", "GiB a step"):
    table.add_column(title, justify="right")
  for c in sorted(report.collectives, key=lambda c: -c.bytes * c.count):
    where = f"{'in' if c.in_loop else 'outside'} a loop{', meanwhile' if c.asynchronous else ''}"
    group = f"{c.group} slices" if c.between_slices else str(c.group)
    total = c.bytes * c.count / _GIB
    if total >= 0.05:
      table.add_row(
        *(c.kind, group, where, f"{c.count:,}"), f"{c.bytes / _MIB:.1f}", f"{total:.2f}"
      )
  return table


def _advice(report: aot.Report) -> str:
  """What to change where a program does not fit."""
  if report.program == "decode":
    return "fewer --sessions or --rows, or more chips to a model by --config.mesh.model"
  if report.hbm_per_chip_bytes["arguments"] > report.capacity:
    return "more chips, for parameters and optimizer alone are too much"
  ways = ["more chips"]
  if report.batch * report.mesh.get("model", 1) > report.chips:  # not one sequence each yet
    ways.append("a larger --config.train.micro_batches")
  ways.append("a smaller --config.data.rows")
  if report.remat != "full":
    ways.append("--config.model.remat=full")
  return f"{', '.join(ways[:-1])} or {ways[-1]}"


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  cli.run(main, check=config_flag.check)
