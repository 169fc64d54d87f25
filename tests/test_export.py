"""Folders of ours, as transformers and msjax read them."""

import hashlib
import json
import resource
import subprocess
import sys

import forked
import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import msjax
from msjax.config import Config, ModelConfig, RopeScaling
from msjax.errors import InputError, RunError
from msjax.hub.export import export, open_run
from msjax.hub.import_ import import_checkpoint, read_checkpoint
from msjax.hub.names import STREAM_EMBEDDING
from msjax.hub.verify import verify
from msjax.model import Model
from msjax.text.hf_tokenizer import HfTokenizer, train_bpe
from msjax.text.tokenizer import ByteTokenizer
from msjax.training.checkpoint import save_params
from msjax.training.loop import train
from msjax.training.state import Learner
from msjax.workdir import WorkDir

BPE = train_bpe(["to be - or not to be"], 300)
DASH = HfTokenizer(BPE.to_json(), silence="Ġ-")  # whose silence is the official release's
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
pytestmark = pytest.mark.usefixtures("compiled_once")


def model_of(family="qwen3", tokenizer=BPE, same_row="inputs", skip_silence=False, **fields):
  """A model of random weights, none of them 0."""
  cfg = ModelConfig(**{**SIZES, **FAMILIES[family], **fields}, dtype="float32")
  config = Config(streams=("user:input", "think:internal:0.5", "output:output"), model=cfg)
  config.same_row, config.skip_silence, config.data.train = same_row, skip_silence, "train.jsonl"
  streams = config.stream_set(tokenizer.silence_id)
  learner = Learner(config, streams, tokenizer.vocab_size)
  rng = np.random.default_rng(0)
  like = jax.eval_shape(learner.init, jax.random.key(0)).params
  params = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), like)
  return Model(config, streams, tokenizer, params)


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


@pytest.mark.parametrize(
  "layout, stream", [("stream", None), ("folded", "output"), ("reference", None)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verifying_finds_what_differs(tmp_path, layout, stream, dtype):
  model = model_of(tokenizer=DASH, same_row="hidden", tied_head=True)
  export(model, tmp_path / "out", layout=layout, stream=stream, dtype=dtype)
  same = verify(model, tmp_path / "out")
  assert same.good and same.beyond_rounding < 1e-4
  assert (same.max_difference < 1e-4) == (dtype == "float32")
  params = jax.tree.map(lambda p: p, model.params)
  params["norm"] = -params["norm"]
  other = Model(model.config, model.streams, model.tokenizer, params)
  assert not verify(other, tmp_path / "out").good


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verifying_finds_a_slip_in_the_config(tmp_path, dtype):
  model = model_of()
  model.config.model.dtype = "bfloat16"  # in which training computes; verifying does not
  export(model, tmp_path / "out", dtype=dtype)
  assert verify(model, tmp_path / "out").good
  config = read(tmp_path / "out", "config.json")
  config["rope_parameters"]["rope_theta"] *= 1.2
  (tmp_path / "out" / "config.json").write_text(json.dumps(config))
  assert not verify(model, tmp_path / "out").good


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"layout": "folded"}, "--stream: not given; layout folded speaks one of user, think, output"),
    ({"stream": "userr"}, "--stream: 'userr', but layout stream holds all streams"),
    ({"layout": "stram"}, "layout 'stram': expected .*did you mean 'stream'"),
    ({"dtype": "float16"}, "dtype 'float16': expected float32 or bfloat16"),
    ({"layout": "folded", "stream": "user"}, "layout folded: the run has skip_silence"),
  ],
)
def test_an_export_that_would_be_another_model_is_refused(tmp_path, options, told):
  with pytest.raises(InputError, match=told):
    export(model_of(skip_silence=True), tmp_path / "out", **options)
  assert not list(tmp_path.iterdir())


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
  again = forked.run("msjax.export_hf", *words)
  assert again.returncode == 2 and "out: exists; expected the name of a folder" in again.stderr


@pytest.mark.parametrize("missing", [1, 20_000])
def test_nothing_is_left_of_a_folder_when_the_disk_is_full(tmp_path, missing):
  model = model_of()
  export(model, tmp_path / "whole", dtype="float32")
  (weights,) = (tmp_path / "whole").glob("*.safetensors")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size - missing, hard))
  try:
    with pytest.raises(RunError) as raised:
      export(model, tmp_path / "out", dtype="float32")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert str(raised.value) == f"{tmp_path / 'out'}: cannot be written: File too large"
  assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_no_family_computes_is_told(tmp_path):
  with pytest.raises(
    InputError, match=r"qk_norm=True, .*mlp_bias=True, .*: none of qwen3, qwen2, llama"
  ):
    export(model_of(mlp_bias=True), tmp_path / "out")


def read(folder, name):
  return json.loads((folder / name).read_text())


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


# The official release's layout.


