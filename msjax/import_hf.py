"""Makes a work directory of a Hugging Face checkpoint, for `config.init_from` to start from.

python -m msjax.import_hf --from=DIR --streams=user,think,output --to=WORKDIR
"""

import json

import jax
from absl import flags

from msjax import cli
from msjax.errors import InputError
from msjax.hub.import_ import STREAM_INIT, check_target, fetched, import_checkpoint, read_checkpoint
from msjax.streams import KINDS, SAME_ROW
from msjax.workdir import WorkDir

_FROM = flags.DEFINE_string(
  "from", None, "folder with config.json, tokenizer.json and safetensors; FILE.gguf; or a hub id"
)
_TO = flags.DEFINE_string("to", None, "work directory to make")
_STREAMS = flags.DEFINE_list(
  "streams",
  [],
  "usual names (user, think, output), name:kind or name:kind:weight; by default the checkpoint's",
)
_SAME_ROW = flags.DEFINE_enum(
  "same_row",
  None,
  SAME_ROW,
  "what a cell sees of its own row; by default the checkpoint's, or hidden",
)
_SKIP_SILENCE = flags.DEFINE_bool("skip_silence", None, "hide silent cells from all others")
_SILENCE = flags.DEFINE_string("silence", None, "silence token, where the usual rule finds none")
_END = flags.DEFINE_string("end", None, "token that ends a message, where no usual one is there")
_STREAM_INIT = flags.DEFINE_enum(
  "stream_init", "normal", STREAM_INIT, "new stream embeddings: normal (0.02 wide), or zeros"
)
_SEED = flags.DEFINE_integer("seed", 0, "of new stream embeddings", 0)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


# Kinds of streams that are given by their usual names alone.
_KINDS = {
  **dict.fromkeys(("user", "human", "tool", "tools"), "input"),
  **dict.fromkeys(("think", "thought", "thoughts"), "internal"),
  **dict.fromkeys(("output", "assistant", "text"), "output"),
}


def _spec(stream: str) -> str:
  """Adds the kind to a usual name."""
  if ":" in stream:
    return stream
  if stream not in _KINDS:
    raise InputError(
      f"--streams: {stream!r} is none of {', '.join(_KINDS)}, whose kinds are known; expected "
      f"{stream}:KIND, {' or '.join(KINDS)}"
    )
  return f"{stream}:{_KINDS[stream]}"


def main(_) -> None:
  """Imports, and prints what came in."""
  for flag in (_FROM, _TO):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; expected {flag.help}")
  if jax.process_count() > 1:
    raise InputError(f"{jax.process_count()} processes: importing is done by one; start one")
  workdir = WorkDir(_TO.value)
  check_target(workdir)  # before minutes of reading
  checkpoint = read_checkpoint(
    fetched(_FROM.value),
    tuple(map(_spec, _STREAMS.value)) or None,
    same_row=_SAME_ROW.value,
    skip_silence=_SKIP_SILENCE.value,
    silence=_SILENCE.value,
    end=_END.value,
    stream_init=_STREAM_INIT.value,
    seed=_SEED.value,
    place=jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0]),
  )
  import_checkpoint(checkpoint, workdir)
  told = {
    "parameters": sum(p.size for p in jax.tree.leaves(checkpoint.params)),
    "streams": checkpoint.streams.names,
    "silence": checkpoint.tokenizer.name(checkpoint.streams.silence_id),
    "silence_id": checkpoint.streams.silence_id,
    "stream_embedding": checkpoint.stream_embedding,
    "unused": checkpoint.unused,
  }
  if _JSON.value:
    print(json.dumps(told))
    return
  print(f"{told['parameters']:,} parameters from {_FROM.value}")
  print(f"streams {', '.join(told['streams'])}; their embeddings: {told['stream_embedding']}")
  print(f"silence is {told['silence']!r}, token {told['silence_id']}")
  for name in told["unused"]:
    print(f"unused: {name}")
  print(f"start from it by --config.init_from={_TO.value}")


if __name__ == "__main__":
  cli.run(main)
