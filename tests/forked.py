"""Commands as a shell starts them, but for imports, which take longer than most commands do.

A process imports what a command imports, and forks for each start of it.
"""

import ast
import atexit
import contextlib
import functools
import gc
import importlib.util
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types

NOTED_ON_IMPORT = ("JAX_", "PYTHON")


def run(program, *words, cwd=None, timeout=180, env=None):
  """Does as `subprocess.run` does for `python -m PROGRAM WORDS`, and captures what it says.

  Args:
    program: a module, or the text of a program, as for `python -c`.
    words: of the command line.
    cwd: the directory in which it runs.
    timeout: seconds.
    env: its environment.
  """
  with tempfile.TemporaryDirectory() as place:
    said = [pathlib.Path(place) / name for name in ("stdout", "stderr")]
    process = start(program, *words, cwd=cwd, env=env, stdout=said[0], stderr=said[1])
    try:
      status = process.wait(timeout)
    finally:
      process.kill()
    return subprocess.CompletedProcess(words, status, *(path.read_text() for path in said))


def start(program, *words, stdout, stderr, cwd=None, env=None, umask=0o022):
  """Starts what `run` runs; what it says goes to the ends of two files."""
  env = dict(os.environ if env is None else env)
  noted = {name: value for name, value in env.items() if name.startswith(NOTED_ON_IMPORT)}
  request = {
    "program": program,
    "words": words,
    "cwd": str(cwd or os.getcwd()),
    "env": env,
    "umask": umask,
    "stdout": os.path.abspath(stdout),
    "stderr": os.path.abspath(stderr),
  }
  return Process(_server(_imports(program), json.dumps(noted, sort_keys=True)), request)


class Process:
  """What a test needs of `subprocess.Popen`."""

  def __init__(self, server, request):
    self._server = server
    self.returncode = None
    self.pid = server.ask(request)

  def poll(self):
    if self.returncode is None:
      self.returncode = self._server.ask({"ended": self.pid})
    return self.returncode

  def wait(self, timeout=None):
    deadline = time.monotonic() + (timeout or float("inf"))
    while self.poll() is None:
      if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(str(self.pid), timeout)
      time.sleep(0.01)
    return self.returncode

  def stop(self):
    """Freezes the process; returns whether it was there to be frozen."""
    self.send_signal(signal.SIGSTOP)
    if self.returncode is None:
      self.returncode = self._server.ask({"stopped": self.pid})
    return self.returncode is None

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)


class Server:
  """A process that has imported something."""

  def __init__(self, imports, noted):
    self._lock = threading.Lock()
    self._process = subprocess.Popen(
      [sys.executable, __file__, imports],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, **noted},
    )

  def ask(self, question):
    with self._lock:
      print(json.dumps(question), file=self._process.stdin, flush=True)
      return json.loads(self._process.stdout.readline())

  def __del__(self):
    self._process.stdin.close()  # by which it ends
    self._process.wait()


@functools.lru_cache(maxsize=1)  # each takes 200 MB
def _server(imports, noted):
  return Server(imports, json.loads(noted))


atexit.register(_server.cache_clear)


@functools.cache
def _imports(program):
  """The statements by which a program imports, but for those in functions."""
  if _is_module(program):
    program = pathlib.Path(importlib.util.find_spec(program).origin).read_text()
  found = (
    node for node in ast.parse(program).body if isinstance(node, ast.Import | ast.ImportFrom)
  )
  return "\n".join(map(ast.unparse, found))


def _is_module(program):
  return "\n" not in program


def _request():
  """Answers what the tests ask; returns, in a process of its own, each program to run."""
  gc.collect()
  gc.freeze()  # pages that are not written to are not copied
  answers = os.fdopen(os.dup(1), "w")
  questions = os.fdopen(os.dup(0))
  os.dup2(os.open(os.devnull, os.O_RDWR), 0)
  os.dup2(2, 1)
  for line in questions:
    question = json.loads(line)
    if "ended" in question:
      answer = _status(question["ended"], os.WNOHANG)
    elif "stopped" in question:
      answer = _status(question["stopped"], os.WUNTRACED)
    else:
      answer = os.fork()
      if not answer:
        questions.close()
        os.close(answers.fileno())
        return question
    print(json.dumps(answer), file=answers, flush=True)
  return None


def _status(pid, options):
  """None of a process that has not ended."""
  found, status = os.waitpid(pid, options)
  return os.waitstatus_to_exitcode(status) if found and not os.WIFSTOPPED(status) else None


def _become(request):
  """Makes this process the one that a shell would have started."""
  for number, name in ((1, "stdout"), (2, "stderr")):
    file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, number)
    os.close(file)
  os.umask(request["umask"])
  os.chdir(request["cwd"])
  os.environ.clear()
  os.environ.update(request["env"])
  sys.path.insert(0, request["cwd"])
  sys.argv = ["-c", *request["words"]]
  if _is_module(request["program"]):
    runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
  else:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["program"], "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
  sys.path.pop(0)  # this directory, where a shell does not look
  for statement in sys.argv[1].splitlines():
    with contextlib.suppress(ImportError):  # a program may say where else to look
      exec(statement, {"__name__": "imports"})
  if request := _request():
    _become(request)
