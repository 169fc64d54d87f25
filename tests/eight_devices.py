"""Eight simulated devices, in a process of their own: the one that runs tests has one device."""

import concurrent.futures
import functools
import math
import multiprocessing

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from msjax import sharding
from msjax.config import MeshConfig
from msjax.mesh import make_mesh


def on_eight_devices(f, *args):
  """Returns `f(*args)` of there; both ways go through pickle."""
  return _process().submit(f, *args).result()


@functools.cache
def _process():
  spawn = multiprocessing.get_context("spawn")
  return concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_begin)


def _begin():
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time


def mesh(slices=1, data=1, fsdp=1, model=1):
  """A mesh of as many of the devices; `fsdp` (2, 4) lies on two axes, as on a TPU slice."""
  devices = jax.devices()
  if isinstance(fsdp, int):
    devices = devices[: slices * data * fsdp * model]
    return make_mesh(MeshConfig(slices, data, fsdp, model), devices)
  shape = slices, data, *fsdp, model
  devices = np.array(devices[: math.prod(shape)]).reshape(shape)
  return Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
