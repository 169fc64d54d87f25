"""The training loop: one function that reads from top to bottom."""

import contextlib
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from msjax import mesh, processes, sharding
from msjax.config import Config
from msjax.data import load as data_lib
from msjax.data import pipeline
from msjax.data.load import Data
from msjax.data.pipeline import Source
from msjax.errors import RunError, Stopped
from msjax.training import stored
from msjax.training.begin import first_state, program
from msjax.training.checkpoint import Checkpoints
from msjax.training.flops import batch_work, peak_flops, training_flops
from msjax.training.goodput import Goodput
from msjax.training.metrics import Metrics
from msjax.training.state import Learner, Params, TrainState, summarize
from msjax.training.trace import Trace
from msjax.training.watchdog import Watchdog
from msjax.workdir import WorkDir


class Trained(NamedTuple):
  """What a finished run leaves in memory.

  Attributes:
    learner: its static half.
    params: at the last step.
    data: what it read.
    seconds: spent in the loop, over all restarts; compilation, evaluation and saving included.
  """

  learner: Learner
  params: Params
  data: Data
  seconds: float

  def on_one_device(self) -> "Trained":
    """Returns the same with parameters that lie together."""
    return self._replace(params=jax.device_put(self.params, jax.local_devices()[0]))


def train(
  config: Config,
  workdir: WorkDir,
  began: float | None = None,
  compiled: str | os.PathLike | None = None,
) -> Trained:
  """Trains a run to its last step, from wherever it stands.

  It starts from the first of these that exists: the latest checkpoint in `workdir`, the parameters
  of `config.init_from`, fresh random parameters.

  Args:
    config: valid.
    workdir: of the run.
    began: Unix time at which this process began to work for the run; by default now.
    compiled: file with the compiled step (`stored.save`); None to compile it.

  Raises:
    InputError: data, config or work directory are wrong.
    RunError: the loss is not finite, a checkpoint cannot be written, or a signal came (`Stopped`).
  """
  began = time.time() if began is None else began
  with jax.set_mesh(mesh.make_mesh(config.mesh)), contextlib.ExitStack() as stack:
    mesh.check(config.model, config.train)
    processes.agree("config", config.to_json())
    made_before = workdir.path / "tokenizer.json" if workdir.steps_taken else None
    data = data_lib.load(config, made_before)  # before anything is made in the work directory
    processes.agree("the digest of config.data", data.fingerprints)
    claim = lambda: stack.enter_context(_claimed(config, workdir, data))
    workdir.check_shared(processes.first_does("the work directory", claim))
    processes.sync("the work directory is shared")
    return _train(config, workdir, data, began, compiled)


@contextlib.contextmanager
def _claimed(config: Config, workdir: WorkDir, data: Data) -> Iterator[str]:
  """Holds the work directory, with the files in it that say what the run is; gives its mark."""
  with workdir.lock():
    workdir.claim(config, data.streams, data.tokenizer, data.fingerprints)
    if config.init_from:
      workdir.write_hub_files(WorkDir(config.init_from).hub_files())
    yield workdir.mark()


def _train(
  config: Config,
  workdir: WorkDir,
  data: Data,
  began: float,
  compiled: str | os.PathLike | None,
) -> Trained:
  """Takes the steps that are not taken yet, on the mesh in use."""
  t = config.train
  learner = Learner(config, data.streams, data.tokenizer.vocab_size)
  sequences = t.batch // t.micro_batches
  here = sharding.rows_here(sequences)
  batches = pipeline.training_batches(
    data.train,
    rows=config.data.rows,
    batch=t.batch,
    micro_batches=t.micro_batches,
    pack=config.data.pack,
    seed=t.seed,
    threads=t.read_threads,
    local=here,
  )
  with (
    Goodput(workdir.goodput, began) as goodput,
    Checkpoints(workdir.checkpoints, t.keep) as checkpoints,
    Watchdog(workdir.stalls / f"process{jax.process_index()}.txt", t.stall_seconds) as watchdog,
    _stop_signals() as stop_asked,
  ):
    with watchdog.patient():
      state = first_state(learner, checkpoints, batches, data.tokenizer)
    start = int(state.step)
    goodput.go_on(start)
    if start >= t.steps:
      logging.info("all %d steps are taken; more by a larger --config.train.steps", start)
    best = checkpoints.best_loss
    trained = [s.name for s in data.streams.streams if s.weight]
    path, peak = workdir.metrics if processes.is_first() else None, peak_flops(jax.devices())
    with (
      Metrics(path, start, t.steps, t.log_every, trained, peak) as metrics,
      Trace(workdir.profile, t.profile_first_step, t.profile_last_step) as trace,
    ):
      clocks = _Clocks(metrics, goodput, watchdog)
      finish = functools.partial(_finish, clocks, data.train, checkpoints)
      take_step, step, stopping = None, start, False
      running = None  # the step whose scalars have not been read yet
      for step in range(start + 1, t.steps + 1):
        trace.begin(step)
        with clocks.waiting():
          ours = next(batches)
        records = ours.pop("record")
        batch = sharding.joined(ours, 1, sequences)
        if take_step is None:
          with clocks.busy("compile"):
            take_step = _step(learner, state, batch, compiled)
        state, scalars = take_step(state, batch)
        # Worked out while the devices work; what this process holds stands for all.
        work = batch_work(data.streams, ours["tokens"], ours["segments"])
        flops = training_flops(config.model, learner.vocab_size, work) * sequences / len(here)
        trace.end(step, scalars)
        finish(running)
        running = _Running(step, scalars, records, flops)
        valid_loss, is_best = None, False
        if data.valid is not None and _due(step, t.eval_every, t.steps):
          running = finish(running)  # only a state whose own step was finite is evaluated or saved
          with clocks.busy("evaluation"):
            valid_loss = _held_out_loss(learner, state, data.valid, metrics, checkpoints)
          is_best = valid_loss < best
          best = min(valid_loss, best)
        stopping = stop_asked()  # once a step: who is told that the run is saved, has it saved
        if is_best or stopping or _due(step, t.save_every, t.steps):
          running = finish(running)
          with clocks.busy("saves"):
            checkpoints.save(step, state, batches, valid_loss)
          goodput.saved(step)
        if stopping:
          logging.info("stopped by a signal: saving step %d", step)
          break
      seconds = metrics.seconds
      with clocks.busy("saves"):
        checkpoints.wait()
    if stopping or stop_asked():  # asked for while the last step was being saved
      raise Stopped(f"by a signal, saved at step {step}; run again to go on")
  return Trained(learner, state.params, data, seconds)


