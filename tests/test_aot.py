"""What is compiled for TPUs that are not there, and what is told of it."""

import dataclasses
import functools
import json
import math

import jax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msjax import aot
from msjax.config import Config, DataConfig, ModelConfig, TrainConfig
from msjax.errors import InputError
from msjax.kernels import static
from msjax.training.state import Learner

MIB, VOCAB = 2**20, 1000
CONFIG = Config(
  streams=("user:input", "output:output"),
  model=ModelConfig(
    dim=1024, layers=2, heads=8, kv_heads=8, head_dim=128, mlp_dim=3072, remat="full"
  ),
  data=DataConfig(rows=64),
  train=TrainConfig(batch=8),
)


def learner(config):
  return Learner(config, config.stream_set(0), VOCAB)


@functools.cache
def train(topology, *changes):
  return aot.train_report(learner(CONFIG.changed(dict(changes))), topology)


def parameters(config=CONFIG):
  shapes = jax.eval_shape(learner(config).init, jax.random.key(0)).params
  return sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))


def summed(report):
  """Collectives that sum over chips, and leave all of the sum to each, in the loop over layers."""
  return [c for c in report.collectives if c.in_loop and c.kind == "all-reduce"]


def scattered(report, group):
  """Bytes of sums in a step of which chips keep parts."""
  found = [c for c in report.collectives if c.kind == "reduce-scatter" and c.group == group]
  return sum(c.bytes * c.count for c in found)


def of_layers(layers=CONFIG.model.layers):
  """Bytes of the layers' matrices in bfloat16."""
  m = CONFIG.model
  return layers * m.dim * (4 * m.heads * m.head_dim + 3 * m.mlp_dim) * 2


@pytest.mark.tpu_compiler
def test_a_train_step_on_two_physical_axes():
  report = train("v5e:2x4")
  assert (report.program, report.topology, report.chips) == ("train", "v5e:2x4", 8)
  assert (report.mesh, report.batch, report.tokens) == ({"fsdp": 8}, 8, 8 * 64 * 2)
  assert (report.remat, report.fits, report.short_by) == ("full", True, 0)
  # Parameters and two moments in float32.
  memory = report.hbm_per_chip_bytes
  assert memory["arguments"] == pytest.approx(12 * parameters() / 8, rel=0.01)
  assert 0 < memory["temporaries"] < memory["arguments"] / 2  # the new state takes the old's place
  assert {"stream_forward", "stream_backward", "rotary_forward"} <= set(report.kernels)
  assert list(report.kernels) == sorted(set(report.kernels))
  assert all(c.bytes <= MIB for c in summed(report))
  # Gradients of layers are summed along one axis of the slice, their halves along the other.
  assert of_layers() <= scattered(report, 2) < 1.2 * of_layers()
  assert of_layers() / 2 <= scattered(report, 4) < 1.2 * of_layers() / 2
  # Weights are fetched in bfloat16, forward and backward.
  gathered = sum(c.bytes * c.count for c in report.collectives if c.kind == "all-gather")
  assert 2 * of_layers() <= gathered < 2.5 * of_layers()
  assert report.hbm_bytes > 2 * memory["arguments"]  # read and written
  assert report.hbm_bytes_min is None
  assert 0 < report.xla_ms < 10 and report.compile_seconds > 0


@pytest.mark.tpu_compiler
def test_a_train_step_of_chips_that_share_layers():
  report = train("v5e:2x4", ("mesh.model", 2))
  assert (report.mesh, report.fits) == ({"fsdp": 4, "model": 2}, True)
  memory = report.hbm_per_chip_bytes
  assert memory["arguments"] == pytest.approx(12 * parameters() / 8, rel=0.01)
  assert all(c.bytes <= MIB for c in summed(report))
  assert {"stream_forward", "stream_backward"} <= set(report.kernels)
  # Residuals are cut by cells: each part of a layer joins them and leaves each chip its own.
  cells = 2 * 128 * CONFIG.model.dim * 2  # of two sequences, in bfloat16
  assert any((c.bytes, c.group) == (cells, 2) for c in report.collectives if c.in_loop)


