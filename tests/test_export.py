"""Folders of ours, as transformers and msjax read them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

import msjax
from msjax.config import Config, ModelConfig, RopeScaling
from msjax.errors import InputError
from msjax.hub.export import export, verify
from msjax.hub.names import STREAM_EMBEDDING
from msjax.model import Model
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.checkpoint import save_params
from msjax.training.state import Learner
from msjax.workdir import WorkDir

BPE = train_bpe(["to be - or not to be"], 300)
SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 24}
FAMILIES = {
  "qwen3": {"qk_norm": True},
  "qwen3_biased": {"qk_norm": True, "qkv_bias": True, "out_bias": True, "tied_head": False},
  "qwen2": {"qk_norm": False, "qkv_bias": True},
  "llama": {
    "qk_norm": False,
    "tied_head": False,
    "rope_scaling": RopeScaling(original_max_position=64),
  },
  "llama_biased": {"qk_norm": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def model_of(family="qwen3", **fields):
  """A model of random weights, none of them 0."""
  cfg = ModelConfig(**{**SIZES, **FAMILIES[family], **fields}, dtype="float32")
  config = Config(streams=("user:input", "think:internal:0.5", "output:output"), model=cfg)
  config.same_row, config.data.train = "inputs", "train.jsonl"
  streams = config.stream_set(BPE.silence_id)
  learner = Learner(config, streams, BPE.vocab_size)
  rng = np.random.default_rng(0)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  params = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), like)
  return Model(config, streams, BPE, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_folded_model_and_computes_the_same(tmp_path, family):
  model = model_of(family)
  export(model, tmp_path / "out", layout="folded", stream="output", dtype="float32")
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  text = np.random.default_rng(0).integers(0, BPE.vocab_size, (2, 11))
  tokens = np.full((2, 11, 3), -1)
  tokens[:, :, 2] = text
  with torch.no_grad():
    expected = theirs(torch.from_numpy(text)).logits.numpy()
  np.testing.assert_allclose(model.logits(tokens)[:, :, 2], expected, atol=1e-4, rtol=0)


def test_transformers_reads_a_stream_model_but_for_its_streams(tmp_path):
  export(model_of(), tmp_path / "out", dtype="float32")
  _, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == (
    set(),
    {STREAM_EMBEDDING},
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert tokenizer.encode("to be or not") == BPE.encode("to be or not")
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (BPE.end_id, BPE.pad_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_back_is_what_went_out_bit_for_bit(tmp_path, family):
  model = model_of(family)
  export(model, tmp_path / "out", dtype="float32", shard_bytes=4000)
  again = msjax.load(tmp_path / "out")
  assert again.streams == model.streams
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  fields = {"vocab_size": BPE.vocab_size, "dtype": "auto"}
  assert (
    again.config.model
    == model.config.changed({f"model.{name}": value for name, value in fields.items()}).model
  )
  files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  large = [file for file in files if (tmp_path / "out" / file).stat().st_size > 6_000]
  assert len(large) == 1 + (not model.config.model.tied_head)  # a tensor is never cut


@pytest.mark.parametrize("layout, stream", [("stream", None), ("folded", "output")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verifying_finds_what_differs(tmp_path, layout, stream, dtype):
  model = model_of(tied_head=True)
  export(model, tmp_path / "out", layout=layout, stream=stream, dtype=dtype)
  same = verify(model, tmp_path / "out", stream)
  assert same.good(dtype)
  assert (same.max_difference < 1e-4) == (dtype == "float32")
  params = jax.tree.map(lambda p: p, model.params)
  params["norm"] = -params["norm"]
  other = Model(model.config, model.streams, model.tokenizer, params)
  assert not verify(other, tmp_path / "out", stream).good(dtype)


def test_the_command_exports_and_verifies(tmp_path):
  model, workdir = model_of(), WorkDir(tmp_path / "run")
  with workdir.lock():
    workdir.describe(model.config, model.streams, model.tokenizer)
    save_params(workdir.checkpoints, model.params)
  words = [f"--workdir={workdir.path}", f"--to={tmp_path / 'out'}", "--verify", "--json"]
  command = [sys.executable, "-m", "msjax.export_hf", *words]
  done = subprocess.run(command, capture_output=True, text=True, timeout=180)
  assert (done.returncode, done.stderr) == (0, "")
  assert json.loads(done.stdout)["same_likeliest"] > 0.9
  manifest = json.loads((tmp_path / "out" / "msjax_manifest.json").read_text())
  assert set(manifest["sha256"]) == {
    path.name for path in (tmp_path / "out").iterdir() if path.name != "msjax_manifest.json"
  }
  again = subprocess.run(command, capture_output=True, text=True, timeout=180)
  assert again.returncode == 2 and "out: exists; expected the name of a folder" in again.stderr


def test_nothing_is_left_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("msjax.hub.export.write_safetensors", full)
  with pytest.raises(OSError, match="No space left"):
    export(model_of(), tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_what_no_family_computes_is_told(tmp_path):
  with pytest.raises(
    InputError, match=r"qk_norm=True, .*mlp_bias=True: none of qwen3, qwen2, llama"
  ):
    export(model_of(mlp_bias=True), tmp_path / "out")
  with pytest.raises(InputError, match="stream: not given; layout folded speaks one of"):
    export(model_of(), tmp_path / "out", layout="folded")
