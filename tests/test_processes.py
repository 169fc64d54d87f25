import contextlib
import os
import pathlib
import signal
import tempfile
import threading

import forked
import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster
from orbax.checkpoint import v1 as ocp
from test_pipeline import batches, part, same
from test_rollcall import free_port
from train_cases import DEADLINE, complaints

from msjax import processes
from msjax.errors import InputError, RunError
from msjax.processes import Place

COMMAND = """
import os, pathlib, sys, time
from absl import logging
from msjax import cli, processes
from msjax.errors import InputError

def main(_):
  with processes.joined():
    together()

def together():
  import jax
  print(jax.process_index(), jax.process_count(), processes.is_first(), flush=True)
{then}

sys.path.insert(0, {tests!r})
if "FAKE" in os.environ:
  processes.jax.__version__ = os.environ["FAKE"]
processes.define()
logging.set_verbosity(logging.INFO)
cli.run(main)
"""


@contextlib.contextmanager
def command(port, process, count=2, then="", timeout=DEADLINE, **environment):
  """One process of a run; yields it and an iterator over the lines that it says."""
  words = {
    "coordinator_address": "localhost",
    "coordinator_port": port,
    "num_processes": count,
    "process_id": process,
    "startup_timeout": timeout,
  }
  program = COMMAND.format(then=then, tests=os.path.dirname(__file__))
  with tempfile.TemporaryDirectory() as place:
    said = pathlib.Path(place) / "said"
    os.mkfifo(said)
    running = forked.start(
      program,
      *(f"--{name}={value}" for name, value in words.items()),
      stdout=said,
      stderr=said,
      env={**os.environ, **environment},
    )
    watchdog = threading.Timer(DEADLINE, running.kill)
    watchdog.start()
    try:
      with said.open() as lines:
        yield running, map(str.rstrip, lines)
    finally:
      running.kill()
      watchdog.cancel()


def ended(running, lines):
  """All that a process still says, and its status."""
  return list(lines), running.wait()


SAVE = """
  from orbax.checkpoint import v1 as ocp
  from test_pipeline import batches
  stream = batches(pack=True, local=[jax.process_index()])
  for _ in range(3):
    next(stream)
  processes.sync("one")
  ocp.save_checkpointables(pathlib.Path({path!r}), {{"data": stream}})
  again = batches(pack=True, local=[2])
  ocp.load_checkpointables(pathlib.Path({path!r}), {{"data": again}})
  print(again.position == stream.position)
"""


def test_two_processes_meet_and_save_one_position_that_one_alone_goes_on_from(tmp_path):
  port, path = free_port(), tmp_path / "1"
  then = SAVE.format(path=str(path))
  with command(port, 0, then=then) as first, command(port, 1, then=then) as second:
    for process, running in enumerate((first, second)):
      lines, status = ended(*running)
      said = [line for line in lines if f"process {process} (host " in line]
      assert len(said) == 1 and said[0].endswith(f") of 2, coordinator localhost:{port}"), lines
      who, *_, restored = complaints("\n".join(lines))  # between them Gloo has its say
      assert (who, restored, status) == (f"{process} 2 {process == 0}", "True", 0)
  assert [file.name for file in (path / "data").iterdir()] == ["position.json"]
  whole, alone = batches(pack=True), batches(pack=True, local=[1, 3])
  for _ in range(3):
    next(whole)
  ocp.load_checkpointables(path, {"data": alone})
  for _ in range(3):
    same(next(alone), part(next(whole), [1, 3]))


def test_who_waits_in_vain_says_so_in_one_line_and_ends():
  with (
    command(free_port(), 0, timeout=1) as without_1,
    command(free_port(), 1, timeout=1) as without_0,
  ):
    for running, message in (
      (
        without_1,
        "-c: error: process 1 of 2 did not call in at process 0: waited 1 s at localhost:",
      ),
      (without_0, "-c: error: process 1 (host "),
    ):
      lines, status = ended(*running)
      (line,) = complaints("\n".join(lines))
      assert line.startswith(message) and status == 1


def test_processes_of_different_versions_end_before_they_start():
  port = free_port()
  with command(port, 0) as first, command(port, 1, FAKE="0.0.1") as second:
    for running in (first, second):
      lines, status = ended(*running)
      (line,) = complaints("\n".join(lines))
      assert line.startswith("-c: error: jax: 0.0.1 on process 1 (host ") and status == 2


