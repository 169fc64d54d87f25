"""A Hugging Face folder as a work directory: the official release's figures, and wrong folders."""

import fnmatch
import json
import pathlib
import shutil
import subprocess
import sys

import forked
import huggingface_hub
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import msjax
from msjax.errors import InputError
from msjax.hub.export import export
from msjax.hub.import_ import fetched, import_checkpoint, is_checkpoint, read_checkpoint
from msjax.hub.names import STREAM_EMBEDDING
from msjax.model import Model
from msjax.text.hf_tokenizer import train_bpe
from msjax.training.loop import train
from msjax.workdir import WorkDir

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEN = tuple(f"s{i}:internal" for i in range(10))
TWO = ("user:input", "output:output")
pytestmark = pytest.mark.usefixtures("compiled_once")


def folder(path, config, weights, shards=1):
  """A checkpoint of Hugging Face, its tensors dealt out to files."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  train_bpe(["to be - or not to be"], 300).save(path / "tokenizer.json")
  names, where = sorted(weights), {}
  for i in range(shards):
    file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = {name: np.ascontiguousarray(weights[name]) for name in names[i::shards]}
    save_file(part, path / file, metadata={"format": "pt"})
    where.update(dict.fromkeys(part, file))
  if shards > 1:
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


@pytest.fixture
def release(tmp_path):
  """The official release's checkpoint, with a tokenizer."""
  config = json.loads((GOLDEN / "config.json").read_text())
  return folder(tmp_path / "release", config, load_file(GOLDEN / "model.safetensors"), shards=3)


@pytest.fixture
def plain(tmp_path):
  """A plain Llama checkpoint in bfloat16."""
  config = transformers.LlamaConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  )
  import torch

  model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
  model.save_pretrained(tmp_path / "saved")
  path = folder(
    tmp_path / "plain", config.to_dict(), load_file(tmp_path / "saved" / "model.safetensors")
  )
  return path, model.float()


def test_a_checkpoint_of_the_release_computes_what_it_does_there(release, tmp_path):
  imported = read_checkpoint(release, TEN)
  import_checkpoint(imported, WorkDir(tmp_path / "run"))
  assert imported.stream_embedding == "checkpoint"
  assert imported.unused == tuple(
    f"model.layers.{i}.self_attn.gate_in_norm.weight" for i in range(2)
  )
  figures = np.load(GOLDEN / "tiny_stream_qwen3.npz")
  tokens = figures["input_ids"].reshape(2, -1, 10)[:1]
  logits = msjax.load(tmp_path / "run").logits(tokens)
  theirs = figures["logits_block_causal"][:1].reshape(logits.shape)
  np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)


def test_zero_stream_embeddings_leave_the_answers_as_they_were(plain, tmp_path):
  import torch

  path, model = plain
  import_checkpoint(read_checkpoint(path), WorkDir(tmp_path / "run"))
  tokens = np.random.default_rng(0).integers(0, 320, (1, 9, 1))
  ours = msjax.load(tmp_path / "run").logits(tokens)[:, :, 0]
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens[:, :, 0])).logits.numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_new_stream_embeddings_are_small_and_go_by_the_seed(plain, tmp_path):
  drawn = []
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    checkpoint = read_checkpoint(plain[0], TWO, stream_init="normal", seed=seed)
    import_checkpoint(checkpoint, WorkDir(tmp_path / name))
    drawn.append(np.asarray(msjax.load(tmp_path / name).module.stream_embed[...]))
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert np.any(drawn[0] != drawn[2])
  assert drawn[0].shape == (2, 16) and 0.01 < drawn[0].std() < 0.03


def test_what_was_imported_reads_and_writes(plain, tmp_path):
  import_checkpoint(read_checkpoint(plain[0], TWO), WorkDir(tmp_path / "run"))
  model = msjax.load(tmp_path / "run")
  assert model.tokenizer.vocab_size == 320  # room for more tokens than there are
  assert len(list(model.generate({"user": "to be"}, rows=6, temperature=1.0))) == 6


