"""Names of what arrays hold."""

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import mesh, on_eight_devices

from msjax.fingerprint import fingerprint


def arrays(dtype="float32"):
  rng = np.random.default_rng(0)
  return {"a": jnp.array(rng.normal(size=(16, 8)), dtype), "b": [jnp.arange(5), jnp.float32(2)]}


def test_whatever_differs_gives_another_name():
  tree = arrays()
  names = {fingerprint(tree), fingerprint(tree, "about"), fingerprint(arrays("bfloat16"))}
  names.add(fingerprint({**tree, "a": tree["a"].at[3, 2].add(1e-6)}))
  names.add(fingerprint({**tree, "a": tree["a"][jnp.array([1, 0, *range(2, 16)])]}))  # two rows
  names.add(fingerprint({**tree, "a": tree["a"][:, jnp.array([1, 0, *range(2, 8)])]}))
  names.add(fingerprint({**tree, "a": tree["a"].reshape(8, 16)}))
  names.add(fingerprint({"c": tree["a"], "b": tree["b"]}))
  names.add(fingerprint({**tree, "a": -tree["a"]}))
  assert len(names) == 9 and all(len(name) == 16 for name in names)
  assert fingerprint(arrays()) == fingerprint(tree)


def named_on(sizes):
  with jax.set_mesh(mesh(**sizes)) as _:
    spec = jax.P(("slice", "data", "fsdp_x", "fsdp_y"), "model")
    tree = arrays()
    return fingerprint({**tree, "a": jax.device_put(tree["a"], spec)})


def test_how_arrays_lie_does_not_matter():
  for sizes in ({"data": 8}, {"data": 2, "model": 4}):
    assert on_eight_devices(named_on, sizes) == fingerprint(arrays())