STEPS = """
  for step in range(10_000):
    if step == 3:
      print("running", flush=True)
    if processes.stop_asked():
      print("saves", step)
      break
    time.sleep(0.01)
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step():
  port = free_port()
  with command(port, 0, then=STEPS) as first, command(port, 1, then=STEPS) as second:
    for _, lines in (first, second):
      assert "running" in lines
    second[0].send_signal(signal.SIGTERM)
    (one, *_), (other, *_) = (
      [line for line in lines if line.startswith("saves")] for _, lines in (first, second)
    )
    assert one == other
    assert [running.wait() for running, _ in (first, second)] == [0, 0]


TOGETHER = """
  print(processes.first_does("word", lambda: f"of {{jax.process_index()}}"))
  processes.agree("alike", {{"a": {{"b": (1, 2)}}}})
  print("agreed", flush=True)
  if jax.process_index() == {wrong}:
    {does}
  processes.sync("never")
"""


@pytest.mark.parametrize(
  "wrong, does, status, line",
  [
    (1, "raise InputError('x: 1; expected 2')", 2, "x: 1; expected 2"),
    (0, "processes.first_does('it', lambda: open('/').close())", 1, "[Errno 21] Is a dir"),
    (1, "1 / 0", 1, "ZeroDivisionError"),
  ],
)
def test_processes_do_things_together_until_one_fails(wrong, does, status, line):
  port, then = free_port(), TOGETHER.format(wrong=wrong, does=does)
  with command(port, 0, then=then) as first, command(port, 1, then=then) as second:
    for process, running in enumerate((first, second)):
      lines, ended_with = ended(*running)
      said = complaints("\n".join(lines))
      assert said[1:3] == ["of 0", "agreed"] and ended_with == status, lines
      if process == wrong:
        assert line in said[-1]
      else:
        assert said[3].startswith(f"-c: error: process {wrong} (host ") and line in said[3]
        assert len(said) == 4


class Others:
  """Process 0 as another sees it, by what it has said."""

  def __init__(self, word=None):
    self.word = word

  def blocking_key_value_get(self, key, milliseconds):
    if self.word is None:
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
    return self.word

  def wait_at_barrier(self, name, milliseconds):
    pass


@pytest.fixture
def process_0(monkeypatch):
  """A function that sets what process 0 says; this is another one."""
  monkeypatch.setattr(processes, "is_first", lambda: False)
  monkeypatch.setattr(jax, "process_index", lambda: 3)
  state = processes.distributed.global_state
  return lambda word=None: monkeypatch.setattr(state, "client", Others(word))


def test_what_the_first_does_is_heard_and_not_done_again(process_0):
  process_0("token")
  assert processes.first_does("it", lambda: 1 / 0) == "token"


def test_who_does_not_hear_of_process_0_says_so(process_0):
  process_0()
  with pytest.raises(RunError, match=r"^it: waited 2 s for process 0$"):
    processes.first_does("it", str, timeout=2)


VALUES = {"a": 1, "b": {"c": (1, 2), "d": None}}


def test_the_same_values_agree_whatever_their_order(process_0):
  process_0('{"b": {"d": null, "c": [1, 2]}, "a": 1}')
  processes.agree("it", VALUES)


@pytest.mark.parametrize(
  "theirs, line",
  [
    ('{"a": 2, "b": {"c": [1, 2], "d": null}}', "it.a: 1 in process 3, 2 in process 0; expected"),
    ('{"a": 1, "b": {"c": [1], "d": null}}', r"it.b.c: \[1, 2\] in process 3, \[1\] in process 0"),
    ('{"a": 1, "b": {"c": [1, 2], "d": null, "e": "x"}}', "it.b.e: None in process 3, 'x' in"),
    ('{"a": 1, "b": 5}', r"it.b: \{'c': \[1, 2\], 'd': None\} in process 3, 5 in process 0"),
  ],
)
def test_the_first_values_that_differ_are_named(process_0, theirs, line):
  process_0(theirs)
  with pytest.raises(InputError, match=line):
    processes.agree("it", VALUES)


def test_a_stop_is_asked_for_by_numbers_that_orbax_does_not_disturb(monkeypatch):
  asked = []

  class Service:
    def reached_sync_point(self, number):
      asked.append(number)
      return number == 3

  service = processes._Preemption(Service())
  monkeypatch.setattr(processes.distributed.global_state, "preemption_sync_manager", service)
  assert not service.reached_sync_point(1000)
  assert [processes.stop_asked() for _ in range(4)] == [False, False, True, False]
  assert asked == [1, 2, 3, 4]


def test_a_process_that_is_alone_waits_for_nobody():
  assert processes.is_first()
  processes.sync("nobody else")
  assert processes.first_does("it", lambda: "done") == "done"
  processes.agree("it", {"a": 1})
  assert not processes.stop_asked()


def test_who_does_not_come_to_a_barrier_is_waited_for_in_vain(monkeypatch):
  class Client:
    def wait_at_barrier(self, name, milliseconds):
      raise jax.errors.JaxRuntimeError(f"{name} timed out after {milliseconds}.\nAnd more.")

  monkeypatch.setattr(processes.distributed.global_state, "client", Client())
  with pytest.raises(
    RunError, match=r"^saved: waited 2 s .*: msjax/saved/\d+ timed out after 2000.$"
  ):
    processes.sync("saved", timeout=2)


# Who this is.


@pytest.fixture
def nowhere(monkeypatch):
  """No cluster is near, whatever runs this test."""
  for name in ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
  return monkeypatch


@pytest.fixture
def slurm(nowhere):
  """Task 2 of 4 of a job."""
  for name, value in {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
  }.items():
    nowhere.setenv(name, value)
  return nowhere


@pytest.fixture
def tpu_vm(nowhere):
  """Worker 1 of a slice whose workers' addresses the returned function sets."""
  nowhere.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  nowhere.delenv("TPU_SKIP_MDS_QUERY", raising=False)

  def workers(*addresses):
    metadata = {
      "agent-worker-number": str(len(addresses) - 1),
      "worker-network-endpoints": ",".join(f"unknown:1:{address}" for address in addresses),
      "tpu-env": "",
    }
    nowhere.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))

  return workers


