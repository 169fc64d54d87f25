"""Makes a Hugging Face folder of a trained run.

python -m msjax.export_hf --workdir=DIR --to=OUT --verify
"""

import json
import pathlib

import jax
from absl import flags, logging

import msjax
from msjax import cli
from msjax.errors import InputError, RunError
from msjax.hub.export import DTYPES, LAYOUTS, export, open_run
from msjax.hub.verify import Verified, verify
from msjax.workdir import WorkDir

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a trained run")
_STEP = flags.DEFINE_string("step", "latest", "checkpoint: steps taken, latest or best")
_TO = flags.DEFINE_string("to", None, "folder to make")
_LAYOUT = flags.DEFINE_enum(
  "layout",
  "stream",
  LAYOUTS,
  "stream: with the stream embedding; folded: one stream, plain; reference: the official release's",
)
_STREAM = flags.DEFINE_string("stream", None, "the stream that a folded model speaks")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "of the tensors")
_SHARD_SIZE = flags.DEFINE_float("shard_size", 5.0, "gigabytes of one file, at most", 1e-6)
_VERIFY = flags.DEFINE_bool("verify", False, "load what was written and compare logits")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main(_) -> None:
  """Exports, and compares if it is asked to."""
  for flag in (_WORKDIR, _TO):
    if not flag.value:
      raise InputError(f"--{flag.name}: not given; expected a directory")
  if jax.process_count() > 1:
    raise InputError(f"{jax.process_count()} processes: exporting is done by one; start one")
  workdir, target = WorkDir(_WORKDIR.value), pathlib.Path(_TO.value).expanduser()
  run = open_run(workdir, _STEP.value)
  export(
    run,
    target,
    layout=_LAYOUT.value,
    stream=_STREAM.value,
    dtype=_DTYPE.value,
    shard_bytes=int(_SHARD_SIZE.value * 1e9),
    files=workdir.hub_files(),
    step=run.step,
  )
  told = {"folder": str(target), "layout": _LAYOUT.value, "dtype": _DTYPE.value}
  verified = None
  if _VERIFY.value:
    verified = verify(msjax.load(workdir.path, step=run.step), target)
  if _JSON.value:
    print(json.dumps({**told, **(verified._asdict() if verified else {})}))
  else:
    print(f"{target}: layout {_LAYOUT.value}, {_DTYPE.value}")
    if verified:
      print(_sentence(verified))
  if verified and not verified.good:
    raise RunError(f"{target}: does not compute what {_WORKDIR.value} does: {_sentence(verified)}")


def _sentence(v: Verified) -> str:
  return (
    f"logits differ by {v.max_difference:.2g} at most, the likeliest token is the same in "
    f"{v.same_likeliest:.2%} of {v.cells} cells, KL divergence {v.kl:.2g}; {v.beyond_rounding:.2g} "
    f"at most is not explained by rounding"
  )


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  cli.run(main)