def test_the_release_finds_all_that_it_looks_for(tmp_path):
  model = model_of(tokenizer=DASH, same_row="hidden")
  export(model, tmp_path / "out", layout="reference", dtype="float32")
  config = read(tmp_path / "out", "config.json")
  extra = {
    "num_channels": 3,
    "channel_embedding_method": "additive",
    "role_gating_enabled": False,
    "medusa_num_heads": 0,
    "medusa_num_layers": 0,
  }
  assert config.items() >= extra.items() and "auto_map" not in config
  assert not (tmp_path / "out" / "modeling_msjax.py").exists()
  again = read_checkpoint(tmp_path / "out")
  gates = tuple(f"model.layers.{i}.self_attn.gate_in_norm.weight" for i in range(2))
  assert (again.unused, again.stream_embedding) == (gates, "checkpoint")
  (file,) = (tmp_path / "out").glob("*.safetensors")
  for gate in gates:
    np.testing.assert_array_equal(load_file(file)[gate], np.ones(16, np.float32))
  loaded = Model(*again[:4])
  assert loaded.streams == model.streams
  tokens = np.random.default_rng(0).integers(0, BPE.vocab_size, (2, 9, 3))
  np.testing.assert_array_equal(loaded.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
  ("model", "told"),
  [
    (lambda: model_of("llama", DASH), "a llama model; the official release loads qwen3 only"),
    (lambda: model_of("qwen2", DASH), "a qwen2 model; the official release loads qwen3 only"),
    (lambda: model_of(tokenizer=DASH), "same_row=inputs, skip_silence=False; the official"),
    (
      lambda: model_of(tokenizer=DASH, same_row="hidden", skip_silence=True),
      "same_row=hidden, skip_silence=True; the official",
    ),
    (
      lambda: model_of(same_row="hidden"),
      "silence is '<silence>', but the official release takes the first token",
    ),
    (
      lambda: model_of(tokenizer=ByteTokenizer(), same_row="hidden"),
      "silence is '<silence>', but the official release takes the first token",
    ),
  ],
)
def test_what_the_release_would_compute_otherwise_is_refused(tmp_path, model, told):
  with pytest.raises(InputError, match=f"^layout reference: {told}"):
    export(model(), tmp_path / "out", layout="reference")
  assert not list(tmp_path.iterdir())


# What lay beside the tensors.

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}ü"
CHAT = [{"role": "user", "content": "to be?"}, {"role": "assistant", "content": "not"}]


