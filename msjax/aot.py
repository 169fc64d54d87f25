"""What train and decode would compile, for TPUs that are not there, and what it says of itself."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msjax import mesh, sharding
from msjax.decoding import tick
from msjax.decoding.policy import Knobs, Policy
from msjax.decoding.prepared import prepare
from msjax.kernels.chips import chip_of
from msjax.kernels.collectives import Collective
from msjax.kernels.hlo import parse_module
from msjax.kernels.static import compile_with_text, devices_of, hbm_overrun
from msjax.models import axes
from msjax.training import stored
from msjax.training.begin import DoesNotFit, Program, program
from msjax.training.state import Learner

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
  """What a program needs and does, per chip.

  Attributes:
    program: `train` or `decode`.
    topology: such as `v5e:8x8`.
    chips: of all slices.
    mesh: sizes of its axes that are more than 1.
    batch: sequences of a step (of a micro-batch), or sessions.
    tokens: of a step, or of a row of all sessions.
    remat: what is kept for the backward pass; empty for decode.
    fits: whether a chip's memory is enough.
    short_by: bytes a chip lacks, 0 if it fits.
    capacity: bytes that programs can have.
    hbm_per_chip_bytes: `arguments` (what lives on: state or model and cache) and `temporaries`;
      empty where the compiler gave up before it knew.
    hbm_bytes: moved to and from memory in a step; in decoding, of likeliest tokens. So are the
      next, time and collectives.
    hbm_bytes_min: the least for decode: weights and cache read once; None for train.
    xla_ms: what XLA estimates for its own operations, without collectives and Pallas kernels.
    kernels: names of the Pallas kernels in use, in order.
    collectives: see `Collective`.
    compile_seconds: of the compiler.
  """

  program: str
  topology: str
  chips: int
  mesh: Mapping[str, int]
  batch: int
  tokens: int
  remat: str
  fits: bool
  short_by: int
  capacity: int
  hbm_per_chip_bytes: Mapping[str, int]
  hbm_bytes: int | None = None
  hbm_bytes_min: int | None = None
  xla_ms: float | None = None
  kernels: tuple[str, ...] = ()
  collectives: tuple[Collective, ...] = ()
  compile_seconds: float = 0.0

  def to_json(self) -> dict[str, Any]:
    """Returns what `--json` prints."""
    return {
      **dataclasses.asdict(self),
      "collectives": [dataclasses.asdict(c) for c in self.collectives],
    }


def train_report(learner: Learner, topology: str, save_to: str | None = None) -> Report:
  """Compiles the very step that `msjax.train` would run on a topology.

  Args:
    learner: of a valid config; `mesh.slices` of such slices.
    topology: of a slice.
    save_to: file for the compiled step, for `msjax.train --program`; None for none.

  Raises:
    InputError: the topology, or what the mesh is to cut, is wrong; libtpu is missing.
  """
  config, t = learner.config, learner.config.train
  sequences = t.batch // t.micro_batches
  with jax.set_mesh(mesh.make_mesh(config.mesh, devices_of(topology, config.mesh.slices))):
    mesh.check(config.model, t)
    state = learner.abstract()
    grid = (t.micro_batches, sequences, config.data.rows)
    cells = (*grid, len(learner.streams))
    shapes = {"tokens": (cells, jnp.int32), "weights": (cells, jnp.float32)}
    shapes = {**shapes, "segments": (grid, jnp.int32)}
    batch = {
      name: sharding.placed(jax.ShapeDtypeStruct(*of), sharding.spec(None, "batch"))
      for name, of in shapes.items()
    }
    facts = _facts("train", topology, sequences, math.prod(cells))
    began = time.perf_counter()
    try:
      remat, compiled = program(learner, state, batch, compile_with_text)
    except DoesNotFit as error:
      return _too_large(facts, error.needed, state, remat=error.remat)
    seconds = time.perf_counter() - began
    if save_to:
      stored.save(save_to, learner, Program(remat, compiled[0]))
    return _report(facts, compiled, seconds, remat=remat)


def decode_report(learner: Learner, topology: str, sessions: int, rows: int) -> Report:
  """Compiles the tick that decoding would run on a topology, with caches for so many rows.

  `mesh.model` chips share a model, the others serve other sessions. Arguments and errors as of
  `train_report`.
  """
  config, shape = learner.config, jax.ShapeDtypeStruct
  with jax.set_mesh(mesh.decode_mesh(config.mesh.model, devices_of(topology, 1))):
    mesh.check_sessions(config.model, sessions)
    begun = lambda: learner.init(jax.random.key(0)).params
    model = jax.eval_shape(lambda: prepare(learner.model(begun())))
    model = sharding.placed(model, axes.specs(model))
    S = len(learner.streams)
    state = jax.eval_shape(lambda: tick.room(model, sessions, rows, remembers=False))
    state = sharding.placed(state, tick.specs(model, state))
    of_session = lambda dtype, *dims: shape((sessions, *dims), dtype)
    handed_in = (
      jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Knobs.of([[Policy()] * S] * sessions))),
      *(of_session(jnp.int32, S), of_session(bool), of_session(bool)),
    )
    by_session = jax.tree.map(lambda _: sharding.spec("batch"), handed_in)
    arguments = model, state, *sharding.placed(handed_in, by_session)
    facts = _facts("decode", topology, sessions, sessions * S)
    began = time.perf_counter()
    try:
      compiled = compile_with_text(tick.tick.lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return _too_large(facts, (hbm_overrun(error) or (None,))[0], (model, state))
    read_once = _bytes_here((model.layers, model.unembed, state.cache.k, state.cache.v))
    return _report(facts, compiled, time.perf_counter() - began, hbm_bytes_min=read_once)


def largest_batch(learner: Learner, topology: str) -> Report:
  """Returns the report of the largest micro-batch that fits, in whole sequences for every chip.

  With `remat` auto the least is kept for the backward pass. Batches are compiled until one fits and
  the next larger one does not; where not even the smallest fits, its report is returned.

  Raises:
    InputError: see `train_report`.
  """
  config = learner.config.changed({"train.micro_batches": 1})
  if config.model.remat == "auto":
    config.model.remat = "full"
  with jax.set_mesh(mesh.make_mesh(config.mesh, devices_of(topology, config.mesh.slices))):
    sequences = sharding.chips("batch")

  def report(each: int) -> Report:
    batch = config.changed({"train.batch": each * sequences})
    return train_report(dataclasses.replace(learner, config=batch), topology)

  tried = {1: report(1)}  # by sequences for every chip
  fits, too_large = 1, math.inf
  while tried[1].fits and fits + 1 < too_large:
    each = min(max(_promised(tried), fits + 1), too_large - 1)
    tried[each] = report(each)
    if tried[each].fits:
      fits = each
    else:
      too_large = each
  return tried[fits]


def _promised(tried: Mapping[int, Report]) -> int:
  """How many sequences for every chip should just fit, by a line through two batches: the largest
  that fits and the smallest that does not, or else the two largest. Every other time the middle of
  the former two is taken, for what a batch needs may be no line."""
  if len(tried) < 2:
    return 2
  left = {each: r.capacity - sum(r.hbm_per_chip_bytes.values()) for each, r in tried.items()}
  fitting = sorted(each for each, report in tried.items() if report.fits)
  too_large = [each for each, report in tried.items() if not report.fits]
  few, many = (fitting[-1], min(too_large)) if too_large else fitting[-2:]
  if too_large and len(tried) % 2:
    return (few + many) // 2
  far, each_needs = 8 * many, (left[few] - left[many]) / (many - few)
  return min(math.floor(few + left[few] / each_needs), far) if each_needs > 0 else far


def _facts(name: str, topology: str, batch: int, tokens: int) -> dict[str, Any]:
  """What is known of a program before it is compiled, on the mesh in use."""
  return {
    "program": name,
    "topology": topology,
    "chips": jax.sharding.get_mesh().size,
    "mesh": mesh.sizes(),
    "batch": batch,
    "tokens": tokens,
    "capacity": chip_of(topology).hbm_bytes,
  }


def _too_large(
  facts: dict[str, Any], needed: int | None, arguments: Any, remat: str = ""
) -> Report:
  kept = _bytes_here(arguments)
  needed = needed or facts["capacity"]
  return Report(
    **facts,
    remat=remat,
    fits=False,
    short_by=max(needed - facts["capacity"], 1),
    hbm_per_chip_bytes={"arguments": kept, "temporaries": max(needed - kept, 0)},
  )


def _report(facts, compiled_with_text, seconds, remat="", hbm_bytes_min=None) -> Report:
  compiled, text = compiled_with_text
  # A tick branches where tokens are drawn; what is told of is a tick that takes the likeliest.
  branch = min if facts["program"] == "decode" else max
  memory, module = compiled.memory_analysis(), parse_module(text, branch)
  needed = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
  }
  over = sum(needed.values()) - facts["capacity"]
  return Report(
    **facts,
    remat=remat,
    fits=over <= 0,
    short_by=max(over, 0),
    hbm_per_chip_bytes=needed,
    hbm_bytes=module.hbm_bytes,
    hbm_bytes_min=hbm_bytes_min,
    xla_ms=module.xla_cycles / chip_of(facts["topology"]).hertz * 1e3,
    kernels=tuple(sorted({_plain(name) for name in module.kernels})),
    collectives=module.collectives,
    compile_seconds=seconds,
  )


def _plain(kernel: str) -> str:
  """The name of a kernel without the number of its call."""
  return kernel.rpartition(".")[0] or kernel


def _bytes_here(tree: Any) -> int:
  """Bytes that a chip holds of placed arrays."""
  of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(of, jax.tree.leaves(tree)))
