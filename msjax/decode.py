"""Lets a trained run read and write: `python -m msjax.decode --workdir=DIR --user=TEXT`.

The text goes into the stream `user`, one token a row, and every row is printed as it is made.
`--at=ROW:STREAM:TEXT` puts text into any input stream from a row on: a word in edgeways.
`--interactive` reads lines while the model writes, `--prompts=FILE` answers a file of prompts, and
`--replay=LOG` makes the rows of a log once more, bit for bit.
"""

import jax
from absl import flags, logging

import msjax
from msjax import cli, mesh
from msjax.decoding import policy
from msjax.decoding.log import Logged
from msjax.decoding.policy import Policy
from msjax.errors import InputError
from msjax.talk import live, prompts
from msjax.talk.conversation import Prompt

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a trained run")
_STEP = flags.DEFINE_string("step", "latest", "checkpoint: steps taken, latest or best")
_USER = flags.DEFINE_string("user", None, "text for the stream user, read from row 0 on")
_AT = flags.DEFINE_multi_string("at", [], "ROW:STREAM:TEXT, text for an input stream; repeatable")
_ROWS = flags.DEFINE_integer(
  "rows", None, "rows to make; by default until all is read and four rows passed in silence"
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  None,
  "of all tokens alike, 0 takes the likeliest; by default words are drawn at 0.8 with top_p 0.95, "
  "and whether to speak as often as in training",
  0.0,
)
_POLICY = flags.DEFINE_multi_string(
  "policy", [], "[STREAM:]NAME=VALUE,... as in think:temperature=0.7,silence.longest=8; repeatable"
)
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn", 0)
_MODEL_CHIPS = flags.DEFINE_integer(
  "model_chips", 1, "chips that share the model's heads and MLP, for one that fits none alone", 1
)
_JSONL = flags.DEFINE_bool("jsonl", False, "print a JSON object a row instead of a table")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, 'JSON lines {"inputs": {STREAM: TEXT}, "at": [[ROW, STREAM, TEXT]], "rows": N}'
)
_OUT = flags.DEFINE_string("out", None, "JSON lines, an answer each; what is there is not redone")
_SESSIONS = flags.DEFINE_integer("sessions", 8, "prompts that are answered side by side", 1)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, "read lines for the stream user, or STREAM: for another, until they end"
)
_LOG = flags.DEFINE_string("log", None, "file that gets the log of the one session")
_REPLAY = flags.DEFINE_string("replay", None, "log to replay")

# Flags that would be given in vain.
_UNREAD = {
  "--prompts": ("user", "at", "rows", "jsonl", "log"),
  "--interactive": ("user", "at", "rows", "out", "sessions"),
  "--replay": ("user", "at", "rows", "temperature", "policy", "seed", "out", "sessions", "log"),
  "the conversation": ("out", "sessions"),
}


def main(_) -> None:
  """Does what one of the modes says; see the module."""
  modes = {"prompts": _PROMPTS, "interactive": _INTERACTIVE, "replay": _REPLAY}
  chosen = [f"--{name}" for name, flag in modes.items() if flag.value]
  if len(chosen) > 1:
    raise InputError(f"{' and '.join(chosen)}: expected one of them")
  mode = chosen[0] if chosen else "the conversation"
  for name in _UNREAD[mode]:
    if flags.FLAGS[name].present:
      raise InputError(f"--{name}: {mode} does not read it; leave it out")
  logged = Logged.read(_REPLAY.value) if _REPLAY.value else None
  workdir, step = _WORKDIR.value, _STEP.value
  if logged and not workdir:
    workdir, step = (logged.header["about"].get(name) for name in ("workdir", "step"))
  if not workdir:
    raise InputError("--workdir: not given; expected the work directory of a trained run")
  at = tuple(_placed(text) for text in _AT.value)
  chips, devices = _MODEL_CHIPS.value, jax.devices()
  if chips > len(devices):
    raise InputError(f"--model_chips: {chips}; there are {len(devices)}")
  with jax.set_mesh(mesh.decode_mesh(chips, devices[:chips])):
    model = msjax.load(workdir, step=step)
    if logged:
      live.replay(model, logged, _JSONL.value)
      return
    base = policy.TALK if _TEMPERATURE.value is None else Policy(_TEMPERATURE.value)
    policies = policy.by_stream(_POLICY.value, model.streams.names, base)
    options = {"policies": policies, "seed": _SEED.value}
    if _PROMPTS.value:
      prompts.answer(model, _PROMPTS.value, _OUT.value, places=_SESSIONS.value, **options)
      return
    step = "latest" if model.step is None else model.step  # of a folder there is but one
    log = live.LogTo(_LOG.value, {"workdir": workdir, "step": step})
    if _INTERACTIVE.value:
      live.interact(model, _JSONL.value, log, **options)
    else:
      prompt = Prompt({} if _USER.value is None else {"user": _USER.value}, at, _ROWS.value)
      live.show(model, prompt, _JSONL.value, log, **options)


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
