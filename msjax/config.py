"""The typed config tree of a run: every field, its default, its unit, and one check of it all.

`configs/*.py` hold `get_config() -> Config`; a command line changes fields by
`--config.train.steps=1000`. Nothing else has defaults.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any

from msjax.errors import InputError, nearest
from msjax.streams import SAME_ROW, Stream, Streams

FORMAT_VERSION = 1
REMAT = ("auto", "none", "dots", "qkv", "attention", "full")
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
TYPE_WORDS[tuple[str, ...]] = "a tuple of texts, as in ('a', 'b')"


@dataclasses.dataclass
class RopeScaling:
  """Llama 3's change of RoPE frequencies for contexts longer than the one trained on."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192


@dataclasses.dataclass
class ModelConfig:
  """A decoder that is Qwen3, Qwen2.5 or Llama by these fields.

  Qwen3: `qk_norm`. Qwen2.5: `qkv_bias`. Llama: neither.
  """

  vocab_size: int = 0  # V, of a tokenizer.json whose embedding has more rows; 0: the tokenizer's
  dim: int = 64  # D
  layers: int = 2
  heads: int = 2  # N, query heads
  kv_heads: int = 2  # K, divides heads
  head_dim: int = 32  # H, even
  mlp_dim: int = 192  # F
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-6
  qk_norm: bool = True  # RMSNorm over each head's query and key
  qkv_bias: bool = False
  out_bias: bool = False  # bias of the attention's output projection
  mlp_bias: bool = False
  tied_head: bool = True  # the output matrix is the embedding
  attention_dropout: float = 0.0
  # What is kept for the backward pass, which computes the rest again: none: keeps all but weights
  # from other chips; dots: products and attention; qkv: those of the projections, and attention;
  # attention: its outputs; full: nothing; auto: the first from dots on that the compiler finds to
  # fit into memory, which it tells on TPU alone; elsewhere dots.
  remat: str = "auto"
  dtype: str = "auto"  # of activations: float32, bfloat16; auto: float32 on CPU, else bfloat16


@dataclasses.dataclass
class DataConfig:
  """What is trained on, and how it becomes grids."""

  source: str = "jsonl"  # jsonl, or a built-in one: arithmetic, chitchat
  train: str = ""  # jsonl: file of messages, spans or tables
  valid: str = ""  # jsonl: held-out file; empty: no evaluation
  tokenizer: str = "bytes"  # bytes, bpe:SIZE (trained on the training text), or a tokenizer.json
  silence: str = ""  # silence token of a tokenizer.json, where the official rule finds none
  rows: int = 256  # R of a batch; longer examples are cut into windows of so many rows
  pack: bool = False  # several examples into one sequence, kept apart as segments
  layout: str = "turn"  # of messages: turn, wait_k, timestamps
  wait_k: int = 0  # rows from the start of a question to its answer; 0: the least possible
  rows_per_second: float = 1.0  # timestamps: how fast rows pass
  max_pause: float = 8.0  # timestamps: longer silences between messages are cut to this, seconds
  end_token: bool = True  # whether <end> follows each message
  end: str = ""  # end token of a tokenizer.json that has none of the usual names
  on_bad_record: str = "stop"  # or skip: count, list and go on
  only_one_stream: bool = False  # show each stream alone, the others as holes (a baseline)
  min_ops: int = 2  # arithmetic: operations in a question, at least
  max_ops: int = 10  # and at most
  chat: bool = False  # arithmetic: lay question, thoughts and answer one after another


@dataclasses.dataclass
class LossConfig:
  """Loss = sum of weight x (cross-entropy + z_loss x logsumexp^2) over the sum of weights."""

  silence_weight: float = 1.0  # factor for cells that predict silence
  z_loss: float = 0.0
  label_smoothing: float = 0.0


@dataclasses.dataclass
class OptimConfig:
  """AdamW; matrices decay, norms, biases and stream embeddings do not."""

  learning_rate: float = 1e-3
  stream_learning_rate: float = 0.0  # of the stream embedding; 0: the same
  schedule: str = "constant"  # after warm-up: constant (with cooldown), or cosine
  warmup_steps: int = 0
  cooldown_steps: int = 0  # constant: linear towards 0 over so many last steps
  final_fraction: float = 0.0  # cosine: of learning_rate, reached when all steps are taken
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # global gradient norm; 0: no clipping


