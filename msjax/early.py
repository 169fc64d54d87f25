"""What signals do to training while it has nothing to save: it ends at once and in one line."""

import os
import signal

_INTERRUPTED, _STOPPED = 130, 42  # 42 has the same command run again: see docs/pods.md


def listen() -> None:
  """Called before other imports, which take seconds; until `cli.run` for Ctrl-C, and for SIGTERM
  until the loop, or JAX for many processes, listens."""
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of what a script starts beside itself
    signal.signal(signal.SIGINT, _end)
  end_by_sigterm()


def end_by_sigterm() -> None:
  """Listens to SIGTERM again, which libtpu takes for itself when devices are first touched."""
  signal.signal(signal.SIGTERM, _end)


def _end(number: int, _) -> None:
  """Takes no lock, for it may run in the middle of an import or a log line."""
  interrupted = number == signal.SIGINT
  word = "interrupted" if interrupted else "stopped: by a signal"
  os.write(2, f"msjax.train: {word}; run again to go on\n".encode())
  os._exit(_INTERRUPTED if interrupted else _STOPPED)
