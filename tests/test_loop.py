import json
import logging
import os
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from msjax.data import load
from msjax.errors import InputError, RunError
from msjax.text.hf_tokenizer import train_bpe
from msjax.training import loop
from msjax.training.checkpoint import Checkpoints, load_params
from msjax.training.goodput import read
from msjax.training.loop import Stopped, train
from msjax.training.metrics import Metrics
from msjax.training.state import Learner, TrainState
from msjax.workdir import WorkDir

SMALL = ModelConfig(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8)


pytestmark = pytest.mark.usefixtures("compiled_once")  # most runs are of the same few programs


def arithmetic(**changes):
  """A run of 6 steps that saves every second and evaluates at the end."""
  config = Config(
    streams=("user:input", "think:internal", "output:output"),
    model=SMALL,
    data=DataConfig(source="arithmetic", rows=8, min_ops=2, max_ops=4, end_token=False),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(steps=6, batch=4, eval_batches=2, save_every=2, log_every=1),
  )
  return config.changed({name.replace("__", "."): value for name, value in changes.items()})


def tables(path, lengths=(3, 5, 2, 7, 4, 6, 2), streams=2):
  """Writes random tables of so many rows; returns the file's name."""
  rng = np.random.default_rng(0)
  with path.open("w") as file:
    for index, rows in enumerate(lengths):
      ids = rng.integers(0, 256, (streams, rows)).tolist()
      file.write(json.dumps({"id": f"table-{index}", "num_rows": rows, "token_ids": ids}) + "\n")
  return str(path)