@dataclasses.dataclass
class TrainConfig:
  """The loop."""

  steps: int = 1000
  batch: int = 32  # sequences a step, over all processes and micro-batches
  micro_batches: int = 1  # a step's batch goes through the device in so many parts
  seed: int = 0
  log_every: int = 50  # steps
  eval_every: int = 0  # steps; 0: at the end only
  eval_batches: int = 0  # held-out batches of `batch` that an evaluation reads; 0: all of it
  save_every: int = 500  # steps
  keep: int = 2  # latest checkpoints kept, the best by held-out loss besides
  read_threads: int = 4
  # Without the end of a step until the stacks of all threads are written to WORKDIR/stalls; 0:
  # never. Longer than a step or a read should ever take; a false alarm costs a line in the log.
  stall_seconds: float = 300.0
  profile_first_step: int = 0  # of a profiler trace, written to WORKDIR/profile; 0: none
  profile_last_step: int = 0


@dataclasses.dataclass
class MeshConfig:
  """How the chips of a run are used; their product is the number of chips.

  `fsdp` cuts parameters, optimizer and batch; `data` the batch alone, for more chips than that is
  good for; `model` heads and MLP, for fewer sequences than chips. Where `fsdp` is more than 1,
  gradients of matrices are summed over its chips in the dtype of activations.
  """

  slices: int = 1  # TPU slices, joined by the slower data-centre network: the batch is cut
  data: int = 1
  fsdp: int = 0  # 0: all chips that the others leave
  model: int = 1  # divides kv_heads and mlp_dim


