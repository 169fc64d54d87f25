import errno
import json
import logging
import re
import struct

import jax.numpy as jnp
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from msjax.errors import InputError, RunError
from msjax.training.metrics import Metrics

NAMES = ("user", "output")
SCALARS = {
  "loss": jnp.float32(1.5),
  "loss/user": jnp.float32(0.25),
  "loss/output": jnp.float32(2.75),
  "spoken/user": jnp.float32(0.5),
  "gradient_norm": jnp.float32(12.0),
  "learning_rate": jnp.float32(3e-3),
  "cells": jnp.float32(100.0),
}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "metrics.jsonl"


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def events(path):
  """Every TensorBoard event beside `path`, in the order of the files."""
  found = []
  for file in sorted((path.parent / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      (length,) = struct.unpack("<Q", data[:8])
      found.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def run(path, start, steps, log_every=1, last=None):
  """Takes steps `start` + 1 to `last` of a run of `steps`."""
  with Metrics(path, start, steps, log_every, NAMES) as metrics:
    for step in range(start + 1, (last or steps) + 1):
      metrics.waited(0.25)
      metrics.step(step, SCALARS)
  return metrics


def test_scalars_come_back_as_numbers(path):
  with Metrics(path, 0, 5, 2, NAMES) as metrics:
    values = metrics.step(1, SCALARS)
  assert values == {name: float(value) for name, value in SCALARS.items() if name != "cells"}


def test_lines_are_written_every_so_many_steps_and_at_the_end(path):
  run(path, 0, 5, log_every=2)
  assert [line["step"] for line in lines(path)] == [2, 4, 5]


def test_a_figure_that_is_not_finite_is_null(path):
  with Metrics(path, 0, 1, 1, NAMES) as metrics:
    metrics.step(1, {**SCALARS, "loss": jnp.float32("nan")})
  assert lines(path)[0]["loss"] is None


def test_a_line_of_json_holds_every_figure(path):
  run(path, 0, 4, log_every=4)
  (line,) = lines(path)
  assert line["format_version"] == 1
  assert (line["kind"], line["step"]) == ("train", 4)
  assert (line["loss"], line["loss/output"], line["gradient_norm"]) == (1.5, 2.75, 12.0)
  assert line["data_wait_seconds"] == 0.25
  assert line["tokens_per_second"] * line["step_seconds"] * 4 == pytest.approx(400)
  assert line["seconds"] >= 4 * line["step_seconds"]


def test_a_log_line_tells_the_same_to_people(path, caplog):
  caplog.set_level(logging.INFO, "absl")
  run(path, 0, 4, log_every=4, last=4)
  (line,) = caplog.messages
  assert re.fullmatch(
    r"step 4/4  eta \d+:\d\d  loss 1.5000 \(user 0.2500 output 2.7500\)  \|g\| 12  lr 0.003  "
    r"[\d,]+ tokens/s  [\d.]+ ms/step  data wait 250.0 ms",
    line,
  )


def test_mfu_is_the_share_of_peak_arithmetic_between_two_lines(path, caplog, monkeypatch):
  caplog.set_level(logging.INFO, "absl")
  now = 100.0
  monkeypatch.setattr("time.perf_counter", lambda: now)
  with Metrics(path, 0, 4, 2, NAMES, peak_flops=1000.0) as metrics:
    for step, flops in ((1, 700.0), (2, 800.0), (3, 100.0), (4, 100.0)):
      now += 2.0
      metrics.worked(flops)
      metrics.step(step, SCALARS)
  assert [line["mfu"] for line in lines(path)] == [0.375, 0.05]
  assert [message.rpartition("  ")[2] for message in caplog.messages] == ["mfu 37.5%", "mfu 5.0%"]


def test_no_mfu_where_the_peak_is_not_known(path, caplog):
  caplog.set_level(logging.INFO, "absl")
  with Metrics(path, 0, 1, 1, NAMES) as metrics:
    metrics.worked(1e12)
    metrics.step(1, SCALARS)
  assert "mfu" not in lines(path)[0]
  assert "mfu" not in caplog.messages[0]


def test_the_eta_goes_by_the_steps_of_this_start(path, caplog, monkeypatch):
  caplog.set_level(logging.INFO, "absl")
  now = 100.0
  monkeypatch.setattr("time.perf_counter", lambda: now)
  with Metrics(path, 1000, 5000, 10, NAMES) as metrics:
    now += 20.0
    metrics.step(1010, SCALARS)
  assert "step 1010/5000  eta 2:13:00 " in caplog.messages[0]
  (line,) = lines(path)
  assert (line["step_seconds"], line["tokens_per_second"], line["seconds"]) == (2.0, 5.0, 20.0)


def test_tensorboard_shows_the_same(path):
  with Metrics(path, 0, 2, 1, NAMES) as metrics:
    metrics.waited(0.5)
    metrics.step(1, SCALARS)
    metrics.step(2, SCALARS)
    metrics.write("valid", 2, {"loss": 0.75})
  scalars = {(e.step, v.tag): v.simple_value for e in events(path) for v in e.summary.value}
  assert scalars[1, "train/loss"] == scalars[2, "train/loss"] == 1.5
  assert scalars[2, "train/loss/output"] == 2.75
  assert scalars[2, "valid/loss"] == 0.75
  assert scalars[1, "train/data_wait_seconds"] == 0.5


# After a restart.


def test_steps_that_will_be_taken_again_are_cut_off(path):
  run(path, 0, 10, last=7)
  with Metrics(path, 7, 10, 1, NAMES) as metrics:
    metrics.write("valid", 7, {"loss": 1.0})
  run(path, 4, 10)
  assert [(line["kind"], line["step"]) for line in lines(path)] == [
    ("train", step) for step in range(1, 11)
  ]


def test_tensorboard_forgets_those_steps_and_no_other(path):
  run(path, 0, 10, last=7)
  run(path, 4, 10)
  restarts = [e.step for e in events(path) if e.session_log.status == SessionLog.START]
  assert restarts[-1] == 5  # events of this step and later ones are forgotten


def test_a_line_that_was_being_written_is_cut_off(path):
  run(path, 0, 3)
  with path.open("a") as file:
    file.write('{"kind": "train", "st')
  run(path, 3, 5)
  assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["not JSON", '"text"', '{"kind": "train"}', '{"step": 1}'])
def test_a_line_of_somebody_else_is_told_and_kept(path, line):
  run(path, 0, 2)
  path.write_text(before := line + "\n" + path.read_text())
  with pytest.raises(InputError, match=r"metrics.jsonl: holds a line that msjax did not write"):
    run(path, 2, 3)
  assert path.read_text() == before


def test_time_goes_on_where_it_was(path, monkeypatch):
  now = 0.0
  monkeypatch.setattr("time.perf_counter", lambda: now)
  with Metrics(path, 0, 4, 1, NAMES) as metrics:
    now += 10.0
    metrics.step(1, SCALARS)
    now += 10.0
    metrics.step(2, SCALARS)
  now += 1000.0
  with Metrics(path, 1, 4, 1, NAMES) as metrics:  # the second step was lost
    now += 5.0
    metrics.step(2, SCALARS)
    assert metrics.seconds == 15.0
  assert [line["seconds"] for line in lines(path)] == [10.0, 15.0]


def test_a_finished_run_loses_nothing(path):
  run(path, 0, 3)
  before = path.read_bytes()
  with Metrics(path, 3, 3, 1, NAMES) as metrics:
    assert metrics.seconds >= lines(path)[-1]["seconds"]
  assert path.read_bytes() == before


# What else is there.


def test_a_disk_too_full_for_tensorboard_is_an_error_too(path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  metrics = Metrics(path, 0, 3, 1, NAMES)
  monkeypatch.setattr(EventsWriter, "write_event", full)
  with pytest.raises(RunError, match=r"metrics cannot be written: No space left"), metrics:
    metrics.step(1, SCALARS)


def test_no_progress_bar_where_there_is_no_terminal(path, capfd):
  run(path, 0, 3)
  assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_one_error_and_hides_no_other(path):
  metrics = Metrics(path, 0, 3, 1, NAMES)
  metrics._files._lines = open("/dev/full", "w")  # noqa: SIM115 - closed by the block below
  with pytest.raises(RunError, match=r"metrics cannot be written: No space left"), metrics:
    metrics.step(1, SCALARS)
