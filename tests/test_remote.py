"""The code that an export carries, as people with torch and transformers use it."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from msjax.config import Config, ModelConfig, RopeScaling
from msjax.decoding.engine import fill
from msjax.decoding.tick import FREE
from msjax.hub.export import export
from msjax.hub.names import STREAM_EMBEDDING
from msjax.model import Model
from msjax.streams import HOLE, SAME_ROW
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.state import Learner

BPE = train_bpe(["to be - or not to be"], 300)
SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 24}
FAMILIES = {
  "Qwen3": {"qk_norm": True},
  "Qwen2": {"qk_norm": False, "qkv_bias": True},
  "Llama": {"qk_norm": False, "rope_scaling": RopeScaling(original_max_position=64)},
}
STREAMS = ("think:internal", "user:input", "output:output", "tool:input")  # inputs not first
ROWS, WORDS, MORE, BREAK_IN = 50, [7, 8, 9, 10], [11, 12, 13], 20


@functools.cache  # with what it has compiled
def model_of(family, tied_head=True, streams=STREAMS):
  """A model of random weights."""
  cfg = ModelConfig(**{**SIZES, **FAMILIES[family]}, tied_head=tied_head, dtype="float32")
  config = Config(streams=streams, model=cfg, same_row="inputs")
  learner = Learner(config, config.stream_set(BPE.silence_id), BPE.vocab_size)
  rng = np.random.default_rng(0)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  params = jax.tree.map(lambda p: (0.5 * rng.normal(size=p.shape)).astype(np.float32), like)
  return Model(config, learner.streams, BPE, params)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Sooner done where products are small."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture
def remote(tmp_path, monkeypatch):
  """Exports a model and loads it as one with streams; also returns what the loading reports."""
  monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.syspath_prepend(str(tmp_path / "modules"))

  def load(model, **options):
    export(model, tmp_path / "out", dtype="float32")
    return transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out", trust_remote_code=True, output_loading_info=True, **options
    )

  return load


def grid():
  """Tokens [2, 9, S], some of them silence, some holes."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, BPE.vocab_size, (2, 9, len(STREAMS)))
  tokens[rng.random(tokens.shape) < 0.2] = BPE.silence_id
  tokens[rng.random(tokens.shape) < 0.2] = HOLE
  return tokens


def assert_same_logits(theirs, model, **rule):
  tokens = grid()
  ours = np.asarray(model.logits(tokens, **rule))
  assert np.ptp(ours) > 1 and not ours[tokens == HOLE].any()
  with torch.no_grad():
    logits = theirs.stream_logits(torch.from_numpy(tokens))
  assert logits.dtype == torch.float32
  np.testing.assert_allclose(logits.numpy(), ours, atol=1e-4, rtol=0)


@functools.cache
def greedy(model):
  """The rows that msjax's decoder writes, with words at row 0 and at BREAK_IN."""
  given = np.full((1, ROWS, len(STREAMS)), FREE, np.int32)
  given[:, :, [1, 3]] = BPE.silence_id
  given[0, : len(WORDS), 1] = WORDS
  given[0, BREAK_IN : BREAK_IN + len(MORE), 3] = MORE
  return fill(model.engine(), given)[0].tolist()


def cells(rows):
  return [list(row.values()) for row in rows]