def written(data):
  """JSON as no library writes it."""
  return json.dumps(data, indent=3).encode() + b"\n\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """A folder with all that may lie there, imported, and a run that started from it."""
  path = tmp_path_factory.mktemp("tuned")
  export(model_of(layers=1), path / "source")
  sides = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Theirs\n",
    "tokenizer_config.json": written({"tokenizer_class": "Qwen2Tokenizer", "chat_template": "x"}),
    "chat_template.jinja": b"x",
    "special_tokens_map.json": written({"eos_token": "<end>"}),
    "added_tokens.json": written({}),
    "merges.txt": b"#version: 0.2\r\n",
    "vocab.json": written({}),
    "generation_config.json": written({"temperature": 0.6, "eos_token_id": [2, 9]}),
    "tokenizer.json": json.dumps(json.loads(BPE.to_json()), indent=1).encode() + b"\n",
  }
  for name, content in sides.items():
    (path / "source" / name).write_bytes(content)
  base, run = WorkDir(path / "base"), WorkDir(path / "run")
  import_checkpoint(read_checkpoint(path / "source"), base)
  record = {"messages": [{"role": role, "content": "to be"} for role in ("user", "assistant")]}
  (path / "train.jsonl").write_text(json.dumps(record))
  changes = {"init_from": str(base.path), "data.train": str(path / "train.jsonl"), "data.rows": 16}
  train(base.config().changed({**changes, "train.steps": 1, "train.batch": 1}), run)
  return path / "source", run


def test_files_come_through_training_byte_for_byte(tuned, tmp_path):
  source, run = tuned
  export(open_run(run), tmp_path / "out", files=run.hub_files())
  before, after = contents(source), contents(tmp_path / "out")
  changed = {name for name in before if before[name] != after.get(name)}
  weights = {name for name in before if "safetensors" in name}
  assert changed - weights == {"README.md", "generation_config.json", "msjax_manifest.json"}
  assert huggingface_hub.ModelCard(after["README.md"].decode()).data.license == "apache-2.0"
  assert "| 1 | think | internal | 0.5 |" in after["README.md"].decode()
  generation = {"temperature": 0.6, "eos_token_id": [2, 9], "pad_token_id": 1}
  assert json.loads(after["generation_config.json"]) == generation


@pytest.mark.parametrize(("layout", "stream"), [("stream", None), ("folded", "think")])
def test_a_run_on_disk_and_a_model_in_memory_are_exported_alike(tuned, tmp_path, layout, stream):
  run = tuned[1]
  assert (run.checkpoints / "1" / "params" / "manifest.ocdbt").exists()
  options = {"layout": layout, "stream": stream, "shard_bytes": 9_000, "files": run.hub_files()}
  export(open_run(run), tmp_path / "disk", **options)
  export(msjax.load(run.path), tmp_path / "memory", **options)
  assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1
  assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


@pytest.mark.parametrize("end_token", [False, True])
def test_messages_end_as_they_did_in_training(tmp_path, end_token):
  model = model_of()
  model.config.data.end_token = end_token
  export(model, tmp_path / "out")
  rows = msjax.load(tmp_path / "out").generate({"user": "to"}, rows=9)
  assert any(row.tokens["user"] == BPE.end_id for row in rows) == end_token


def test_the_card_tells_of_training_where_there_was_any(tmp_path):
  for step in (0, 7):
    export(model_of(), tmp_path / str(step), step=step)
  cards = [(tmp_path / name / "README.md").read_text() for name in ("0", "7")]
  assert ["## Training" in card for card in cards] == [False, True]


def test_what_ended_a_text_at_the_source_still_does(tmp_path):
  source = {"config.json": b'{"eos_token_id": 9}', "README.md": b"--- \nlicense: mit\n---  \n"}
  export(model_of(), tmp_path / "out", files=source)
  assert read(tmp_path / "out", "generation_config.json")["eos_token_id"] == [BPE.end_id, 9]
  assert "\nlicense: mit\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_manifest_digests_every_file(tmp_path):
  export(model_of(), tmp_path / "out", shard_bytes=9_000, step=7)
  manifest = read(tmp_path / "out", "msjax_manifest.json")
  files = contents(tmp_path / "out")
  del files["msjax_manifest.json"]
  digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
  assert manifest["sha256"] == digests
  told = {"layout": "stream", "dtype": "bfloat16", "step": 7, "msjax": msjax.__version__}
  assert manifest.items() >= told.items()


@pytest.mark.parametrize(
  "files",
  [
    {"chat_template.jinja": TEMPLATE.encode()},
    {"tokenizer_config.json": written({"chat_template": TEMPLATE})},
    {
      "chat_template.jinja": TEMPLATE.encode(),
      "tokenizer_config.json": written({"chat_template": "an older one", "eos_token": "<end>"}),
    },
  ],
  ids=["file", "config", "both"],
)
def test_the_chat_template_is_found_wherever_it_is_sought(tmp_path, files):
  export(model_of(), tmp_path / "out", files=files)
  assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
  assert read(tmp_path / "out", "tokenizer_config.json")["chat_template"] == TEMPLATE
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  text = "[user] to be?\n[assistant] not\nü"
  assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
  assert tokenizer.apply_chat_template(CHAT)["input_ids"] == BPE.encode(text)


def test_without_a_chat_template_there_is_none(tmp_path):
  several = [{"name": "default", "template": TEMPLATE}]
  for name, files in (
    ("none", {}),
    ("several", {"tokenizer_config.json": written({"chat_template": several})}),
  ):
    export(model_of(), tmp_path / name, files=files)
    assert not (tmp_path / name / "chat_template.jinja").exists()
    config = read(tmp_path / name, "tokenizer_config.json")
    assert config.get("chat_template") == (several if files else None)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ("TokenizersBackend", "PreTrainedTokenizerFast"),
    (None, "PreTrainedTokenizerFast"),
    ("Qwen2Tokenizer", "Qwen2Tokenizer"),
  ],
)
def test_the_tokenizer_is_of_a_class_that_all_versions_know(tmp_path, before, after):
  source = {"tokenizer_class": before, "model_max_length": 99}
  source = {name: value for name, value in source.items() if value is not None}
  export(model_of(), tmp_path / "out", files={"tokenizer_config.json": written(source)})
  found = read(tmp_path / "out", "tokenizer_config.json")
  assert found == {**source, "tokenizer_class": after}


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ({}, [2]),
    ({"eos_token_id": None}, [2]),
    ({"eos_token_id": 0}, [2, 0]),
    ({"eos_token_id": [9, 2, 5]}, [2, 9, 5]),
  ],
)
def test_a_text_ends_where_it_did_and_where_messages_do(tmp_path, before, after):
  source = {**before, "top_k": 20, "pad_token_id": 7}
  export(model_of(), tmp_path / "out", files={"generation_config.json": written(source)})
  generation = read(tmp_path / "out", "generation_config.json")
  assert generation == {"top_k": 20, "eos_token_id": after, "pad_token_id": BPE.pad_id}


def test_some_of_the_config_is_kept(tmp_path):
  kept = {"max_position_embeddings": 77, "bos_token_id": 0, "initializer_range": 0.5}
  source = {**kept, "hidden_size": 1, "use_cache": False}
  export(model_of(), tmp_path / "out", files={"config.json": written(source)})
  found = read(tmp_path / "out", "config.json")
  assert found.items() >= kept.items()
  assert found["hidden_size"] == 16 and "use_cache" not in found
  export(model_of(), tmp_path / "null", files={"config.json": written({"bos_token_id": None})})
  assert "bos_token_id" not in read(tmp_path / "null", "config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_broken_file_of_the_source_is_named(tmp_path, name):
  with pytest.raises(InputError, match=f"^{name} of the imported checkpoint is no JSON: .*; mend"):
    export(model_of(), tmp_path / "out", files={name: b"{"})
  assert not list(tmp_path.iterdir())
