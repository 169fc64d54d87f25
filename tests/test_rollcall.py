import contextlib
import socket
from concurrent import futures

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax import rollcall
from msjax.errors import InputError, RunError
from msjax.rollcall import Meeting, Member

RUNS = {"jax": "1.2", "libtpu": "none"}


def free_port():
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def member(process, count=2, host="", versions=RUNS):
  return Member(process, count, host or f"host-{process}", versions)


def meet(*members, timeout=20.0, port=None):
  """What each member is told, None for the word to go on."""
  meeting = Meeting("localhost", port or free_port(), timeout)

  def told(me):
    try:
      return rollcall.hold(me, meeting)
    except (InputError, RunError) as problem:
      return problem

  with futures.ThreadPoolExecutor(len(members)) as pool:
    return list(pool.map(told, members))


def same(problems, kind, *parts):
  """Checks that all members were told the same, of a kind, and what."""
  assert {type(problem) for problem in problems} == {kind}
  (message,) = {str(problem) for problem in problems}
  assert all(part in message for part in parts), message


@given(st.permutations(range(5)))
@settings(max_examples=5, deadline=None)
def test_all_go_on_when_all_are_there_in_whatever_order(order):
  assert meet(*(member(process, 5) for process in order)) == [None] * 5


def test_the_port_is_free_when_process_0_goes_on():
  port = free_port()
  assert meet(member(0), member(1), port=port) == [None, None]
  with socket.create_server(("localhost", port)):
    pass


@pytest.mark.parametrize(
  "here, said", [([0, 2], "process 1 of 3 did"), ([0], "2 processes (1, 2) of 3 did")]
)
def test_who_is_missing_is_told_to_all_who_are_there(here, said):
  problems = meet(*(member(process, 3) for process in here), timeout=1.0)
  same(problems, RunError, said, "call in at process 0: waited 1 s at localhost:")


def test_without_process_0_the_others_say_so():
  (problem,) = meet(member(1), timeout=0.5)
  assert isinstance(problem, RunError)
  assert str(problem).startswith("process 1 (host host-1) of 2 does not find process 0 (Connection")
  assert "--coordinator_port takes another, --startup_timeout waits longer" in str(problem)


def test_versions_that_differ_are_named_on_both_sides():
  problems = meet(member(0, 3), member(1, 3), member(2, 3, versions={**RUNS, "jax": "1.3"}))
  same(
    problems,
    InputError,
    "jax: 1.3 on process 2 (host host-2), 1.2 on process 0 (host host-0); install the same",
  )


def test_a_count_that_differs_is_told():
  problems = meet(member(0, 2), member(1, 3))
  same(problems, InputError, "--num_processes: 3 for process 1 (host host-1), 2 for process 0 (")


def test_a_number_given_twice_is_told():
  problems = meet(member(0, 3), member(1, 3, host="a"), member(1, 3, host="b"))
  same(problems, InputError, "--process_id: 1 is given twice, on hosts ", "; expected one each")


def test_a_port_that_is_taken_is_told():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    (problem,) = meet(member(0), port=port)
  assert isinstance(problem, InputError)
  assert f"--coordinator_port: {port} cannot be opened on host " in str(problem)
  assert "Address already in use" in str(problem)


@contextlib.contextmanager
def calling(port):
  """A connection to process 0 as soon as it is there."""
  while True:
    with contextlib.suppress(ConnectionRefusedError):
      connection = socket.create_connection(("localhost", port))
      break
  with connection:
    yield connection


@pytest.mark.parametrize("says", [b"GET / HTTP/1.1\r\n", b"{}\n", b"[1]\n", b""])
def test_strangers_do_not_count(says):
  port = free_port()
  with futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(meet, member(0), port=port)
    with calling(port) as connection:
      connection.sendall(says)
    assert meet(member(1), port=port) == [None]
    assert first.result() == [None]


def test_one_that_has_died_meanwhile_may_come_again():
  port = free_port()
  with futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(meet, member(0, 3), port=port)
    with calling(port) as connection:
      rollcall._say(connection, member(1, 3)._asdict())
    assert meet(member(1, 3), member(2, 3), port=port) == [None, None]
    assert first.result() == [None]


def test_what_is_no_process_0_is_told():
  with socket.create_server(("localhost", 0)) as server, futures.ThreadPoolExecutor(1) as pool:
    problem = pool.submit(meet, member(1), timeout=0.5, port=server.getsockname()[1])
    connection, _ = server.accept()
    with connection:
      connection.sendall(b"HTTP/1.1 400\r\n")
    server.close()
    assert "of 2 does not find process 0 (" in str(problem.result()[0])