def assert_likeliest(theirs, rows, written, first=1):
  """That streams which the model writes hold what one pass over all rows finds likeliest."""
  with torch.no_grad():
    likeliest = theirs.stream_logits(torch.tensor([rows]))[0].argmax(-1).tolist()
  for row in range(first, len(rows)):
    assert [rows[row][s] for s in written] == [likeliest[row - 1][s] for s in written]


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_computes_the_same(remote, family, tied_head):
  model = model_of(family, tied_head)
  theirs, report = remote(model)
  assert type(theirs).__name__ == f"Stream{family}ForCausalLM"
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert_same_logits(theirs, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_the_same_rows(remote, family):
  model = model_of(family)
  theirs, _ = remote(model)
  rows = theirs.generate_streams({"user": WORDS}, at=[(BREAK_IN, "tool", MORE)], rows=ROWS)
  expected = greedy(model)
  assert len(set(map(tuple, expected))) > 10
  assert cells(rows) == expected


def test_every_rule_is_that_of_msjax(remote):
  model = model_of("Qwen3")
  theirs, _ = remote(model)
  for same_row, skip_silence in itertools.product(SAME_ROW, (False, True)):
    rule = {"same_row": same_row, "skip_silence": skip_silence}
    theirs.config.msjax = {**theirs.config.msjax, **rule}
    assert_same_logits(theirs, model, **rule)
    rows = cells(theirs.generate_streams({"user": WORDS}, rows=8))
    assert_likeliest(theirs, rows, written=[0, 2])


def test_tokens_are_sent_while_rows_are_made(remote):
  model = model_of("Qwen3")
  theirs, _ = remote(model)
  rows = theirs.generate_streams({"user": WORDS}, rows=ROWS)
  made = list(itertools.islice(rows, BREAK_IN))
  made.append(rows.send({"tool": MORE}))
  assert list(made[0]) == ["think", "user", "output", "tool"]
  assert cells([*made, *rows]) == greedy(model)


def test_what_is_sent_waits_until_the_stream_is_read(remote):
  theirs, _ = remote(model_of("Qwen3"))
  rows = theirs.generate_streams({"user": WORDS}, at=[(5, "user", [21]), (2, "user", [20])], rows=9)
  first = next(rows)["user"]
  read = [first, rows.send({"user": torch.tensor(MORE)})["user"], *(row["user"] for row in rows)]
  assert read == [*WORDS, *MORE, 20, 21]


def test_a_model_without_inputs_reads_into_any_stream(remote):
  model = model_of("Qwen3", streams=("text:output", "notes:internal"))
  theirs, _ = remote(model)
  rows = cells(theirs.generate_streams({"text": np.array(WORDS)}, rows=12))
  assert [text for text, _ in rows[: len(WORDS)]] == WORDS
  assert_likeliest(theirs, rows, written=[1])
  assert_likeliest(theirs, rows, written=[0], first=len(WORDS))


def test_what_is_drawn_depends_on_the_seed_and_follows_the_logits(remote):
  theirs, _ = remote(model_of("Qwen3"))

  def drawn(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    return cells(theirs.generate_streams({}, (), 12, temperature, generator))

  assert drawn(0, 1.0) == drawn(0, 1.0) != drawn(1, 1.0)
  assert drawn(0, 1e-4) == drawn(1, 1e-4) == cells(theirs.generate_streams(rows=12))


def test_the_plain_model_stays_what_it_is(remote, tmp_path):
  theirs, _ = remote(model_of("Qwen3"))
  plain, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert type(plain) is transformers.Qwen3ForCausalLM
  assert not report["missing_keys"] and set(report["unexpected_keys"]) == {STREAM_EMBEDDING}
  ids = torch.tensor([WORDS])
  with torch.no_grad():
    assert torch.equal(theirs(ids).logits, plain(ids).logits)
  options = {"max_new_tokens": 6, "do_sample": False}
  assert torch.equal(theirs.generate(ids, **options), plain.generate(ids, **options))


def test_what_transformers_saves_loads_again(remote, tmp_path):
  theirs, _ = remote(model_of("Qwen3"))
  theirs.save_pretrained(tmp_path / "again")
  again, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "again", trust_remote_code=True, output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  with torch.no_grad():
    logits = [model.stream_logits(torch.from_numpy(grid())) for model in (theirs, again)]
  assert torch.equal(*logits)


def test_wrong_requests_are_told_at_once(remote):
  theirs, _ = remote(model_of("Qwen3"))
  for arguments, problem in [
    ({"inputs": {"usr": [1]}}, "stream 'usr' is unknown: there are think, user, output, tool"),
    ({"inputs": {"output": [1]}}, "stream 'output': the model writes it; .* put into user, tool"),
    ({"inputs": {"user": "hello"}}, "stream 'user': 'hello' is no token; expected a list of ids"),
    ({"inputs": {"user": [1, 300]}}, "stream 'user': 300 is no token; .* ids from 0 to 268"),
    ({"inputs": {"user": [1] * 9}, "rows": 8}, "rows: 8 end before the given text, which takes 9"),
    ({"at": [(-1, "user", [1])]}, "row -1: expected a whole number, 0 or more"),
    ({"rows": 0}, "rows: 0; expected a whole number, 1 or more"),
    ({"temperature": -1.0}, "temperature: -1.0; expected 0, the likeliest token, or more"),
  ]:
    with pytest.raises(ValueError, match=problem):
      theirs.generate_streams(**arguments)
  for shape, token in (
    ((2, 4), 1),
    ((1, 2, 3), 1),
    ((0, 2, 4), 1),
    ((1, 2, 4), 0.5),
    ((1, 2, 4), 269),
  ):
    with pytest.raises(ValueError, match=r"tokens: .*; expected integers \[B, R, 4\] from -1"):
      theirs.stream_logits(torch.full(shape, token))
  rows = theirs.generate_streams()
  next(rows)
  with pytest.raises(ValueError, match="stream 'think': the model writes it"):
    rows.send({"think": [1]})


def test_parameters_that_are_not_finite_are_told(remote):
  theirs, _ = remote(model_of("Qwen3"))
  theirs.model.norm.weight.data[0] = float("nan")
  rows = theirs.generate_streams()
  next(rows)
  with pytest.raises(RuntimeError, match="row 1: logits are not finite"):
    next(rows)


def test_attention_that_takes_no_mask_is_refused(remote):
  theirs, _ = remote(model_of("Qwen3"), attn_implementation="flex_attention")
  with pytest.raises(ValueError, match="'flex_attention'; streams need eager or sdpa"):
    theirs.stream_logits(torch.from_numpy(grid()))


def test_eager_attention_computes_the_same(remote):
  model = model_of("Qwen3")
  theirs, _ = remote(model, attn_implementation="eager")
  assert_same_logits(theirs, model)


def test_the_file_needs_torch_and_transformers_alone(tmp_path):
  export(model_of("Qwen3"), tmp_path / "out")
  file = tmp_path / "out" / "modeling_msjax.py"
  assert set(dynamic_module_utils.get_imports(file)) == {
    "collections",
    "math",
    "torch",
    "transformers",
  }


def test_a_folded_export_carries_no_code(tmp_path):
  export(model_of("Qwen3"), tmp_path / "out", layout="folded", stream="output")
  assert not list((tmp_path / "out").glob("*.py"))
  assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
