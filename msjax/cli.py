"""What all commands share: flags are parsed, and what a user got wrong is one line and status 2."""

import logging as std_logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from msjax.errors import InputError, RunError, complain, nearest

_FAILED = 1  # exit status
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as of a shell


def run(
  main: Callable[[list[str]], int | None], check: Callable[[list[str]], None] | None = None
) -> None:
  """Parses the command line, calls `main([program])` and exits with what it returns.

  A wrong flag, a leftover word and an `InputError` end with one line on stderr and status 2, a
  `RunError` with one line and its own status, what the system refuses (a full disk, a missing
  permission) with one line and status 1, Ctrl-C with 130, and a reader of the output that went away
  with 141 and in silence.

  Args:
    main: the command.
    check: raises `InputError` for what it finds wrong with `sys.argv` before flags are parsed.
  """
  sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack what a model says

  def flushed(argv: list[str]) -> int | None:
    status = main(argv)
    sys.stdout.flush()
    return status

  _log_plainly()
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    if check is not None:
      check(sys.argv)
    app.run(flushed, flags_parser=_parse)
  except (InputError, RunError) as error:
    complain(f"{error.kind}: {error}")
    sys.exit(error.exit_status)
  except KeyboardInterrupt:
    complain("interrupted")
    os._exit(_INTERRUPTED)  # XLA may be compiling still, and would crash in an orderly exit
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    sys.exit(_BROKEN_PIPE)
  except OSError as error:
    complain(f"error: {error}")
    sys.exit(_FAILED)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; `--help` prints them and exits with 0."""
  try:
    program, *words = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    close = nearest(error.flagname, flags.FLAGS)
    raise InputError(f"--{error.flagname}: no such flag{close or '; see --help'}") from None
  except flags.Error as error:
    lines = str(error).strip().splitlines()  # more than one only of a config file: its traceback
    raise InputError(" ".join(dict.fromkeys((lines[0].strip(), lines[-1])))) from None
  except Exception as error:  # raised by a config file
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raise InputError(f"{frame.filename}:{frame.lineno}: {type(error).__name__}: {error}") from None
  except SystemExit:  # absl ends --help with status 1
    sys.stdout.flush()
    sys.exit(0)
  if words:
    raise InputError(f"{words[0]!r}: unexpected word; flags are written --name=value")
  return [program]


def _log_plainly() -> None:
  """Lines of a time and a message; of libraries only errors (Orbax warns of much that is in order),
  and no tracebacks of what they then raise (it logs one from each of its threads)."""
  handler = logging.get_absl_handler()
  handler.setFormatter(std_logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
  ours = os.path.dirname(__file__)
  handler.addFilter(
    lambda record: (
      record.pathname.startswith(ours)
      or (record.levelno >= std_logging.ERROR and not record.exc_info)
    )
  )
