"""Makes a work directory of a Hugging Face checkpoint, for `config.init_from` to start from.

python -m msjax.import_hf --from=DIR --streams=user:input,think:internal,output:output --to=WORKDIR
"""

import json
import pathlib

from absl import flags

from msjax import cli
from msjax.errors import InputError
from msjax.hub.import_ import STREAM_INIT, import_checkpoint
from msjax.streams import SAME_ROW
from msjax.workdir import WorkDir

_FROM = flags.DEFINE_string("from", None, "folder with config.json, tokenizer.json, safetensors")
_TO = flags.DEFINE_string("to", None, "work directory to make")
_STREAMS = flags.DEFINE_list(
  "streams", "user:input,output:output", "name:kind or name:kind:weight of each stream"
)
_SAME_ROW = flags.DEFINE_enum("same_row", "hidden", SAME_ROW, "what a cell sees of its own row")
_SKIP_SILENCE = flags.DEFINE_bool("skip_silence", False, "hide silent cells from all others")
_SILENCE = flags.DEFINE_string("silence", None, "silence token, where the usual rule finds none")
_STREAM_INIT = flags.DEFINE_enum(
  "stream_init", "normal", STREAM_INIT, "new stream embeddings: normal (0.02 wide), or zeros"
)
_SEED = flags.DEFINE_integer("seed", 0, "of new stream embeddings", 0)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main(_) -> None:
  """Imports, and prints what came in."""
  for flag in (_FROM, _TO):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; expected a directory")
  imported = import_checkpoint(
    pathlib.Path(_FROM.value).expanduser(),
    WorkDir(_TO.value),
    tuple(_STREAMS.value),
    same_row=_SAME_ROW.value,
    skip_silence=_SKIP_SILENCE.value,
    silence=_SILENCE.value,
    stream_init=_STREAM_INIT.value,
    seed=_SEED.value,
  )
  if _JSON.value:
    print(json.dumps(imported._asdict()))
    return
  print(f"{imported.parameters:,} parameters from {_FROM.value}")
  print(f"silence is {imported.silence!r}, token {imported.silence_id}")
  print(f"stream embeddings: {imported.stream_embedding}")
  for name in imported.unused:
    print(f"unused: {name}")
  print(f"start from it by --config.init_from={_TO.value}")


if __name__ == "__main__":
  cli.run(main)