def packed(path, **changes):
  """A run with everything whose position or random state a restart could lose."""
  config = Config(
    model=SMALL,
    data=DataConfig(train=tables(path), rows=8, pack=True),
    optim=OptimConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2),
    train=TrainConfig(steps=6, batch=4, micro_batches=2, save_every=2, log_every=1),
  )
  config.model.attention_dropout = 0.25
  return config.changed({name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture
def light_step(monkeypatch):
  """A step that takes no time to compile; it moves every parameter by what is in the batch.

  Evaluation is left out.
  """

  def step(self, state, batch):
    moved = jax.tree.map(lambda p: p + 1e-6 * batch["tokens"].sum(), state.params)
    zero = jnp.float32(0)
    scalars = {"loss": batch["weights"].sum(), "gradient_norm": zero, "learning_rate": zero}
    streams = {f"loss/{name}": zero for name in self.streams.names}
    return TrainState(state.step + 1, moved, state.opt_state), {**scalars, **streams, "cells": zero}

  monkeypatch.setattr(Learner, "step", step)
  monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": 1.0})


def stopping(monkeypatch, at, number=signal.SIGTERM):
  """Sends a signal as soon as the scalars of step `at` are read, once."""
  read, sent = Metrics.step, []

  def step(self, step, scalars):
    if step == at and not sent:
      sent.append(os.kill(os.getpid(), number))
    return read(self, step, scalars)

  monkeypatch.setattr(Metrics, "step", step)


def equal(a, b):
  """Whether two trees of parameters are the same, bit for bit."""
  same = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes()
  return all(jax.tree.leaves(jax.tree.map(same, a, b)))


def lines(workdir):
  return [json.loads(line) for line in workdir.metrics.read_text().splitlines()]


def steps_of(workdir, kind="train"):
  return [line["step"] for line in lines(workdir) if line["kind"] == kind]


def saved_steps(workdir):
  return sorted(int(path.name) for path in workdir.checkpoints.iterdir())


# Going on.


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_very_same_parameters(tmp_path, monkeypatch):
  config = packed(tmp_path / "train.jsonl")
  whole, stopped = WorkDir(tmp_path / "whole"), WorkDir(tmp_path / "stopped")
  expected = train(config, whole)
  stopping(monkeypatch, at=3)
  with pytest.raises(Stopped, match="by a signal, saved at step 4; run again to go on"):
    train(config, stopped)
  assert saved_steps(stopped)[-1] == 4
  again = train(config, stopped)
  assert equal(again.params, expected.params)
  assert equal(load_params(stopped.checkpoints, None), expected.params)
  timeless = lambda line: {k: v for k, v in line.items() if "second" not in k}
  assert list(map(timeless, lines(stopped))) == list(map(timeless, lines(whole)))
  assert steps_of(stopped) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("light_step")
def test_either_signal_saves_and_ends_with_a_status_of_its_own(tmp_path, monkeypatch, number):
  stopping(monkeypatch, at=1, number=number)
  with pytest.raises(Stopped, match="saved at step 2;") as caught:
    train(arithmetic(train__save_every=100), WorkDir(tmp_path))
  assert caught.value.exit_status == 42
  assert saved_steps(WorkDir(tmp_path)) == [2]


def test_a_run_whose_lines_outran_its_checkpoint_takes_those_steps_again(
  tmp_path, monkeypatch, light_step
):
  config, workdir = arithmetic(train__save_every=4), WorkDir(tmp_path / "run")
  read = Metrics.step

  def step(self, step, scalars):
    values = read(self, step, scalars)
    if step == 6:
      raise KeyboardInterrupt  # as good as a kill: nothing is saved
    return values

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Metrics, "step", step)
    train(config, workdir)
  assert (saved_steps(workdir), steps_of(workdir)) == ([4], [1, 2, 3, 4, 5, 6])
  again = train(config, workdir)
  assert steps_of(workdir) == [1, 2, 3, 4, 5, 6]
  assert equal(again.params, train(config, WorkDir(tmp_path / "whole")).params)


@pytest.mark.usefixtures("light_step")
def test_a_signal_during_evaluation_ends_in_a_checkpoint_of_that_step(tmp_path, monkeypatch):
  config, workdir = arithmetic(train__eval_every=3, train__save_every=5), WorkDir(tmp_path)
  monkeypatch.setattr(
    loop, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {"loss": 9}
  )
  with pytest.raises(Stopped, match="saved at step 3;"):
    train(config, workdir)
  assert saved_steps(workdir) == [3]


@pytest.mark.usefixtures("light_step")
def test_a_signal_in_the_last_step_is_not_forgotten(tmp_path, monkeypatch):
  stopping(monkeypatch, at=6)
  with pytest.raises(Stopped, match="saved at step 6;"):
    train(arithmetic(), WorkDir(tmp_path))
  assert train(arithmetic(), WorkDir(tmp_path)).params


@pytest.mark.usefixtures("light_step")
def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch):
  wait = Checkpoints.wait

  def stopped_at_the_end(self):
    if self._writing is not None and self.latest == 4:  # 6 is being written
      os.kill(os.getpid(), signal.SIGTERM)
    wait(self)

  monkeypatch.setattr(Checkpoints, "wait", stopped_at_the_end)
  with pytest.raises(Stopped, match="saved at step 6;"):
    train(arithmetic(), WorkDir(tmp_path))
  assert saved_steps(WorkDir(tmp_path))[-1] == 6


@pytest.mark.usefixtures("light_step")
def test_a_held_out_loss_that_is_not_finite_ends_the_run_unsaved(tmp_path, monkeypatch):
  losses = iter([1.0, float("nan")])
  monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
  config = arithmetic(train__eval_every=2, train__save_every=100)
  with pytest.raises(RunError, match=r"step 4: held-out loss nan; last good checkpoint: .*/2$"):
    train(config, WorkDir(tmp_path))
  assert saved_steps(WorkDir(tmp_path)) == [2]


@pytest.mark.usefixtures("light_step")
def test_signals_mean_again_what_they_did_before(tmp_path, monkeypatch):
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  stopping(monkeypatch, at=1)
  with pytest.raises(Stopped):
    train(arithmetic(), WorkDir(tmp_path))
  assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.usefixtures("light_step")
