"""Train, run and ship multi-stream language models in JAX.

`msjax.load(WORKDIR)` gives a trained model with `.streams`, `.logits(tokens)` and
`.generate(...)`.
"""

__version__ = "0.1.0"
__all__ = ["InputError", "load"]

from msjax.errors import InputError


def __getattr__(name: str):
  """Imports `load` on first use: `import msjax` alone stays light."""
  if name == "load":
    from msjax.model import load

    return load
  raise AttributeError(f"module 'msjax' has no attribute {name!r}")
