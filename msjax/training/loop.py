"""The training loop: one function that reads from top to bottom."""

import contextlib
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from msjax.config import Config
from msjax.data import load as data_lib
from msjax.data import pipeline
from msjax.data.load import Data
from msjax.data.pipeline import Source
from msjax.errors import InputError, RunError
from msjax.text.tokenizer import Tokenizer
from msjax.training.checkpoint import Checkpoints, default_device, load_params
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


class Stopped(RunError):
  """A signal asked the run to end; it is saved and goes on when started again."""

  exit_status = 42
  kind = "stopped"


def train(config: Config, workdir: WorkDir, began: float | None = None) -> Trained:
  """Trains a run to its last step, from wherever it stands.

  It starts from the first of these that exists: the latest checkpoint in `workdir`, the parameters
  of `config.init_from`, fresh random parameters.

  Args:
    config: valid.
    workdir: of the run.
    began: Unix time at which this process began to work for the run; by default now.

  Raises:
    InputError: data, config or work directory are wrong.
    RunError: the loss is not finite, a checkpoint cannot be written, or a signal came (`Stopped`).
  """
  t, began = config.train, time.time() if began is None else began
  if jax.process_count() > 1:
    raise InputError(f"{jax.process_count()} processes: training runs in one so far; start one")
  made_before = workdir.path / "tokenizer.json" if workdir.steps_taken else None
  data = data_lib.load(config, made_before)  # before anything is made in the work directory
  with workdir.lock():
    workdir.claim(config, data.streams, data.tokenizer, data.fingerprints)
    if config.init_from:
      workdir.write_hub_files(WorkDir(config.init_from).hub_files())
    learner = Learner(config, data.streams, data.tokenizer.vocab_size)
    batches = pipeline.training_batches(
      data.train,
      rows=config.data.rows,
      batch=t.batch,
      micro_batches=t.micro_batches,
      pack=config.data.pack,
      seed=t.seed,
      threads=t.read_threads,
    )
    with (
      Goodput(workdir.goodput, began) as goodput,
      Checkpoints(workdir.checkpoints, t.keep) as checkpoints,
      _stop_signals() as stop,
    ):
      state = _start(learner, checkpoints, batches, data.tokenizer)
      start = int(state.step)
      goodput.go_on(start)
      if start >= t.steps:
        logging.info("all %d steps are taken; more by a larger --config.train.steps", start)
      best = checkpoints.best_loss
      trained = [s.name for s in data.streams.streams if s.weight]
      take_step = jax.jit(learner.step, donate_argnums=0)
      peak = peak_flops(jax.local_devices()[:1])
      stacks = workdir.stalls / f"process{jax.process_index()}.txt"
      with (
        Metrics(workdir.metrics, start, t.steps, t.log_every, trained, peak) as metrics,
        Watchdog(stacks, t.stall_seconds) as watchdog,
        Trace(workdir.profile, t.profile_first_step, t.profile_last_step) as trace,
      ):
        clocks = _Clocks(metrics, goodput, watchdog)
        finish = functools.partial(_finish, clocks, data.train, checkpoints)
        running = None  # the step whose scalars have not been read yet
        for step in range(start + 1, t.steps + 1):
          trace.begin(step)
          begun = time.perf_counter()
          with goodput.span("data_wait"):
            batch = dict(next(batches))
          metrics.waited(time.perf_counter() - begun)
          records = batch.pop("record")
          if step == start + 1:
            with goodput.span("compile"), watchdog.paused():
              take_step = take_step.lower(state, batch).compile()
          state, scalars = take_step(state, batch)
          work = batch_work(data.streams, batch["tokens"], batch["segments"])
          flops = training_flops(config.model, learner.vocab_size, work)
          trace.end(step, scalars)
          finish(running)
          running = _Running(step, scalars, records, flops)
          save_now = step == t.steps or step % t.save_every == 0
          evaluate_now = data.valid is not None and (
            step == t.steps or bool(t.eval_every and step % t.eval_every == 0)
          )
          if not (save_now or evaluate_now or stop.is_set()):
            continue
          running = finish(running)  # only a state whose own step was finite is evaluated or saved
          valid_loss = None
          if evaluate_now:
            with goodput.span("evaluation"), watchdog.paused():
              scores = evaluate(learner, state.params, data.valid)
            metrics.write("valid", step, scores)
            valid_loss = scores["loss"]
            if not math.isfinite(valid_loss):
              checkpoints.wait()
              raise RunError(
                f"step {step}: held-out loss {valid_loss}; "
                f"last good checkpoint: {checkpoints.latest_path()}"
              )
            logging.info("step %d  held-out loss %.4f", step, valid_loss)
          is_best = valid_loss is not None and valid_loss < best
          best = valid_loss if is_best else best
          stopping = stop.is_set()  # asked once: who is told that the run is saved, has it saved
          if save_now or is_best or stopping:
            with goodput.span("saves"), watchdog.paused():
              checkpoints.save(step, state, batches, valid_loss)
            goodput.saved(step)
          if stopping:
            logging.info("stopped by a signal: saving step %d", step)
            with goodput.span("saves"), watchdog.paused():
              checkpoints.wait()
            raise Stopped(f"by a signal, saved at step {step}; run again to go on")
        seconds = metrics.seconds
      with goodput.span("saves"):
        checkpoints.wait()
      if stop.is_set():  # asked for while the last step was being saved
        raise Stopped(f"by a signal, saved at step {t.steps}; run again to go on")
  return Trained(learner, state.params, data, seconds)


