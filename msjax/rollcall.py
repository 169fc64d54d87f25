"""The roll call before JAX joins processes: all are there and run the same, or hear why not.

JAX's client aborts a process that has waited in vain, and says neither who is missing nor what to
do. So every process first calls in at process 0, on the port that JAX will use, and waits for word
to go on. Messages are lines of JSON.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msjax.errors import InputError, RunError

_CONNECT_SECONDS = 5  # for one attempt
_GREETING_SECONDS = 5  # until who has connected must have said who it is
_GRACE_SECONDS = 3  # beyond the timeout, to hear what process 0 says when its own is over
_RETRY_SECONDS = 0.2
_LINE_BYTES = 2**16
_ERRORS = {error.__name__: error for error in (InputError, RunError)}


class Member(NamedTuple):
  """What a process says of itself.

  Attributes:
    process: its number, from 0.
    count: how many processes there are, as it was told.
    host: where it runs.
    versions: of what it runs, by name.
  """

  process: int
  count: int
  host: str
  versions: Mapping[str, str]

  def __str__(self) -> str:
    """For messages."""
    return f"process {self.process} (host {self.host})"


class Meeting(NamedTuple):
  """Where and how long processes wait for each other.

  Attributes:
    host: of process 0.
    port: there.
    timeout: seconds, for each process from when it comes.
  """

  host: str
  port: int
  timeout: float

  @property
  def advice(self) -> str:
    """What to look at when somebody did not come."""
    return (
      f"waited {self.timeout:g} s at {self.host}:{self.port}; does the same command run on every "
      f"worker, each with its own process id, and can all reach port {self.port} there "
      "(--coordinator_port takes another, --startup_timeout waits longer)?"
    )


class _Call(NamedTuple):
  """A member that waits for word, and the line to it."""

  member: Member
  line: socket.socket

  def has_left(self) -> bool:
    """Whether the other end is closed."""
    try:
      return not self.line.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return False
    except OSError:
      return True


def hold(me: Member, meeting: Meeting) -> None:
  """Returns when all processes have called in and run the same; the port is free again.

  Raises:
    InputError: processes were told different things or run different versions, or the port is
      taken.
    RunError: the time is over and not all have come.
  """
  problem = _call_in(me, meeting) if me.process else _take_calls(me, meeting)
  if problem is not None:
    raise problem


def _take_calls(me: Member, meeting: Meeting) -> Exception | None:
  """Process 0: waits for all others, and tells each what it found."""
  calls: list[_Call] = []
  with _listening(meeting.port) as listener:
    problem = _gather(me, calls, listener, time.monotonic() + meeting.timeout)
  others = [call.member for call in calls]
  problem = problem or _missing(me, others, meeting) or _difference(me, others)
  word = {"error": problem and type(problem).__name__, "message": str(problem)}
  for call in calls:
    with call.line, contextlib.suppress(OSError):  # who has left cannot be told
      _say(call.line, word)
  return problem


def _listening(port: int) -> socket.socket:
  """Opens the port as JAX will, at every address of the host."""
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except OSError as error:
    raise InputError(
      f"--coordinator_port: {port} cannot be opened on host {socket.gethostname()}: "
      f"{error.strerror}; end what holds it, or give all processes another"
    ) from None


def _gather(
  me: Member, calls: list[_Call], listener: socket.socket, deadline: float
) -> InputError | None:
  """Adds to `calls` until all are there, the time is over, or one comes that cannot belong here."""
  while len(calls) < me.count - 1 and (left := deadline - time.monotonic()) > 0:
    listener.settimeout(left)
    try:
      line, _ = listener.accept()
      line.settimeout(min(left, _GREETING_SECONDS))
      member = Member(**_heard(line))
    except (OSError, ValueError, TypeError):
      continue  # a stranger, or the time is over
    line.setblocking(False)
    calls[:] = [call for call in calls if not call.has_left()]  # who died meanwhile may come again
    present = {me.process: me} | {call.member.process: call.member for call in calls}
    calls.append(_Call(member, line))
    if member.count != me.count:
      return InputError(
        f"--num_processes: {member.count} for {member}, {me.count} for {me}; expected the same"
      )
    if member.process in present:
      hosts = f"{present[member.process].host} and {member.host}"
      return InputError(
        f"--process_id: {member.process} is given twice, on hosts {hosts}; expected one each"
      )
  return None


def _missing(me: Member, others: Sequence[Member], meeting: Meeting) -> RunError | None:
  missing = sorted(set(range(1, me.count)) - {member.process for member in others})
  if not missing:
    return None
  listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
  who = f"process {listed}" if len(missing) == 1 else f"{len(missing)} processes ({listed})"
  return RunError(f"{who} of {me.count} did not call in at process 0: {meeting.advice}")


def _difference(me: Member, others: Sequence[Member]) -> InputError | None:
  for other in sorted(others):
    for name, version in me.versions.items():
      theirs = other.versions.get(name)
      if theirs != version:
        return InputError(
          f"{name}: {theirs} on {other}, {version} on {me}; install the same on all hosts"
        )
  return None


def _call_in(me: Member, meeting: Meeting) -> Exception | None:
  """Any other process: says who it is, and returns what process 0 found."""
  deadline = time.monotonic() + meeting.timeout
  found = "the time was over"
  while (left := deadline - time.monotonic()) > 0:
    try:
      address = meeting.host, meeting.port
      with socket.create_connection(address, min(left, _CONNECT_SECONDS)) as line:
        _say(line, me._asdict())
        line.settimeout(left + _GRACE_SECONDS)
        try:
          word = _heard(line)
        except TimeoutError:
          return RunError(f"{me}: process 0 is there, not all others are: {meeting.advice}")
      return word["error"] and _ERRORS[word["error"]](word["message"])
    except OSError as error:
      found = error.strerror or str(error)
    except (ValueError, KeyError, TypeError):
      found = "what answers there is no process of msjax"
    time.sleep(_RETRY_SECONDS)
  return RunError(f"{me} of {me.count} does not find process 0 ({found}): {meeting.advice}")


def _say(line: socket.socket, data: Any) -> None:
  line.sendall(json.dumps(data).encode() + b"\n")


def _heard(line: socket.socket) -> Any:
  """Returns the next message; raises `OSError` or `ValueError` if none comes."""
  with line.makefile("rb") as file:
    return json.loads(file.readline(_LINE_BYTES))