def test_the_command_says_what_came_in(release, tmp_path):
  command = [
    sys.executable,
    "-m",
    "msjax.import_hf",
    f"--from={release}",
    f"--to={tmp_path / 'run'}",
  ]
  done = subprocess.run(
    [*command, f"--streams={','.join(TEN)}", "--json"], capture_output=True, text=True, timeout=180
  )
  assert (done.returncode, done.stderr) == (0, "")
  told = json.loads(done.stdout)
  assert told["silence"] == "<silence>" and told["stream_embedding"] == "checkpoint"
  again = forked.run("msjax.import_hf", *command[3:])
  assert again.returncode == 2
  assert "holds a run already; choose another work directory" in again.stderr


def test_the_loss_of_the_release_in_three_lines(release):
  figures = np.load(GOLDEN / "tiny_stream_qwen3.npz")
  length = figures["seq_length"][:, None]
  tokens = np.where(np.arange(120) < length, figures["input_ids"], -1).reshape(2, 12, 10)
  unpredicted = figures["prefix_length"][:, None, None] // 10
  weights = (np.arange(12)[:, None] > unpredicted) | (unpredicted == 0)
  model = msjax.load(release)
  loss = model.loss(tokens, weights)["loss"]
  np.testing.assert_allclose(loss, figures["loss_plain"], atol=1e-5, rtol=0)


def test_a_folder_is_loaded_as_it_is(release, plain):
  model = msjax.load(release)
  assert model.streams.names == tuple(f"s{i}" for i in range(10))
  tokens = np.load(GOLDEN / "tiny_stream_qwen3.npz")["input_ids"].reshape(2, -1, 10)[:1]
  theirs = np.load(GOLDEN / "tiny_stream_qwen3.npz")["logits_block_causal"][:1]
  np.testing.assert_allclose(model.logits(tokens).reshape(theirs.shape), theirs, atol=1e-4, rtol=0)
  assert msjax.load(plain[0]).streams.names == ("text",)


def test_usual_names_have_kinds(plain, tmp_path):
  words = [f"--from={plain[0]}", f"--to={tmp_path / 'run'}"]
  wrong = forked.run("msjax.import_hf", *words, "--streams=user,usr")
  assert wrong.returncode == 2
  assert "--streams: 'usr' is none of user, human," in wrong.stderr
  done = forked.run("msjax.import_hf", *words, "--streams=user,think,out:output:2")
  assert (done.returncode, done.stderr) == (0, "")
  assert "streams user, think, out; their embeddings: normal" in done.stdout
  streams = WorkDir(tmp_path / "run").streams()
  assert [(s.kind, s.weight) for s in streams.streams] == [
    ("input", 0.0),
    ("internal", 1.0),
    ("output", 2.0),
  ]


# Where a checkpoint is looked for.


def test_what_is_on_disk_is_not_sought_elsewhere(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "owner" / "model").mkdir(parents=True)
  for source in ("owner/model", "owner", str(tmp_path)):
    assert fetched(source) == pathlib.Path(source)
  for source in ("model", "a/b/c", "./a/b", "/nowhere/at/all"):  # no ids of the hub
    with pytest.raises(InputError, match=r"config.json: not found; expected a Hugging Face check"):
      read_checkpoint(fetched(source))
  monkeypatch.setenv("HOME", str(tmp_path))
  assert fetched("~/owner") == tmp_path / "owner"


def test_a_hub_id_is_downloaded_without_what_msjax_does_not_read(plain, monkeypatch):
  asked = {}

  def download(name, allow_patterns, ignore_patterns):
    asked.update(name=name, patterns=allow_patterns)
    return str(plain[0])

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert read_checkpoint(fetched("Owner/a-model_1.5"), TWO).streams.names == ("user", "output")
  wanted = lambda file: any(fnmatch.fnmatch(file, pattern) for pattern in asked["patterns"])
  there = [path.name for path in plain[0].iterdir()]
  assert asked["name"] == "Owner/a-model_1.5" and all(map(wanted, [*there, "chat_template.jinja"]))
  assert not any(map(wanted, ("pytorch_model.bin", "model.gguf", "tf_model.h5", "modeling.py")))


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  told = r"^nobody/has-this: no such folder; taken for an id of the hub: \S.*$"
  with pytest.raises(InputError, match=told) as raised:
    fetched("nobody/has-this")
  assert "\n" not in str(raised.value)


