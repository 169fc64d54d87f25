"""Turns messages into spans and spans into tables, and shows or checks what comes out.

python -m msjax.prepare --input=chats.jsonl --output=tables.jsonl --layout=wait_k --wait_k=4
python -m msjax.prepare --input=chitchat --layout=timestamps --show=17
"""

import itertools
import os
from collections.abc import Iterable, Iterator

from absl import flags

from msjax import cli
from msjax.data import chitchat, formats, show
from msjax.data.layout import LAYOUTS, Layout, convert, to_table
from msjax.data.pipeline import SPLITS
from msjax.errors import InputError
from msjax.files import replacing
from msjax.streams import Stream, Streams
from msjax.text import tokenizer_file
from msjax.text.tokenizer import ByteTokenizer, Tokenizer

_DEFAULT = Layout()

INPUT = flags.DEFINE_string(
  "input",
  None,
  "JSONL file of messages, spans or tables; or chitchat, the package's chats; or chitchat:train, "
  "chitchat:valid, as training splits them.",
)
OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.")
TO = flags.DEFINE_string("to", "table", "What to write: messages, spans or table.")
STREAMS = flags.DEFINE_list(
  "streams", "user:input,output:output", "The run's streams, name:kind[:weight] each."
)
SAME_ROW = flags.DEFINE_string(
  "same_row", "hidden", "What a cell sees of its own row: hidden, inputs, ordered or visible."
)
TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "tokenizer.json or a directory with one; the built-in bytes by default."
)
SILENCE = flags.DEFINE_string("silence", None, "Silence token of --tokenizer, if its rule fails.")
LAYOUT = flags.DEFINE_string(
  "layout", _DEFAULT.name, "How messages are placed: turn, wait_k or timestamps."
)
WAIT_K = flags.DEFINE_integer(
  "wait_k",
  _DEFAULT.wait_k,
  "wait_k: rows from a question's start to its answer's; 0: the least possible.",
)
ROWS_PER_SECOND = flags.DEFINE_float(
  "rows_per_second", _DEFAULT.rows_per_second, "timestamps: how fast rows pass."
)
MAX_PAUSE = flags.DEFINE_float(
  "max_pause", _DEFAULT.max_pause, "timestamps: longer pauses are cut to so many seconds."
)
END_TOKEN = flags.DEFINE_boolean(
  "end_token", _DEFAULT.end_token, "Whether <end> follows each message."
)
ON_BAD_RECORD = flags.DEFINE_string(
  "on_bad_record", "stop", "stop at the first bad record, or skip: count and list them."
)
SHOW = flags.DEFINE_string("show", None, "Print this record, by its id or its line, as a table.")
HTML = flags.DEFINE_string("html", None, "File to write the record of --show to, as a page.")
CHECK = flags.DEFINE_boolean("check", False, "Count rows, and silence and loss of each stream.")
MAX_ROWS = flags.DEFINE_integer("max_rows", 1024, "--check: how long a record may be.")


def main(_: list[str]) -> None:
  """Reads every record once; writes, counts and shows what it becomes."""
  if not (OUTPUT.value or SHOW.value or CHECK.value):
    raise InputError("nothing to do; expected --output=FILE, --show=RECORD or --check")
  if OUTPUT.value and os.path.realpath(OUTPUT.value) == os.path.realpath(INPUT.value or ""):
    raise InputError(f"--output: {OUTPUT.value} is the input, which would be lost; name another")
  if HTML.value and not SHOW.value:
    raise InputError("--html: expected --show=RECORD beside it, the record to write")
  tokenizer, layout = _tokenizer(), _layout()
  run_streams = tuple(map(Stream.parse, STREAMS.value))
  streams = Streams(run_streams, tokenizer.silence_id, SAME_ROW.value)
  bad = formats.BadRecords(ON_BAD_RECORD.value)
  census, shown = show.Census(streams, MAX_ROWS.value), []

  def converted() -> Iterator[formats.Record]:
    for record in _records(bad):
      with bad.caught():
        result = convert(record, TO.value, streams, tokenizer, layout)
        if TO.value != "messages" or SHOW.value or CHECK.value:
          table = to_table(result, streams, tokenizer, layout)  # finds overlaps in spans, too
          census.add(table)
          if SHOW.value and SHOW.value in (record.id, str(record.where.line)):
            shown.append(table)
        yield result

  count = _write(converted(), bad)
  for table in shown:
    print(f"{table.where}{f' ({table.id})' if table.id else ''}: {len(table.tokens)} rows")
    show.print_table(table, tokenizer)
  if CHECK.value:
    print(census)
  if OUTPUT.value:
    print(f"{count} records written to {OUTPUT.value} ({TO.value})")
  if bad.messages:
    print(f"{len(bad.messages)} records skipped; the log lists them")
  if SHOW.value and not shown:
    raise InputError(f"--show: {SHOW.value!r} is no id and no line of a usable record")
  if HTML.value:
    with replacing(HTML.value) as file:
      file.write(show.to_html(shown[0], tokenizer).encode())


def _tokenizer() -> Tokenizer:
  if TOKENIZER.value:
    return tokenizer_file.load(TOKENIZER.value, SILENCE.value)
  if SILENCE.value:
    raise InputError("--silence: the built-in bytes have their own; expected --tokenizer beside it")
  return ByteTokenizer()


def _layout() -> Layout:
  """Returns the layout of the flags; an option of another layout is an error."""
  layout = Layout(
    LAYOUT.value, WAIT_K.value, ROWS_PER_SECOND.value, MAX_PAUSE.value, END_TOKEN.value
  )
  for name, options in LAYOUTS.items():
    for option in options:
      if flags.FLAGS[option].present and name != layout.name:
        raise InputError(f"--{option}: is an option of --layout={name}, not of {layout.name}")
  return layout


def _records(bad: formats.BadRecords) -> Iterable[formats.Record]:
  if not INPUT.value:
    raise InputError("--input: missing; expected a JSONL file, or chitchat")
  package, _, split = INPUT.value.partition(":")
  if package == "chitchat" and split in ("", *SPLITS):
    return (c for c in chitchat.conversations() if split in ("", chitchat.split(c.id)))
  return (record for _, record in formats.read(INPUT.value, bad))


def _write(records: Iterator[formats.Record], bad: formats.BadRecords) -> int:
  """Goes through all records, writes them if asked to, and returns their number, at least 1."""
  first = next(records, None)
  if first is None:
    raise InputError(f"{INPUT.value}: all {len(bad.messages)} records are bad; nothing is left")
  records = itertools.chain([first], records)
  return formats.write(OUTPUT.value, records) if OUTPUT.value else sum(1 for _ in records)


if __name__ == "__main__":
  cli.run(main)