def test_a_second_signal_takes_effect_at_once(tmp_path, monkeypatch):
  stopping(monkeypatch, at=1, number=signal.SIGINT)
  interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)
  monkeypatch.setattr(Checkpoints, "save", interrupt)
  with pytest.raises(KeyboardInterrupt):
    train(arithmetic(), WorkDir(tmp_path))


@pytest.mark.usefixtures("light_step")
def test_a_thread_that_may_not_handle_signals_trains_all_the_same(tmp_path):
  done = []
  thread = threading.Thread(target=lambda: done.append(train(arithmetic(), WorkDir(tmp_path))))
  thread.start()
  thread.join(timeout=120)
  assert done and saved_steps(WorkDir(tmp_path))[-1] == 6


@pytest.mark.usefixtures("light_step")
def test_a_finished_run_is_read_and_not_trained(tmp_path):
  workdir = WorkDir(tmp_path)
  first = train(arithmetic(), workdir)
  before = lines(workdir)
  again = train(arithmetic(), workdir)
  assert equal(again.params, first.params)
  assert lines(workdir) == before
  assert again.seconds >= before[-2]["seconds"]


@pytest.mark.usefixtures("light_step")
def test_more_steps_and_other_rates_go_on_and_are_logged(tmp_path, caplog):
  caplog.set_level(logging.INFO, "absl")
  workdir = WorkDir(tmp_path / "run")
  train(packed(tmp_path / "train.jsonl", optim__schedule="constant"), workdir)
  changes = {"steps": 9, "micro_batches": 1, "read_threads": 1, "keep": 5}
  config = packed(
    tmp_path / "train.jsonl",
    optim__learning_rate=1e-4,
    optim__clip_norm=0.0,
    optim__weight_decay=0.1,
    optim__warmup_steps=0,
    **{f"train__{name}": value for name, value in changes.items()},
  )
  train(config, workdir)
  assert steps_of(workdir) == list(range(1, 10))
  assert "config.train.steps: 6 until now, 9 from here on" in caplog.messages
  assert "config.optim.learning_rate: 0.01 until now, 0.0001 from here on" in caplog.messages


@pytest.mark.usefixtures("light_step")
def test_another_run_in_the_directory_is_refused(tmp_path):
  train(arithmetic(train__steps=2), WorkDir(tmp_path))
  with pytest.raises(InputError, match=r"holds a run with config.model.dim = 8, this one has 16"):
    train(arithmetic(model__dim=16), WorkDir(tmp_path))
  assert saved_steps(WorkDir(tmp_path)) == [2]


# What a run tells of its time.


@pytest.mark.usefixtures("light_step")
def test_the_time_of_a_run_is_accounted_for_over_restarts(tmp_path, monkeypatch):
  config, workdir = arithmetic(train__save_every=4), WorkDir(tmp_path)
  at_step = Metrics.step

  def killed_at_6(self, step, scalars):
    if step == 6:
      raise KeyboardInterrupt
    return at_step(self, step, scalars)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Metrics, "step", killed_at_6)
    train(config, workdir, began=time.time() - 100)
  train(config, workdir)
  ledger = read(workdir.goodput)
  assert (ledger.starts, ledger.steps, ledger.lost_steps) == (2, 6, 1)
  assert set(ledger.marks) == {0, 4, 6}
  assert ledger.seconds["start"] >= 100


@pytest.mark.usefixtures("light_step")
def test_the_account_is_as_recent_as_the_last_line(tmp_path, monkeypatch):
  seen = []
  at_step = Metrics.step

  def step(self, step, scalars):
    seen.append(read(tmp_path / "goodput.json").steps)
    return at_step(self, step, scalars)

  monkeypatch.setattr(Metrics, "step", step)
  train(arithmetic(train__log_every=2, train__save_every=100), WorkDir(tmp_path))
  assert seen == [0, 0, 2, 2, 4, 4]