class _Running(NamedTuple):
  """A dispatched step: its number, its scalars on the device, its batch's record indices and model
  FLOPs."""

  step: int
  scalars: dict[str, jax.Array]
  records: np.ndarray
  flops: float


class _Clocks(NamedTuple):
  """Who is told that a step has ended."""

  metrics: Metrics
  goodput: Goodput
  watchdog: Watchdog

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
  raise RunError(
    f"step {running.step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; "
    f"last good checkpoint: {checkpoints.latest_path()}; the batch's records: {listed}"
  )


def _start(learner: Learner, checkpoints: Checkpoints, batches, tokenizer: Tokenizer) -> TrainState:
  """Restores, takes over or draws the first state; places `batches` where the state was saved."""
  config = learner.config
  key = jax.random.key(config.train.seed)
  if checkpoints.latest is not None:
    state = checkpoints.restore(jax.eval_shape(learner.init, key), batches)
    logging.info("going on from step %d", int(state.step))
    return state
  # Bound to the device as a restored state is, so that a run that goes on runs the same program.
  state = jax.jit(learner.init, out_shardings=default_device())(key)
  if config.init_from:
    params = _taken_over(learner, state.params, tokenizer, WorkDir(config.init_from))
    state = TrainState(state.step, params, learner.tx.init(params))
  count = sum(p.size for p in jax.tree.leaves(state.params))
  logging.info(
    "%s parameters on one of %d %s devices",
    *(f"{count:,}", jax.device_count(), jax.default_backend()),
  )
  return state


def _taken_over(learner: Learner, fresh: Params, tokenizer: Tokenizer, other: WorkDir) -> Params:
  """Returns another run's parameters; streams go by name, new ones keep fresh embeddings."""
  vocabulary, streams = other.tokenizer(), other.streams()
  if vocabulary.to_json() != tokenizer.to_json():
    raise InputError(
      f"config.init_from: the vocabulary of {other.path} ({vocabulary.vocab_size} tokens) is not "
      f"this run's ({tokenizer.vocab_size}); take its tokenizer by --config.data.tokenizer="
      f"{other.path / 'tokenizer.json'}"
    )
  if streams.silence_id != learner.streams.silence_id:
    raise InputError(
      f"config.init_from: silence is token {streams.silence_id} in {other.path} and token "
      f"{learner.streams.silence_id} in this run; set config.data.silence to the former"
    )
  for field in ("same_row", "skip_silence"):
    was, now = getattr(streams, field), getattr(learner.streams, field)
    if was != now:
      logging.info("config.%s: %r in %s, %r here", field, was, other.path, now)
  params = load_params(other.checkpoints, None)
  old, embed = np.asarray(params["stream_embed"]), np.array(fresh["stream_embed"])
  shapes = lambda tree: {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if "stream_embed" not in jax.tree_util.keystr(path)
  }
  theirs, ours = shapes(params), shapes(fresh)
  if theirs != ours:
    name = next(n for n in sorted(theirs | ours) if theirs.get(n) != ours.get(n))
    raise InputError(
      f"config.init_from: {other.path} has {name} of shape {theirs.get(name)}, this run's "
      f"config.model makes {ours.get(name)}; take the model fields of its config.json"
    )
  for i, name in enumerate(learner.streams.names):
    if name in streams.names:
      embed[i] = old[streams.id(name)]
    else:
      logging.info("stream %s is new: its embedding starts random", name)
  logging.info("starting from the parameters of %s", other.path)
  return jax.tree.map(jnp.asarray, {**params, "stream_embed": embed})


def evaluate(learner: Learner, params: Params, source: Source) -> dict[str, float]:
  """Returns the held-out means that `summarize` makes, over `config.train.eval_batches`."""
  t, d = learner.config.train, learner.config.data
  size, limit = t.batch // t.micro_batches, t.eval_batches * t.micro_batches or None
  batches = pipeline.held_out_batches(source, rows=d.rows, batch=size, pack=d.pack)
  score = _jitted(learner)
  sums = None
  for batch in itertools.islice(batches, limit):
    part = score(params, {k: v for k, v in batch.items() if k != "record"})
    sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
  scores = summarize(sums, learner.streams)
  return {name: float(value) for name, value in scores.items() if name != "cells"}


@functools.lru_cache(maxsize=4)
def _jitted(learner: Learner):
  """Compiles evaluation once a run."""
  return jax.jit(learner.evaluate)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
  """An event that SIGTERM and Ctrl-C set; a second one takes effect as ever.

  Their handler logs nothing: it may run in the middle of a log line, whose locks it would need.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked  # only the main thread may handle signals
    return
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

  def ask(number, _):
    asked.set()
    os.write(2, b"stopping: this step is taken and saved first\n")
    signal.signal(number, before[number])

  for s in before:
    signal.signal(s, ask)
  try:
    yield asked
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)
