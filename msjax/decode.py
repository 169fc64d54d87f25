"""Lets a trained run read and write: `python -m msjax.decode --workdir=DIR --user=TEXT`.

The text goes into the stream `user`, one token a row, and every row is printed as it is made.
`--at=ROW:STREAM:TEXT` puts text into any input stream from a row on: a word in edgeways.
"""

import jax
from absl import flags, logging

import msjax
from msjax import cli, mesh
from msjax.data.show import RowPrinter
from msjax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a trained run")
_STEP = flags.DEFINE_string("step", "latest", "checkpoint: steps taken, latest or best")
_USER = flags.DEFINE_string("user", None, "text for the stream user, read from row 0 on")
_AT = flags.DEFINE_multi_string("at", [], "ROW:STREAM:TEXT, text for an input stream; repeatable")
_ROWS = flags.DEFINE_integer(
  "rows", None, "rows to make; by default until all is read and four rows passed in silence"
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn when the temperature is above 0", 0)
_MODEL_CHIPS = flags.DEFINE_integer(
  "model_chips", 1, "chips that share the model's heads and MLP, for one that fits none alone", 1
)
_JSONL = flags.DEFINE_bool("jsonl", False, "print a JSON object a row instead of a table")


def main(_) -> None:
  """Prints the rows, and under a table what each stream said."""
  if not _WORKDIR.value:
    raise InputError("--workdir: not given; expected the work directory of a trained run")
  at = [_placed(text) for text in _AT.value]
  chips, devices = _MODEL_CHIPS.value, jax.devices()
  if chips > len(devices):
    raise InputError(f"--model_chips: {chips}; there are {len(devices)}")
  with jax.set_mesh(mesh.decode_mesh(chips, devices[:chips])):
    _decode(at)


def _decode(at: list[tuple[int, str, str]]) -> None:
  """Loads the model onto the mesh in use, and prints."""
  model = msjax.load(_WORKDIR.value, step=_STEP.value)
  rows = model.generate(
    {} if _USER.value is None else {"user": _USER.value},
    at=at,
    rows=_ROWS.value,
    temperature=_TEMPERATURE.value,
    seed=_SEED.value,
  )
  names = model.streams.names
  printer = RowPrinter(names, mode="jsonl" if _JSONL.value else None)
  said = {name: [""] for name in names}  # messages
  for row in rows:
    ids = [row.tokens[name] for name in names]
    if _JSONL.value:
      printer.row(row.index, [row.text[name] for name in names], ids)
    else:
      printer.row(row.index, [model.tokenizer.cell_text(i) for i in ids], ids)
    for name in names:
      said[name][-1] += row.text[name]
      if row.tokens[name] == model.tokenizer.end_id:
        said[name].append("")
  if not _JSONL.value:
    print()
    for name in names:
      for message in filter(None, said[name]):
        print(f"{name}: {message}")


def _placed(text: str) -> tuple[int, str, str]:
  """Reads ROW:STREAM:TEXT; the text may hold colons."""
  row, _, rest = text.partition(":")
  stream, colon, said = rest.partition(":")
  if not (row.isdecimal() and stream and colon and said):
    raise InputError(f"--at: {text!r}; expected ROW:STREAM:TEXT, as in 12:user:stop")
  return int(row), stream, said


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  cli.run(main)