@pytest.mark.usefixtures("light_step")
def test_every_part_of_a_run_is_booked_and_what_may_take_long_is_no_stall(tmp_path, monkeypatch):
  made, seen = {}, {}

  def keeping(name):
    make = getattr(loop, name)
    monkeypatch.setattr(loop, name, lambda *args: made.setdefault(name, make(*args)))

  def noting(owner, name):
    act = getattr(owner, name)

    def noted(*args, **options):
      watched = "Watchdog" in made and made["Watchdog"]._patience == 1
      seen[name] = made["Goodput"]._activity, watched
      return act(*args, **options)

    monkeypatch.setattr(owner, name, noted)

  keeping("Goodput")
  keeping("Watchdog")
  noting(loop, "first_state")
  noting(Learner, "step")  # which is traced when it is compiled
  noting(loop, "batch_work")
  noting(loop, "evaluate")
  noting(Checkpoints, "save")
  train(arithmetic(train__stall_seconds=99.0), WorkDir(tmp_path))
  assert seen == {
    "first_state": ("start", False),
    "step": ("compile", False),
    "batch_work": ("steps", True),
    "evaluate": ("evaluation", False),
    "save": ("saves", False),
  }
  watchdog = made["Watchdog"]
  assert (watchdog.path, watchdog.seconds) == (tmp_path / "stalls" / "process0.txt", 99.0)
  assert watchdog._step == 6


@pytest.mark.usefixtures("light_step")
def test_mfu_is_told_where_the_peak_is_known(tmp_path, monkeypatch):
  work = []

  def flops(model, vocab_size, of_batch):
    work.append(of_batch)
    return 1000.0

  monkeypatch.setattr(loop, "peak_flops", lambda devices: 1e6 * len(devices))
  monkeypatch.setattr(loop, "training_flops", flops)
  train(arithmetic(), WorkDir(tmp_path))
  assert all(
    line["mfu"] * line["step_seconds"] * 1e6 == pytest.approx(1000)
    for line in lines(WorkDir(tmp_path))
    if line["kind"] == "train"
  )
  assert len(work) == 6 and all(0 < cells < pairs for cells, pairs in work)


