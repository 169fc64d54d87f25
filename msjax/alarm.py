"""The alarm: an error that ends one process of a run ends all, and each says whose it was.

Without it the others would wait for what a process that has failed no longer computes. So it writes
its error where all others look every second.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from typing import Any

import jax

from msjax.errors import InputError, RunError, Stopped, complain

_KEY = "msjax/alarm"
_LOOK_SECONDS = 1
_PARTING_SECONDS = 5


class Alarm:
  """Rings when an error ends its block, and ends this process when another rings; a context manager
  around all that the processes do together."""

  def __init__(self, service: Any, me: str):
    """Takes what `jax.distributed` joined processes by, and the name of this one."""
    self._service, self._me = service, me
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)

  def __enter__(self) -> "Alarm":
    """Listens from now on."""
    self._thread.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    """Tells the others of an error, unless they too were stopped."""
    self._done.set()
    self._thread.join()  # for ever if another has rung: this process is being ended
    if error is None or isinstance(error, Stopped):
      return
    status = getattr(error, "exit_status", 1)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one has rung already
      word = {"status": status, "what": f"{self._me}: {_said(error)}"}
      self._service.client.key_value_set(_KEY, json.dumps(word))
    if isinstance(error, Exception):  # and no second Ctrl-C
      self._part()
      atexit.register(_end, status)  # JAX would wait for computations that nobody ends

  def _listen(self) -> None:
    while not self._done.wait(_LOOK_SECONDS):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has rung
        word = json.loads(self._service.client.key_value_try_get(_KEY))
        complain(f"error: {word['what']}")
        self._part()
        _end(word["status"])

  def _part(self) -> None:
    """Leaves when all have heard: JAX aborts processes that lose process 0, or each other."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one is dead
      self._service.client.wait_at_barrier(_KEY, _PARTING_SECONDS * 1000)
      self._service.shutdown()


def _said(error: BaseException) -> str:
  """What commands say of an error in one line; of one that keeps its traceback, what it is."""
  if isinstance(error, KeyboardInterrupt):
    return "interrupted"
  return str(error) if isinstance(error, InputError | RunError | OSError) else repr(error)


def _end(status: int) -> None:
  sys.stdout.flush()
  os._exit(status)