def _step(
  learner: Learner,
  state: TrainState,
  batch: dict[str, jax.Array],
  compiled: str | os.PathLike | None,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles the training step, or loads it from a file."""
  chosen = stored.load(compiled, learner) if compiled else program(learner, state, batch)
  logging.info("kept for the backward pass: %s", chosen.remat)
  return chosen.step


def _due(step: int, every: int, last: int) -> bool:
  """Whether what is done every so many steps (0: never), and after the last, is done after this."""
  return step == last or bool(every and step % every == 0)


class _Running(NamedTuple):
  """A dispatched step: its number, its scalars on the device, its batch's record indices and model
  FLOPs."""

  step: int
  scalars: dict[str, jax.Array]
  records: np.ndarray
  flops: float


class _Clocks(NamedTuple):
  """Who is told what the run is doing, and that a step has ended."""

  metrics: Metrics
  goodput: Goodput
  watchdog: Watchdog

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The run waits for data in this block."""
    since = time.perf_counter()
    with self.goodput.span("data_wait"):
      yield
    self.metrics.waited(time.perf_counter() - since)

  @contextlib.contextmanager
  def busy(self, activity: str) -> Iterator[None]:
    """No step ends in this block, which is for one of `goodput.ACTIVITIES`."""
    with self.goodput.span(activity), self.watchdog.patient():
      yield

  def step(self, running: _Running) -> dict[str, float]:
    """Reads the scalars of a step, which waits for its end."""
    self.metrics.worked(running.flops)
    values = self.metrics.step(running.step, running.scalars)
    self.watchdog.step(running.step)
    self.goodput.step(running.step)
    if self.metrics.due(running.step):
      self.goodput.write()
    return values


def _finish(
  clocks: _Clocks, source: Source, checkpoints: Checkpoints, running: _Running | None
) -> None:
  """Reads the scalars of a step; a loss or gradient that is not finite ends the run."""
  if running is None:
    return
  values = clocks.step(running)
  if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
    return
  checkpoints.wait()  # the one in flight is good, and may take the place of an older one
  names = [source.record_id(int(i)) for i in np.unique(running.records) if i >= 0]
  listed = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
  here = f" in process {jax.process_index()}" if jax.process_count() > 1 else ""
  raise RunError(
    f"step {running.step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; "
    f"last good checkpoint: {checkpoints.latest_path()}; the batch's records"
    f"{here}: {listed}"
  )


def _held_out_loss(
  learner: Learner,
  state: TrainState,
  source: Source,
  metrics: Metrics,
  checkpoints: Checkpoints,
) -> float:
  """Evaluates a state and writes what comes out; a loss that is not finite ends the run."""
  step, scores = int(state.step), evaluate(learner, state.params, source)
  metrics.write("valid", step, scores)
  loss = scores["loss"]
  if not math.isfinite(loss):
    checkpoints.wait()
    raise RunError(
      f"step {step}: held-out loss {loss}; last good checkpoint: {checkpoints.latest_path()}"
    )
  logging.info("step %d  held-out loss %.4f", step, loss)
  return loss


def evaluate(learner: Learner, params: Params, source: Source) -> dict[str, float]:
  """Returns the held-out means that `summarize` makes, over `config.train.eval_batches`."""
  t, d = learner.config.train, learner.config.data
  size, limit = t.batch // t.micro_batches, t.eval_batches * t.micro_batches or None
  here = sharding.rows_here(size)
  batches = pipeline.held_out_batches(source, rows=d.rows, batch=size, pack=d.pack, local=here)
  score = _jitted(learner)
  sums = None
  for batch in itertools.islice(batches, limit):
    del batch["record"]
    part = score(params, sharding.joined(batch, 0, size))
    sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
  scores = summarize(sums, learner.streams)
  return {name: float(value) for name, value in scores.items() if name != "cells"}


@functools.lru_cache(maxsize=4)
def _jitted(learner: Learner):
  """Compiles evaluation once a run."""
  return jax.jit(learner.evaluate)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
  """A function that tells whether a signal has asked to stop.

  Of many processes one is enough to be told: JAX tells all of them, by SIGTERM; Ctrl-C is made
  into that. A process that is alone listens itself, to both; a second signal takes effect as ever.
  The handler logs nothing: it may run in the middle of a log line, whose locks it would need.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False  # only the main thread may handle signals
    return
  asked, many = threading.Event(), jax.process_count() > 1
  heard = (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT)
  before = {s: signal.getsignal(s) for s in heard}

  def ask(number, _):
    asked.set()
    os.write(2, b"stopping: this step is taken and saved first\n")
    signal.signal(number, before[number])
    if many:
      os.kill(os.getpid(), signal.SIGTERM)

  for s in before:
    signal.signal(s, ask)
  try:
    yield processes.stop_asked if many else asked.is_set
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)
