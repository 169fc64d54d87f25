"""Which program a run's step becomes."""

import dataclasses

import jax
import pytest

from msjax.config import Config, ModelConfig
from msjax.errors import InputError
from msjax.training.begin import DoesNotFit, program
from msjax.training.state import Learner

CONFIG = Config(model=ModelConfig(dim=16, layers=1, head_dim=8, mlp_dim=16))
LARGE = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. "
  "Used 31.50G of 15.75G hbm. Exceeded hbm capacity by 15.75G."
)


def learner_of(remat):
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat=remat))
  return Learner(config, config.stream_set(0), 20)


def chosen(remat, fits, message=LARGE):
  """Makes a program where that try is the first to fit; returns it, and the products of each."""
  learner, tries = learner_of(remat), []
  state = jax.eval_shape(learner.init, jax.random.key(0))
  batch = {
    "tokens": jax.ShapeDtypeStruct((1, 2, 3, 2), "int32"),
    "weights": jax.ShapeDtypeStruct((1, 2, 3, 2), "float32"),
    "segments": jax.ShapeDtypeStruct((1, 2, 3), "int32"),
  }

  def compile(lowered):
    tries.append(lowered.as_text().count("dot_general"))
    if len(tries) < fits:
      raise jax.errors.JaxRuntimeError(message)
    return "compiled"

  return program(learner, state, batch, compile), tries


def test_the_most_that_fits_is_kept():
  for fits, remat in enumerate(("dots", "qkv", "attention", "full"), start=1):
    made, tries = chosen("auto", fits)
    assert made == (remat, "compiled")
    assert tries == sorted(set(tries))  # each computes more again
    assert len(tries) == fits


def test_what_the_config_says_is_kept_whatever_else_would_fit():
  assert chosen("none", 1)[0].remat == "none"
  with pytest.raises(DoesNotFit) as caught:
    chosen("dots", 2)
  assert isinstance(caught.value, InputError)
  assert str(caught.value) == (
    "config.model.remat: with 'dots' a step needs more memory than a chip has (31.50 of 15.75 GiB);"
    " expected more chips, a larger config.train.micro_batches, a smaller config.data.rows or"
    " remat=full"
  )
  assert (caught.value.remat, caught.value.needed) == ("dots", 31.5 * 2**30)
  assert caught.value.capacity == 15.75 * 2**30


def test_where_not_even_the_least_fits_it_is_told():
  with pytest.raises(
    DoesNotFit, match=r"with 'full' .* or a smaller config\.data\.rows$"
  ) as caught:
    chosen("auto", 5)
  assert caught.value.remat == "full"
  with pytest.raises(DoesNotFit, match=r"\(RESOURCE_EXHAUSTED: of some kind\)") as caught:
    chosen("full", 2, "RESOURCE_EXHAUSTED: of some kind\nand more")
  assert (caught.value.needed, caught.value.capacity) == (None, None)


def test_other_errors_rise():
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    chosen("auto", 2, "INTERNAL: of some kind")