def test_whatever_befalls_a_download_is_told_in_one_line(monkeypatch):
  def download(*_, **__):
    raise RuntimeError("\n401 Client Error.\nRequest ID: 5\n")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  told = "nobody/has-this: no such folder; taken for an id of the hub: 401 Client Error."
  with pytest.raises(InputError) as raised:
    fetched("nobody/has-this")
  assert str(raised.value) == told


def test_a_hub_id_needs_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(InputError, match=r"^nobody/has-this: no such folder; .* pip install -e '.\["):
    fetched("nobody/has-this")


def test_what_is_a_checkpoint(plain, tmp_path):
  assert is_checkpoint(plain[0]) and is_checkpoint(tmp_path / "model.gguf")
  import_checkpoint(read_checkpoint(plain[0]), WorkDir(tmp_path / "run"))
  for path in (tmp_path, tmp_path / "run", tmp_path / "nowhere"):
    assert not is_checkpoint(path)
  for content in ("3", "{", "[]"):
    (tmp_path / "config.json").write_text(content)
    assert not is_checkpoint(tmp_path)


# Wrong folders.


def edit(path, change):
  """Rewrites the one file of tensors."""
  weights = load_file(path / "model.safetensors")
  change(weights)
  save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
  ("spoil", "told"),
  [
    (lambda p: edit(p, lambda w: w.pop(Q)), rf"{Q} is missing; expected shape \(16, 16\)"),
    (
      lambda p: edit(p, lambda w: w.update({Q: w[Q][:8].copy()})),
      rf"{Q}: shape \(8, 16\); expected \(16, 16\)",
    ),
    (
      lambda p: edit(p, lambda w: w.update({STREAM_EMBEDDING: np.zeros((3, 16), np.float32)})),
      r"channel_embedding.weight: shape \(3, 16\); expected \(2, 16\)",
    ),
    (
      lambda p: shutil.copy(p / "model.safetensors", p / "copy.safetensors"),
      r"stands in copy.safetensors and in model.safetensors",
    ),
    (
      lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
      r"model.safetensors: cannot be read, it may be cut short",
    ),
    (lambda p: (p / "model.safetensors").unlink(), r"plain: holds no \*.safetensors"),
    (
      lambda p: (p / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q: "model-00002.safetensors"}})
      ),
      r"model-00002.safetensors: not found, but model.safetensors.index.json names it",
    ),
    (
      lambda p: (p / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"another": "model.safetensors"}})
      ),
      r"model.safetensors: lacks another, which model.safetensors.index.json says is there",
    ),
    (lambda p: (p / "model.safetensors.index.json").write_text("{"), r"index.json: is no index"),
    (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer.json: No such file"),
    (lambda p: (p / "config.json").unlink(), r"config.json: not found; expected a Hugging"),
    (lambda p: (p / "config.json").write_text("{"), r"config.json: is no JSON"),
  ],
)
def test_a_wrong_folder_is_told_and_makes_nothing(plain, tmp_path, spoil, told):
  spoil(plain[0])
  with pytest.raises(InputError, match=told):
    import_checkpoint(read_checkpoint(plain[0], TWO), WorkDir(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_tensors_of_another_model_are_not_left_out_silently(plain):
  bias = Q.replace("weight", "bias")
  edit(plain[0], lambda w: w.update({bias: np.zeros(16, np.float32)}))
  with pytest.raises(InputError, match=f"{bias} is there, but config.json describes a"):
    read_checkpoint(plain[0], TWO)


@pytest.mark.parametrize("dtype", [np.int8, bool])
def test_a_tensor_of_no_float_is_told(plain, dtype):
  edit(plain[0], lambda w: w.update({Q: np.zeros((16, 16), dtype)}))
  with pytest.raises(InputError, match=f"{Q} is of (I8|BOOL); expected one of F64, F32"):
    read_checkpoint(plain[0], TWO)


def test_the_rule_of_an_export_holds_until_another_is_given(plain, tmp_path):
  read = lambda path, *streams, **rule: read_checkpoint(path, streams or None, **rule)
  silence = read(plain[0], *TWO).tokenizer.encode("t")[0]
  made = read(plain[0], *TWO, same_row="inputs", skip_silence=True, silence=silence)
  export(Model(*made[:4]), tmp_path / "out")
  rule = lambda streams: (streams.same_row, streams.skip_silence, streams.silence_id)
  assert rule(read(tmp_path / "out", "a:input", "b:output").streams) == ("inputs", True, silence)
  with pytest.raises(InputError, match="out: has the streams user, output; expected as many names"):
    read(tmp_path / "out", "user:input")
  other = read(tmp_path / "out", same_row="visible", skip_silence=False)
  assert other.streams.names == ("user", "output")
  assert rule(other.streams) == ("visible", False, silence)


def test_a_folder_with_something_in_it_is_not_imported_to(plain):
  before = (plain[0] / "config.json").read_bytes()
  with pytest.raises(InputError, match="plain: is not empty; expected a new work directory"):
    import_checkpoint(read_checkpoint(plain[0], TWO), WorkDir(plain[0]))
  assert (plain[0] / "config.json").read_bytes() == before


def test_an_unusual_end_token_is_named_and_remembered(plain, tmp_path):
  text = (plain[0] / "tokenizer.json").read_text().replace("<end>", "<fin>")
  (plain[0] / "tokenizer.json").write_text(text)
  with pytest.raises(InputError, match="give --end=TOKEN"):
    read_checkpoint(plain[0], TWO)
  import_checkpoint(read_checkpoint(plain[0], TWO, end="<fin>"), WorkDir(tmp_path / "run"))
  tokenizer = WorkDir(tmp_path / "run").tokenizer()
  assert tokenizer.name(tokenizer.end_id) == "<fin>"


def test_a_vocabulary_that_does_not_fit_is_told(plain, tmp_path):
  config = json.loads((plain[0] / "config.json").read_text())
  (plain[0] / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
  with pytest.raises(InputError, match=r"vocab_size: 200; the vocabulary has ids up to \d+"):
    import_checkpoint(read_checkpoint(plain[0], TWO), WorkDir(tmp_path / "run"))


def test_quantised_tensors_are_told(plain):
  config = json.loads((plain[0] / "config.json").read_text())
  quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
  (plain[0] / "config.json").write_text(json.dumps(quantised))
  with pytest.raises(InputError, match=r"plain: quantization_config: tensors are quantised"):
    read_checkpoint(plain[0], TWO)


def test_training_goes_on_elsewhere(plain, tmp_path):
  workdir = WorkDir(tmp_path / "run")
  import_checkpoint(read_checkpoint(plain[0], TWO), workdir)
  with pytest.raises(InputError, match=r"holds an imported model; train in another --workdir"):
    workdir.claim(workdir.config(), workdir.streams(), workdir.tokenizer(), {})
  chat = {"messages": [{"role": r, "content": "to be"} for r in ("user", "assistant")]}
  (tmp_path / "train.jsonl").write_text(json.dumps(chat))
  config = workdir.config().changed(
    {
      "init_from": str(workdir.path),
      "data.rows": 16,
      "data.train": str(tmp_path / "train.jsonl"),
      "optim.learning_rate": 1e-9,
      "train.steps": 1,
      "train.batch": 2,
    }
  )
  config.validate()
  tuned = train(config, WorkDir(tmp_path / "tuned"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
    tuned.params,
    msjax.load(workdir.path).params,
  )