@pytest.mark.usefixtures("light_step")
def test_named_steps_are_traced(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  at_step = Metrics.step
  monkeypatch.setattr(Metrics, "step", lambda *args: calls.append(args[1]) or at_step(*args))
  fields = {"train__profile_first_step": 2, "train__profile_last_step": 4}
  train(arithmetic(**fields, train__save_every=100), WorkDir(tmp_path))
  # The scalars of a step are read when the next one has been dispatched.
  assert calls == [tmp_path / "profile", 1, 2, "stop", 3, 4, 5, 6]


# A loss that is not finite.


@pytest.mark.usefixtures("light_step")
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_records_of_its_step(tmp_path):
  """One record alone makes the loss infinite; the step in which it comes is the one that ends."""
  path = tmp_path / "train.jsonl"
  tables(path, lengths=(8,) * 8)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[5]["loss_mask"] = [3e38, 3e38]
  path.write_text("\n".join(map(json.dumps, rows)))
  data = DataConfig(train=str(path), rows=8)
  config = arithmetic(streams=("a:output", "b:output"), data=data, train__batch=2)
  with pytest.raises(RunError) as caught:
    train(config.changed({"train.save_every": 100}), WorkDir(tmp_path / "run"))
  step, rest = re.match(r"step (\d): loss inf, gradient norm 0.0; (.*)", str(caught.value)).groups()
  records = rest.removeprefix("last good checkpoint: none; the batch's records: ").split(", ")
  assert len(records) == 2 and "table-5" in records
  assert steps_of(WorkDir(tmp_path / "run")) == list(range(1, int(step) + 1))
  assert caught.value.exit_status == 1
  assert saved_steps(WorkDir(tmp_path / "run")) == []


@pytest.mark.usefixtures("light_step")
def test_a_checkpoint_in_flight_is_waited_for_before_the_last_good_one_is_named(
  tmp_path, monkeypatch
):
  read = Metrics.step
  nan_at_4 = lambda self, step, scalars: read(
    self, step, {**scalars, "loss": jnp.where(step == 4, jnp.nan, scalars["loss"])}
  )
  monkeypatch.setattr(Metrics, "step", nan_at_4)
  with pytest.raises(RunError, match="step 4: loss nan") as caught:
    train(arithmetic(train__save_every=1, train__keep=1), WorkDir(tmp_path))
  good = WorkDir(tmp_path).checkpoints / "3"
  assert f"last good checkpoint: {good};" in str(caught.value)
  assert saved_steps(WorkDir(tmp_path)) == [3]


# Evaluation and the best checkpoint.


def mean_token(self, params, batch):
  """Sums whose means are those of the token ids."""
  cells = batch["tokens"] >= 0
  count, total = cells.sum((0, 1)), jnp.where(cells, batch["tokens"], 0).sum((0, 1))
  parts = {"entropy": total, "entropy_spoken": total, "cells": count, "cells_spoken": count}
  return {"loss": total.sum(), "weight": count.sum(), **parts}


@pytest.mark.parametrize("batches, examples", [(0, 5), (1, 4), (2, 5), (9, 5)])
@pytest.mark.parametrize("pack", [False, True])
def test_evaluation_is_the_mean_over_the_cells_of_so_many_batches(
  tmp_path, monkeypatch, batches, examples, pack
):
  monkeypatch.setattr(Learner, "evaluate", mean_token)
  lengths = (8, 7, 8, 8, 7)  # no two fit into one sequence
  path = tables(tmp_path / "tables.jsonl", lengths)
  data = DataConfig(train=path, valid=path, rows=8, pack=pack)
  config = Config(data=data, train=TrainConfig(batch=4, micro_batches=2, eval_batches=batches))
  data = load.load(config)
  learner = Learner(config, data.streams, data.tokenizer.vocab_size)
  scores = loop.evaluate(learner, None, data.valid)
  cells = np.concatenate([data.valid[index].tokens for index in range(examples)])
  np.testing.assert_allclose(scores["loss"], cells.mean(), rtol=1e-6)
  np.testing.assert_allclose(scores["loss/user"], cells[:, 0].mean(), rtol=1e-6)
  np.testing.assert_allclose(scores["spoken/output"], cells[:, 1].mean(), rtol=1e-6)


@pytest.mark.usefixtures("light_step")
def test_the_best_checkpoint_is_kept_also_over_a_restart(tmp_path, monkeypatch):
  losses = iter([5.0, 2.0, 3.0, 4.0, 3.5, 2.5])
  monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
  save, begun = Checkpoints.save, []
  spy = lambda self, step, *rest: begun.append(step) or save(self, step, *rest)
  monkeypatch.setattr(Checkpoints, "save", spy)
  config = arithmetic(train__eval_every=1, train__save_every=100, train__keep=1, train__steps=4)
  workdir = WorkDir(tmp_path)
  train(config, workdir)
  assert saved_steps(workdir) == [2, 4]
  train(config.changed({"train.steps": 6}), workdir)
  assert saved_steps(workdir) == [2, 6]
  assert begun == [1, 2, 4, 6]  # what is better than all before, and the last
  assert steps_of(workdir, "valid") == [1, 2, 3, 4, 5, 6]


# Starting from another run.


@pytest.fixture
def other(tmp_path, light_step):
  """A run with streams user, think and output."""
  return train(arithmetic(), WorkDir(tmp_path / "other"))


def zeros(path, streams):
  """Tables on which `light_step` stands still; returns the data of a run with them."""
  record = {"num_rows": 8, "token_ids": [[0] * 8] * streams}
  path.write_text(json.dumps(record))
  return DataConfig(train=str(path), rows=8)


@pytest.mark.parametrize(
  "streams, new",
  [
    (("output:output", "user:input", "think:internal"), []),
    (("output:output",), []),
    (("user:input", "tool:input", "think:internal", "output:output"), ["tool"]),
  ],
  ids=["reordered", "subset", "superset"],
)
def test_parameters_of_another_run_are_taken_stream_by_stream(
  tmp_path, other, caplog, streams, new
):
  caplog.set_level(logging.INFO, "absl")
  config = arithmetic(
    streams=streams,
    data=zeros(tmp_path / "train.jsonl", len(streams)),
    data__tokenizer=str(tmp_path / "other" / "tokenizer.json"),
    train__steps=1,
  )
  alone = train(config, WorkDir(tmp_path / "alone")).params
  taken = train(
    config.changed({"init_from": str(tmp_path / "other")}), WorkDir(tmp_path / "run")
  ).params
  for i, name in enumerate(spec.partition(":")[0] for spec in streams):
    found = alone["stream_embed"][i] if name in new else of(other, name)
    np.testing.assert_array_equal(taken["stream_embed"][i], found)
  rest = lambda params: {k: v for k, v in params.items() if k != "stream_embed"}
  assert equal(rest(taken), rest(other.params)) and not equal(rest(taken), rest(alone))
  told = [m for m in caplog.messages if m.startswith("stream ")]
  assert told == [f"stream {name} is new: its embedding starts random" for name in new]


def of(run, name):
  """The embedding of a stream."""
  return run.params["stream_embed"][run.data.streams.id(name)]


def test_a_vocabulary_or_shape_that_differs_is_refused(tmp_path, other):
  from_other = {"init_from": str(tmp_path / "other")}
  text = zeros(tmp_path / "train.jsonl", streams=3)
  with pytest.raises(
    InputError, match=r"init_from: the vocabulary of .* \(271 tokens\) is not this"
  ):
    train(arithmetic(data=text, **from_other), WorkDir(tmp_path / "a"))
  with pytest.raises(
    InputError, match=r"init_from: .* has \['embed'\].* of shape \(271, 8\), this "
  ):
    train(arithmetic(model__dim=4, **from_other), WorkDir(tmp_path / "b"))
  with pytest.raises(InputError, match=r"(config|streams).json: not found"):
    train(arithmetic(init_from=str(tmp_path / "none")), WorkDir(tmp_path / "c"))


@pytest.mark.usefixtures("light_step")
def test_another_silence_is_refused_and_another_rule_is_told(tmp_path, caplog):
  caplog.set_level(logging.INFO, "absl")
  train_bpe(["a bit of text"], 300).save(tmp_path / "tokenizer.json")
  (tmp_path / "train.jsonl").write_text(
    json.dumps({"messages": [{"role": "assistant", "content": "a bit of text"}]})
  )

  def run(name, **changes):
    config = Config(
      model=SMALL,
      data=DataConfig(train=str(tmp_path / "train.jsonl"), tokenizer=str(tmp_path), rows=8),
      train=TrainConfig(steps=1, batch=2),
    )
    return train(config.changed(changes), WorkDir(tmp_path / name))

  run("first")
  from_first = {"init_from": str(tmp_path / "first")}
  with pytest.raises(InputError, match=r"init_from: silence is token \d+ in .*first and token"):
    run("second", **from_first, **{"data.silence": "<pad>"})
  run("third", **from_first, same_row="inputs")
  assert f"config.same_row: 'hidden' in {tmp_path / 'first'}, 'inputs' here" in caplog.messages


@pytest.mark.usefixtures("light_step")
def test_a_vocabulary_of_the_same_size_but_other_tokens_is_refused(tmp_path):
  def run(name, text, **changes):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": text * 99}]}))
    config = Config(
      model=SMALL,
      data=DataConfig(train=str(path), tokenizer="bpe:300", rows=8),
      train=TrainConfig(steps=1, batch=2),
    )
    return train(config.changed(changes), WorkDir(tmp_path / name))

  first = run("first", "ab ba ")
  from_first = {"init_from": str(tmp_path / "first")}
  with pytest.raises(
    InputError, match=r"take its tokenizer by --config.data.tokenizer=.*/first/tok"
  ):
    run("second", "cd dc ", **from_first)
  file = str(tmp_path / "first" / "tokenizer.json")
  third = run("third", "cd dc ", **from_first, **{"data.tokenizer": file})
  assert third.data.tokenizer.to_json() == first.data.tokenizer.to_json()