@dataclasses.dataclass
class Config:
  """One run. `workdir` stands in for --workdir where it is not given."""

  workdir: str = ""
  streams: tuple[str, ...] = ("user:input", "output:output")  # name:kind or name:kind:weight
  same_row: str = "hidden"  # what a cell sees of its own row: hidden, inputs, ordered, visible
  skip_silence: bool = False  # silent cells are hidden from all others
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  loss: LossConfig = dataclasses.field(default_factory=LossConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  init_from: str = ""  # work directory of another run whose latest parameters to start from
  report: str = ""  # what is measured and shown at the end: arithmetic, likelihood, or nothing
  baseline: dict[str, Any] = dataclasses.field(default_factory=dict)
  # baseline: dotted field -> value; the same run with these changed is trained under
  # WORKDIR/baseline, and the report sets both side by side.

  def validate(self) -> None:
    """Checks every constraint between and within fields; names field, value and what is allowed."""
    _check_types(self)
    check_model(self.model)
    _check_data(self.data)
    _not_negative(self.loss, "loss", "silence_weight z_loss label_smoothing")
    _fractions(self.loss, "loss", "label_smoothing")
    _check_optim(self.optim, self.train.steps)
    _check_train(self.train)
    _positive(self.mesh, "mesh", "slices data model")
    _not_negative(self.mesh, "mesh", "fsdp")
    _one_of("same_row", self.same_row, SAME_ROW)
    self._check_sources()
    streams = self.stream_set(silence_id=0)
    _check(streams.weights.any(), "streams", self.streams, "one with a loss weight above 0")
    if self.data.layout == "wait_k":
      k, lag = self.data.wait_k, streams.lag
      expected = f"0 or at least {lag} with same_row={self.same_row}"
      _check(k == 0 or k >= lag, "data.wait_k", k, expected)
    if self.baseline:
      try:
        self.baseline_run().validate()
      except InputError as error:
        raise InputError(f"config.baseline: {error}") from None

  def _check_sources(self) -> None:
    """Checks that a run has the data that it is to learn from and be measured on."""
    d = self.data
    if d.source == "jsonl":
      _check(bool(d.train), "data.train", d.train, "a JSONL file to train on")
    else:
      for name in ("train", "valid"):
        expected = f"no file with data.source={d.source}; set data.source=jsonl to read it"
        _check(not getattr(d, name), f"data.{name}", getattr(d, name), expected)
    _one_of("report", self.report, ("", "arithmetic", "likelihood"))
    if self.report == "arithmetic":
      expected = "data.source=arithmetic beside it"
      _check(d.source == "arithmetic", "report", self.report, expected)
    if self.report == "likelihood":
      held_out_text = d.source == "chitchat" or (d.source == "jsonl" and bool(d.valid))
      expected = "held-out text beside it, as by data.valid=FILE"
      _check(held_out_text, "report", self.report, expected)
    if d.source == "arithmetic":
      expected = "at least 1, for arithmetic never runs out of held-out questions"
      _check(self.train.eval_batches > 0, "train.eval_batches", self.train.eval_batches, expected)

  def baseline_run(self) -> "Config":
    """Returns the run that the report sets beside this one."""
    return self.changed({"init_from": "", **self.baseline, "baseline": {}, "report": ""})

  def stream_set(self, silence_id: int) -> Streams:
    """Returns the run's streams and rule, for a tokenizer with this silence token."""
    return Streams(
      tuple(Stream.parse(s) for s in self.streams), silence_id, self.same_row, self.skip_silence
    )

  def changed(self, changes: dict[str, Any]) -> "Config":
    """Returns a copy with dotted fields set, as in `{"train.steps": 10}`; not validated."""
    copy = Config.from_json(self.to_json())
    for name, value in changes.items():
      field_type(name)
      *path, last = name.split(".")
      setattr(functools.reduce(getattr, path, copy), last, value)
    return copy

  def to_json(self) -> dict[str, Any]:
    """Returns what `config.json` holds."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> "Config":
    """Reads what `to_json` wrote; a field that this msjax does not know is an error."""
    data = json.loads(json.dumps(data))
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
      raise InputError(f"config.json: format_version {version}, this msjax reads {FORMAT_VERSION}")
    return _build(cls, data, "config")


def _build(cls, data: dict[str, Any], path: str):
  """Makes a dataclass from parsed JSON, nested ones too."""
  hints = typing.get_type_hints(cls)
  values = {}
  for name, value in data.items():
    if name not in hints:
      raise InputError(f"{path}.{name}: no such field{nearest(name, hints)}")
    nested = nested_dataclass(hints[name])
    if nested and value is not None:
      value = _build(nested, value, f"{path}.{name}")
    elif isinstance(value, list):
      value = tuple(value)
    values[name] = value
  return cls(**values)


def field_type(name: str) -> Any:
  """Returns the declared type of a dotted field; where there is none, names the nearest."""
  hint, path = Config, "config"
  for part in name.split("."):
    owner = nested_dataclass(hint)
    if owner is None:
      raise InputError(f"config.{name}: {path} has no fields")
    hints = typing.get_type_hints(owner)
    if part not in hints:
      known = nearest(part, hints) or f"; there are {', '.join(hints)}"
      raise InputError(f"config.{name}: no such field as {part!r}{known}")
    hint, path = hints[part], f"{path}.{part}"
  return hint


def nested_dataclass(hint) -> type | None:
  """The dataclass in a field's type (`X` or `X | None`), if it is one."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return next((o for o in options if dataclasses.is_dataclass(o)), None)


def check_model(m: ModelConfig) -> None:
  """Raises for a model that cannot be built."""
  _positive(m, "model", "dim layers heads kv_heads head_dim mlp_dim rope_theta norm_eps")
  _not_negative(m, "model", "vocab_size")
  _fractions(m, "model", "attention_dropout")
  _one_of("model.remat", m.remat, REMAT)
  _one_of("model.dtype", m.dtype, ("auto", "float32", "bfloat16"))
  divides = m.heads % m.kv_heads == 0
  _check(divides, "model.kv_heads", m.kv_heads, f"a divisor of heads ({m.heads})")
  _check(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "even, for RoPE")
  if m.rope_scaling is not None:
    names = "factor low_freq_factor high_freq_factor original_max_position"
    _positive(m.rope_scaling, "model.rope_scaling", names)
    low, high = m.rope_scaling.low_freq_factor, m.rope_scaling.high_freq_factor
    expected = f"less than high_freq_factor ({high})"
    _check(low < high, "model.rope_scaling.low_freq_factor", low, expected)


def _check_data(d: DataConfig) -> None:
  _positive(d, "data", "rows rows_per_second max_pause min_ops max_ops")
  _not_negative(d, "data", "wait_k")
  _one_of("data.source", d.source, ("jsonl", "arithmetic", "chitchat"))
  _one_of("data.layout", d.layout, ("turn", "wait_k", "timestamps"))
  _one_of("data.on_bad_record", d.on_bad_record, ("stop", "skip"))
  _check(d.min_ops <= d.max_ops, "data.min_ops", d.min_ops, f"at most data.max_ops ({d.max_ops})")
  if d.layout != "wait_k":
    _check(d.wait_k == 0, "data.wait_k", d.wait_k, f"0 with data.layout={d.layout}")


def _check_optim(o: OptimConfig, steps: int) -> None:
  _positive(o, "optim", "learning_rate eps")
  _not_negative(
    o,
    "optim",
    "stream_learning_rate warmup_steps cooldown_steps final_fraction weight_decay clip_norm",
  )
  _fractions(o, "optim", "b1 b2")
  _one_of("optim.schedule", o.schedule, ("constant", "cosine"))
  both = o.warmup_steps + o.cooldown_steps
  expected = f"at most train.steps ({steps})"
  _check(both <= steps, "optim.warmup_steps + optim.cooldown_steps", both, expected)


def _check_train(t: TrainConfig) -> None:
  _positive(t, "train", "steps batch micro_batches log_every save_every keep read_threads")
  _not_negative(t, "train", "seed eval_every eval_batches stall_seconds profile_first_step")
  divides = t.batch % t.micro_batches == 0
  expected = f"a divisor of train.batch ({t.batch})"
  _check(divides, "train.micro_batches", t.micro_batches, expected)
  first, last = t.profile_first_step, t.profile_last_step
  _check(first <= t.steps, "train.profile_first_step", first, f"at most train.steps ({t.steps})")
  expected = f"at least profile_first_step ({first}), or 0 where that is 0"
  _check(first <= last if first else last == 0, "train.profile_last_step", last, expected)


def _check_types(owner: Any, prefix: str = "") -> None:
  """Checks that every field holds what its type says, those of nested dataclasses too."""
  for name, hint in typing.get_type_hints(type(owner)).items():
    value, nested = getattr(owner, name), nested_dataclass(hint)
    if nested is not None and isinstance(value, nested):
      _check_types(value, f"{prefix}{name}.")
    else:
      _check(_is_a(value, hint), prefix + name, value, TYPE_WORDS.get(hint, str(hint)))


def _is_a(value: Any, hint: Any) -> bool:
  """Whether a value is of a field's type; a whole number is a number too, a bool is neither."""
  if typing.get_origin(hint) is tuple:
    return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
  if isinstance(hint, types.UnionType):
    return isinstance(value, hint)
  kind = (int, float) if hint is float else typing.get_origin(hint) or hint
  return isinstance(value, kind) and isinstance(value, bool) == (hint is bool)


def _check(ok: bool, name: str, value: Any, expected: str) -> None:
  if not ok:
    raise InputError(f"config.{name}: {value!r} is not allowed; expected {expected}")


def _positive(owner, prefix: str, names: str) -> None:
  for name in names.split():
    value = getattr(owner, name)
    _check(0 < value < math.inf, f"{prefix}.{name}", value, "a positive number")


def _not_negative(owner, prefix: str, names: str) -> None:
  for name in names.split():
    value = getattr(owner, name)
    _check(0 <= value < math.inf, f"{prefix}.{name}", value, "zero or a positive number")


def _fractions(owner, prefix: str, names: str) -> None:
  for name in names.split():
    value = getattr(owner, name)
    _check(0 <= value < 1, f"{prefix}.{name}", value, "at least 0 and below 1")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    listed = ", ".join(a or "(empty)" for a in allowed)
    raise InputError(
      f"config.{name}: {value!r} is not allowed; expected one of {listed}{nearest(value, allowed)}"
    )