@pytest.mark.tpu_compiler
def test_a_train_step_on_two_slices():
  report = train("v5e:2x2", ("mesh.slices", 2))
  assert (report.chips, report.mesh) == (8, {"slices": 2, "fsdp": 4})
  memory = report.hbm_per_chip_bytes
  assert memory["arguments"] == pytest.approx(12 * parameters() / 4, rel=0.01)
  between = [c for c in report.collectives if c.between_slices]
  assert not any(c.in_loop for c in between)  # the slow network is crossed once a step
  assert {(c.kind, c.group) for c in between} == {("all-reduce", 2)}
  assert sum(c.bytes * c.count for c in between) == pytest.approx(parameters(), rel=0.05)


LAYERS = 16  # of a tick


@functools.cache
def decode(streams, rows=2048):
  config = CONFIG.changed({"mesh.model": 4, "model.layers": LAYERS})
  config.streams = ("user:input", *(f"s{i}:output" for i in range(1, streams)))
  return aot.decode_report(learner(config), "v5e:2x2", 4, rows // streams)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("streams", [2, 8])
def test_a_tick_of_chips_that_share_a_model(streams):
  report, m = decode(streams), CONFIG.model
  assert (report.program, report.mesh, report.remat) == ("decode", {"model": 4}, "")
  assert (report.fits, report.batch, report.tokens) == (True, 4, 4 * streams)
  assert report.kernels == ("stream_block_decode",)
  cache = 2 * LAYERS * 4 * 2048 * m.kv_heads * m.head_dim * 2 / 4
  weights = (of_layers(LAYERS) + VOCAB * m.dim * 2) / 4
  memory = report.hbm_per_chip_bytes
  embedding = VOCAB * m.dim * 2 / 4
  assert memory["arguments"] == pytest.approx(weights + cache + embedding, rel=0.01)
  assert memory["temporaries"] < 2 * MIB < cache  # the new cache takes the old one's place
  assert report.hbm_bytes_min == pytest.approx(weights + cache, rel=0.01)
  assert report.hbm_bytes <= 1.02 * report.hbm_bytes_min
  # Two sums a layer, of the row's cells.
  row = 4 * streams * m.dim * 2
  in_loop = {(c.kind, c.bytes, c.count) for c in report.collectives if c.in_loop}
  assert in_loop == {("all-reduce", row, 2 * LAYERS)}
  assert all(c.bytes <= row for c in report.collectives)  # neither logits nor the embedding


@pytest.mark.tpu_compiler
def test_streams_are_nearly_free():
  assert decode(8).hbm_bytes <= 1.01 * decode(2).hbm_bytes


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("remat", ["auto", "attention"])
def test_a_step_far_too_large_tells_by_how_much(remat):
  changes = ("model.layers", 4000), ("model.remat", remat)
  report = train("v5e:2x2", ("train.batch", 4), *changes)
  layers = of_layers() * 2000
  kept = report.hbm_per_chip_bytes["arguments"]
  assert not report.fits
  assert kept == pytest.approx(6 * layers / 4, rel=0.01)  # 12 bytes to 2
  assert report.short_by == pytest.approx(sum(report.hbm_per_chip_bytes.values()) - report.capacity)
  assert report.short_by > kept - report.capacity > 0
  assert report.remat == ("full" if remat == "auto" else remat)
  assert (report.collectives, report.kernels, report.xla_ms) == ((), (), None)


@pytest.mark.tpu_compiler
def test_a_cache_far_too_large_tells_by_how_much():
  report = decode(2, rows=2**22)
  assert not report.fits and report.short_by > 0 and report.xla_ms is None
  assert report.hbm_per_chip_bytes["arguments"] > report.capacity


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
  ("changes", "topology", "message"),
  [
    (
      {"mesh.model": 4, "model.kv_heads": 2},
      "v5e:2x2",
      "config.model.kv_heads: 2 cannot be dealt out to 4 chips (config.mesh.model); expected 4, "
      "or 2 chips",
    ),
    (
      {"mesh.model": 3},
      "v5e:2x2",
      "config.mesh: data 1 x fsdp the rest x model 3 does not make up 4 devices; data 1 x fsdp 2 x "
      "model 2 would",
    ),
    (
      {"train.batch": 6},
      "v5e:2x2",
      "config.train.batch / config.train.micro_batches: 6 cannot be dealt out to 4 chips "
      "(config.mesh.slices x data x fsdp); expected 4, or 2 chips",
    ),
  ],
)
def test_what_cannot_be_cut_is_told_before_anything_is_compiled(changes, topology, message):
  with pytest.raises(InputError) as caught:
    aot.train_report(learner(CONFIG.changed(changes)), topology)
  assert str(caught.value) == message