def find(address=None, port=None, count=None, process=None):
  return processes.find(address, port, count, process, timeout=1)


def test_without_flags_and_cluster_a_process_is_alone(nowhere):
  nowhere.setattr(cloud_tpu_cluster, "get_metadata", None)  # nothing is asked
  assert find() is find(port=9) is find(count=1) is None


def test_flags_alone_tell_the_place(nowhere):
  assert find("a", None, 4, 3) == Place(3, 4, "a", 8482)
  assert find("::1", 9, 4, 0) == Place(0, 4, "::1", 9)


def test_slurm_tells_the_place_and_flags_go_before_it(slurm):
  assert find() == Place(2, 4, "node003", 65535 - 2**12 + 1 + 7, [0])
  assert find("other", 9) == Place(2, 4, "other", 9, [0])
  assert find(count=3, process=1)[:2] == (1, 3)
  assert find(count=1) is None


def test_gce_tells_the_place(tpu_vm):
  tpu_vm("127.0.0.1", "127.0.0.2")
  assert find() == Place(1, 2, "127.0.0.1", 8482)
  assert find(port=9) == Place(1, 2, "127.0.0.1", 9)


def test_gke_tells_the_place(nowhere):
  nowhere.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  for name, value in (("TPU_WORKER_HOSTNAMES", "localhost,b,c,d"), ("TPU_WORKER_ID", "3")):
    nowhere.setenv(name, value)
  nowhere.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
  nowhere.setenv("MEGASCALE_NUM_SLICES", "2")
  nowhere.setenv("MEGASCALE_SLICE_ID", "1")
  assert find() == Place(7, 8, "localhost", 8482)


def test_a_tpu_host_of_its_own_is_alone(tpu_vm):
  tpu_vm("127.0.0.1")
  assert find() is None


def test_a_cluster_that_does_not_answer_is_told(slurm):
  slurm.setenv("SLURM_NTASKS", "many")
  with pytest.raises(RunError, match=r"slurm does not say which .*'many'; give --coordinator_add"):
    find()


@pytest.mark.parametrize(
  "given, message",
  [
    ({"process": 1}, "--coordinator_address: not given, and no cluster tells; expected --coord"),
    ({"address": "a", "count": 2}, "--process_id: not given, and no cluster tells"),
    ({"address": "a", "count": 2, "process": 2}, "--process_id: 2; expected 0 to 1 of --num_pr"),
    ({"address": "a:9", "count": 2, "process": 0}, "'a:9'; expected a host alone, its port in"),
  ],
)
def test_flags_that_do_not_fit_are_told(nowhere, given, message):
  with pytest.raises(InputError, match=message):
    find(**given)
