"""Many processes: who is who is told and checked before any device is touched; they end together.

A command calls `define()` where it defines its flags, and does everything else within `joined()`.
Without these flags and outside of a cluster that JAX knows, nothing is tried: the process is alone.
"""

import contextlib
import importlib.metadata
import itertools
import json
import platform
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jaxlib
from absl import flags, logging
from jax._src import clusters, distributed  # no public name tells what is detected, or has barriers

import msjax
from msjax import rollcall
from msjax.alarm import Alarm
from msjax.errors import InputError, RunError

flags.disclaim_key_flags()  # they belong to the command that defines them, and stand in its --help

_calls = itertools.count()  # of what all processes do in the same order
_HEARTBEAT_SECONDS = 60  # without one, a process is taken for dead and JAX aborts the others
_PORT = 8482  # JAX's own for TPU
_CLUSTERS = (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)


class Place(NamedTuple):
  """The place of this process among all.

  Attributes:
    process: its number; process 0 is the coordinator.
    count: of processes.
    host: of the coordinator.
    port: of the coordinator.
    devices: numbers of the GPUs of this host that it takes, or None for all.
  """

  process: int
  count: int
  host: str
  port: int
  devices: list[int] | None = None


def define() -> None:
  """Declares the flags that tell a process its place."""
  flags.DEFINE_string(
    "coordinator_address", None, "host of process 0; asked of GCE, GKE and Slurm where one of these"
  )
  flags.DEFINE_integer(
    "coordinator_port",
    None,
    f"port of that host; by default the cluster's, or {_PORT}",
    lower_bound=1,
    upper_bound=65535,
  )
  flags.DEFINE_integer("num_processes", None, "of this run; 1 stays alone", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
  flags.DEFINE_integer(
    "startup_timeout", 300, "seconds to wait for the other processes", lower_bound=1
  )


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins the processes of this run, if there are others, for as long as the block lasts.

  To be entered once, before devices are touched. Each process logs who it is, then waits for the
  others. An error that ends the block in one process ends all of them: see `alarm`.

  Raises:
    InputError: flags are missing or contradict each other, processes run different versions, or the
      coordinator's port is taken.
    RunError: the other processes did not come in time, or one of them is gone.
  """
  given, timeout = flags.FLAGS, flags.FLAGS.startup_timeout
  place = find(
    *(given.coordinator_address, given.coordinator_port, given.num_processes, given.process_id),
    timeout,
  )
  if place is None:
    yield
    return
  me = rollcall.Member(place.process, place.count, socket.gethostname(), versions())
  logging.info("%s of %d, coordinator %s:%d", me, place.count, place.host, place.port)
  rollcall.hold(me, rollcall.Meeting(place.host, place.port, timeout))
  host = f"[{place.host}]" if ":" in place.host else place.host
  jax.distributed.initialize(
    f"{host}:{place.port}",
    place.count,
    place.process,
    local_device_ids=place.devices,
    cluster_detection_method="deactivate",  # it has been asked
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
  )
  state = distributed.global_state
  if state.preemption_sync_manager:
    state.preemption_sync_manager = _Preemption(state.preemption_sync_manager)
  with Alarm(state, str(me)):
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      if "Gloo" not in str(error):
        raise
      reason = str(error).splitlines()[0]
      raise RunError(f"another process is gone: {reason}; run again to go on") from error


def find(
  address: str | None, port: int | None, count: int | None, process: int | None, timeout: int
) -> Place | None:
  """Returns the place of this process, or None if it is alone.

  Args:
    address: host of process 0; like the next three, what is None is asked of the cluster.
    port: of that host.
    count: of processes.
    process: number of this one.
    timeout: seconds for the coordinator's name to be known.

  Raises:
    InputError: some of it is given, and no cluster tells the rest.
    RunError: the cluster does not answer.
  """
  if count == 1:
    return None
  if address is not None and address.count(":") == 1:
    raise InputError(
      f"--coordinator_address: {address!r}; expected a host alone, its port in --coordinator_port"
    )
  given = {"coordinator_address": address, "num_processes": count, "process_id": process}
  missing = [name for name, value in given.items() if value is None]
  found = _asked(port, timeout) if missing else Place(process, count, address, port or _PORT)
  if found is None:
    if len(missing) == len(given):
      return None
    raise InputError(
      f"--{missing[0]}: not given, and no cluster tells; expected --{', --'.join(given)} together"
    )
  found = Place(
    found.process if process is None else process,
    count or found.count,
    address or found.host,
    port or found.port,
    found.devices,
  )
  if found.process >= found.count:
    raise InputError(
      f"--process_id: {found.process}; expected 0 to {found.count - 1} of --num_processes "
      f"{found.count}"
    )
  return found if found.count > 1 else None


def _asked(port: int | None, timeout: int) -> Place | None:
  """What Slurm, GKE or GCE says, or None outside of them."""
  cluster = None
  try:
    cluster = next((c for c in _CLUSTERS if c.is_env_present()), None)
    if cluster is None:
      return None
    process, count = cluster.get_process_id(), cluster.get_process_count()
    if count == 1:
      return Place(process, count, "localhost", port or _PORT)
    logging.info("%s says: process %d of %d", cluster.name, process, count)
    address = cluster.get_coordinator_address(
      timeout_secs=timeout, override_coordinator_port=port and str(port)
    )
    host, _, port = address.rpartition(":")
    local = cluster.get_local_process_id()
    return Place(process, count, host, int(port), None if local is None else [local])
  except Exception as error:
    name = cluster.name if cluster else "the cluster"
    raise RunError(
      f"{name} does not say which process this is: {error}; give --coordinator_address, "
      "--num_processes and --process_id, or --num_processes=1 to stay alone"
    ) from error


def versions() -> dict[str, str]:
  """Returns the versions that must be the same in all processes, by name."""
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    libtpu = "none"
  return {
    "Python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "libtpu": libtpu,
    "msjax": msjax.__version__,
  }


def is_first() -> bool:
  """Whether this is process 0, which writes what is written once."""
  return jax.process_index() == 0


def sync(name: str, timeout: float = 600) -> None:
  """Returns when all processes have come to this point.

  Args:
    name: of the point.
    timeout: seconds to wait there for the others.

  Raises:
    RunError: not all have come in time.
  """
  client = distributed.global_state.client
  if client is None:
    return
  try:
    client.wait_at_barrier(f"msjax/{name}/{next(_calls)}", int(timeout * 1000))
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise RunError(f"{name}: waited {timeout:g} s for the other processes: {reason}") from error


def first_does(name: str, act: Callable[[], str], timeout: float = 600) -> str:
  """Lets process 0 do what only one may; all return what it returns, when it is done.

  Args:
    name: of what is done.
    act: raises where it fails; the others then hear the alarm.
    timeout: seconds to wait for process 0.

  Raises:
    RunError: process 0 was not heard of in time.
  """
  client = distributed.global_state.client
  if client is None:
    return act()
  key = f"msjax/{name}/{next(_calls)}"
  if is_first():
    client.key_value_set(key, act())
  try:
    return client.blocking_key_value_get(key, int(timeout * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise RunError(f"{name}: waited {timeout:g} s for process 0") from error


def agree(name: str, values: Mapping[str, Any]) -> None:
  """Returns when all processes have found that they have the same values.

  Args:
    name: of them all.
    values: as JSON has them; mappings may hold others.

  Raises:
    InputError: this process has others than process 0.
    RunError: not all were heard of in time.
  """
  theirs = json.loads(first_does(name, lambda: json.dumps(values)))
  ours = json.loads(json.dumps(values))
  if found := _difference(name, ours, theirs):
    what, here, there = found
    raise InputError(
      f"{what}: {here!r} in process {jax.process_index()}, {there!r} in process 0; expected the "
      "same in all"
    )
  sync(name)


def _difference(name: str, here: Any, there: Any) -> tuple[str, Any, Any] | None:
  """The first values that differ, and their dotted name."""
  if not (isinstance(here, dict) and isinstance(there, dict)):
    return None if here == there else (name, here, there)
  pairs = ((f"{name}.{key}", here.get(key), there.get(key)) for key in sorted(here | there))
  return next(filter(None, (_difference(*pair) for pair in pairs)), None)


def stop_asked() -> bool:
  """Whether to save and stop now, because some process was asked to end (SIGTERM).

  All processes ask equally often, and are told to stop at the same time. A process that is alone
  is never told, nor any if JAX's preemption service is off.
  """
  service = distributed.global_state.preemption_sync_manager
  return service is not None and service.stop_asked()


class _Preemption:
  """JAX's preemption service, to be asked by us alone.

  It tells all to stop at one more than the highest number that any has asked by. So they count what
  they ask, from 1: by the steps of a run that goes on at 1,000 it would, told before the first
  of them, say 1, and never be asked that. Orbax, which asks by steps and from threads, hears no.
  """

  def __init__(self, service: Any):
    """Takes JAX's."""
    self._service, self._asks = service, itertools.count(1)

  def stop_asked(self) -> bool:
    """Asks."""
    return self._service.reached_sync_point(next(self._asks))

  def reached_sync_point(self, step: int) -> bool:
    """What Orbax asks."""
    return False

  def shutdown(self) -> None:
    """What JAX asks for at the end."""
    self._service.shutdown()