def test_without_libtpu_it_is_told_what_to_install(monkeypatch):
  monkeypatch.setattr(static, "libtpu_version", lambda: None)
  message = r"^libtpu.* is not installed: pip install -e '\.\[tpu-"
  for call in (
    lambda: aot.train_report(learner(CONFIG), "v5e:2x2"),
    lambda: aot.decode_report(learner(CONFIG), "v5e:2x2", 1, 1),
    lambda: aot.largest_batch(learner(CONFIG), "v5e:2x2"),
  ):
    with pytest.raises(InputError, match=message):
      call()


@pytest.mark.tpu_compiler
def test_a_report_is_json():
  report = train("v5e:2x4")
  told = json.loads(json.dumps(report.to_json()))
  assert set(told) == {field.name for field in dataclasses.fields(report)}
  kinds = ["kind", "bytes", "count", "in_loop", "asynchronous", "group", "between_slices"]
  assert all(list(c) == kinds for c in told["collectives"])
  assert told["hbm_per_chip_bytes"] == report.hbm_per_chip_bytes


# The largest batch.


def pretended(monkeypatch, fixed, each_needs, capacity=1000):
  """Lets a batch need that, without a compiler; returns the list of batches that are then tried."""
  asked = []
  monkeypatch.setattr(aot, "devices_of", lambda topology, slices: jax.devices()[:1])

  def train_report(learner, topology):
    config = learner.config
    asked.append(config.train.batch)
    assert (config.train.micro_batches, config.model.remat) == (1, "full")
    needs = fixed + each_needs(config.train.batch)
    return aot.Report(
      *("train", topology, 1, {}, config.train.batch, 1, config.model.remat),
      fits=needs <= capacity,
      short_by=max(needs - capacity, 0),
      capacity=capacity,
      hbm_per_chip_bytes={"arguments": fixed, "temporaries": needs - fixed},
    )

  monkeypatch.setattr(aot, "train_report", train_report)
  return asked


def largest():
  config = CONFIG.changed({"model.remat": "auto", "train.micro_batches": 2})
  return aot.largest_batch(learner(config), "v5e:1x1")


needs = st.integers(1, 600)


@settings(deadline=None)
@given(fixed=st.integers(0, 1200), first=needs, each=needs)
@example(fixed=181, first=819, each=1)  # a line alone would take hundreds
def test_the_largest_batch_is_found_in_a_few_tries(fixed, first, each):
  with pytest.MonkeyPatch.context() as patch:
    asked = pretended(patch, fixed, lambda batch: max(first, each * batch))
    report = largest()
    fitting = [n for n in range(1, 1002) if fixed + max(first, each * n) <= 1000]
    assert report.batch == max(fitting, default=1)
    assert report.fits == bool(fitting)
    assert len(asked) == len(set(asked)) <= 24


@settings(deadline=None)
@given(fixed=st.integers(0, 1200), steps=st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_a_search_ends_whatever_batches_need(fixed, steps):
  with pytest.MonkeyPatch.context() as patch:
    needs = lambda batch: sum(steps[:batch]) + 1000 * max(batch - len(steps), 0)
    asked = pretended(patch, fixed, needs)
    report = largest()
    n = report.batch
    assert report.fits == (fixed + needs(1) <= 1000)
    assert fixed + needs(n + 1) > 1000 if report.fits else n == 1
    assert len(asked) == len(set(asked))
