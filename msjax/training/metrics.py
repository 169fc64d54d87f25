"""What a run says of itself: a log line, JSON lines and TensorBoard events, every N steps.

Scalars stay on the device until the next step has been dispatched, so the device never waits for
the host to read a loss.
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import rich.progress
from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from msjax.errors import InputError, RunError
from msjax.files import replacing

FORMAT_VERSION = 1


class Metrics:
  """Writes the metrics of one run; a context manager."""

  def __init__(
    self,
    path: pathlib.Path | None,
    start: int,
    steps: int,
    log_every: int,
    names: Sequence[str],
    peak_flops: float | None = None,
  ):
    """Opens `path` (JSON lines) and TensorBoard events beside it; log lines name these streams.

    Lines of later steps than `start`, left by a run that was killed after its last checkpoint, are
    cut off: those steps are going to be taken again. Without a path nothing is written or logged:
    of many processes one does. `peak_flops` is what the devices could do in a second, for `mfu`;
    None where that is not known.
    """
    self.steps, self.log_every, self.names = steps, log_every, names
    self.peak_flops = peak_flops
    before = _truncate(path, start) if path else {}
    self._files = _Files(path, start) if path else None
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      console=rich.console.Console(stderr=True),
      disable=not (path and sys.stderr.isatty()),
      transient=True,
    )
    self._log = logging.get_absl_handler().python_handler
    self._task = self._progress.add_task("steps", total=steps, completed=start)
    self._start, self._begun = start, time.perf_counter()
    self._seconds_before = before.get("seconds", 0.0)
    self._begin_interval(start, self._begun)

  def __enter__(self) -> "Metrics":
    """Starts the progress bar where there is a terminal; log lines then go above it."""
    self._progress.start()  # puts something in the place of sys.stderr that knows of the bar
    self._log_stream = self._log.stream
    self._log.setStream(sys.stderr)
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Closes files; a disk that was full before and still is tells nothing new."""
    self._progress.stop()
    self._log.setStream(self._log_stream)
    if self._files:
      with contextlib.suppress(*(() if kind is None else (OSError,))):
        self._files.close()

  @property
  def seconds(self) -> float:
    """Time spent training so far, over all restarts, as far as it was logged."""
    return self._seconds_before + time.perf_counter() - self._begun

  def waited(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._data_wait += seconds

  def worked(self, flops: float) -> None:
    """Counts the model FLOPs of a step that has ended, before `step` takes its scalars."""
    self._flops += flops

  def due(self, step: int) -> bool:
    """Whether a line is written after this step."""
    return step % self.log_every == 0 or step == self.steps

  def step(self, step: int, scalars: dict[str, jax.Array]) -> dict[str, float]:
    """Takes the scalars of the step that ended as number `step`; returns them as floats."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    self._cells += values.pop("cells")
    self._progress.update(self._task, completed=step)
    if self.due(step):
      now = time.perf_counter()
      taken = max(step - self._since, 1)
      seconds = now - self._interval_begun
      timing = {
        "tokens_per_second": self._cells / seconds,
        "step_seconds": seconds / taken,
        "data_wait_seconds": self._data_wait / taken,
        "seconds": self.seconds,
      }
      if self.peak_flops:
        timing["mfu"] = self._flops / seconds / self.peak_flops
      if self._files:
        self._files.write("train", step, {**values, **timing})
        self._say(step, values, timing, now)
      self._begin_interval(step, now)
    return values

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Appends one JSON line and the same to TensorBoard."""
    if self._files:
      self._files.write(kind, step, values)

  def _begin_interval(self, step: int, now: float) -> None:
    """From one line to the next."""
    self._since, self._interval_begun = step, now
    self._data_wait = self._cells = self._flops = 0.0

  def _say(self, step, values, timing, now) -> None:
    eta = (now - self._begun) / max(step - self._start, 1) * (self.steps - step)
    streams = " ".join(f"{name} {values[f'loss/{name}']:.4f}" for name in self.names)
    logging.info(
      "step %d/%d  eta %s  loss %.4f (%s)  |g| %.3g  lr %.3g  %s tokens/s  %.1f ms/step"
      "  data wait %.1f ms%s",
      *(step, self.steps, _clock(eta), values["loss"], streams),
      *(values["gradient_norm"], values["learning_rate"]),
      f"{timing['tokens_per_second']:,.0f}",
      timing["step_seconds"] * 1e3,
      timing["data_wait_seconds"] * 1e3,
      f"  mfu {timing['mfu']:.1%}" if "mfu" in timing else "",
    )


class _Files:
  """JSON lines and TensorBoard events."""

  def __init__(self, path: pathlib.Path, start: int):
    """Opens them where a run goes on after step `start`."""
    self.path = path
    self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close
    board = path.parent / "tensorboard"
    board.mkdir(exist_ok=True)
    # The thread of a SummaryWriter would die of a full disk and leave its queue to block.
    self._board = EventsWriter(str(board / "events"))
    restart = SessionLog(status=SessionLog.START)  # makes TensorBoard forget later steps
    self._board.write_event(Event(wall_time=time.time(), step=start + 1, session_log=restart))

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Appends one line and the same events."""
    known = {n: v if math.isfinite(v) else None for n, v in values.items()}  # JSON has no NaN
    line = {"format_version": FORMAT_VERSION, "kind": kind, "step": step, **known}
    try:
      self._lines.write(json.dumps(line) + "\n")
      self._lines.flush()
      for name, value in values.items():
        summary = scalar(f"{kind}/{name}", value)
        self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
      self._board.flush()
    except OSError as error:
      raise RunError(f"{self.path.parent}: metrics cannot be written: {error.strerror}") from error

  def close(self) -> None:
    """Closes both, the second too if the first cannot be."""
    try:
      self._lines.close()
    finally:
      self._board.close()


def _truncate(path: pathlib.Path, step: int) -> dict[str, Any]:
  """Keeps the whole lines of steps up to `step`; returns the last one of training, or {}."""
  if not path.exists():
    return {}
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
  whole = [line for line in lines if line.endswith("\n")]  # the last may have been cut short
  try:
    parsed = [json.loads(line) for line in whole]
    kept = [line for line, values in zip(whole, parsed) if values["step"] <= step]
    trained = [v for v in parsed if v["kind"] == "train" and v["step"] <= step]
  except (ValueError, KeyError, TypeError):
    raise InputError(f"{path}: holds a line that msjax did not write; move it away") from None
  if len(kept) < len(lines):
    with replacing(path) as file:
      file.write("".join(kept).encode())
  return trained[-1] if trained else {}


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(math.ceil(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
