import os
import subprocess
import sys

import pytest

COMMAND = '''
"""Doubles a number."""
import sys
from absl import flags
from msjax import cli
from msjax.errors import InputError, RunError

N = flags.DEFINE_integer("number", None, "What is doubled.")

def main(argv):
  if N.value == 13:
    raise InputError("--number: 13 is unlucky;\\nexpected another")
  if N.value == 14:
    raise KeyboardInterrupt
  if N.value == 15:
    raise ZeroDivisionError
  if N.value == 16:
    return 5
  if N.value == 18:
    raise RunError("came to grief")
  if N.value == 17:
    sys.stdin.read()
  print(N.value * 2, "\\u00b7", len(argv))

if __name__ == "__main__":
  cli.run(main)
'''


@pytest.fixture
def command(tmp_path):
  path = tmp_path / "double.py"
  path.write_text(COMMAND)

  def call(*args, **options):
    return subprocess.run(
      [sys.executable, path, *args], capture_output=True, text=True, timeout=60, **options
    )

  return call


def test_flags_are_parsed_and_main_is_called(command):
  done = command("--number=4")
  assert (done.returncode, done.stdout, done.stderr) == (0, "8 · 1\n", "")


def test_the_status_of_main_is_that_of_the_command(command):
  assert command("--number=16").returncode == 5


@pytest.mark.parametrize(
  "args, line",
  [
    (["--number=13"], "--number: 13 is unlucky; expected another"),
    (["--nmuber=4"], "--nmuber: no such flag; did you mean 'number'?"),
    (["--xyzzy=4"], "--xyzzy: no such flag; see --help"),
    (["--number=four"], "flag --number=four: invalid literal for int() with base 10: 'four'"),
    (["--number=4", "5", "6"], "'5': unexpected word; flags are written --name=value"),
  ],
)
def test_what_a_user_got_wrong_is_one_line_and_status_2(command, args, line):
  done = command(*args)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"double.py: error: {line}\n"


def test_a_fault_of_ours_keeps_its_traceback(command):
  done = command("--number=15")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_an_interrupt_ends_without_a_traceback(command):
  done = command("--number=14")
  assert (done.returncode, done.stderr) == (130, "double.py: interrupted\n")


def test_help_shows_the_commands_flags(command):
  done = command("--help")
  assert done.returncode == 0
  assert "Doubles a number." in done.stdout
  assert "--number: What is doubled." in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path, command):
  process = subprocess.Popen(
    [sys.executable, tmp_path / "double.py", "--number=17"],
    env={**os.environ, "PYTHONUNBUFFERED": ""},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  process.stdout.close()
  process.stdin.close()  # only now is something printed
  assert process.stderr.read() == b""
  process.stderr.close()
  assert process.wait(timeout=60) == 141


def test_a_terminal_that_lacks_a_character_shows_its_code(command):
  done = command("--number=4", env={**os.environ, "PYTHONIOENCODING": "ascii"})
  assert (done.returncode, done.stdout) == (0, "8 \\xb7 1\n")


def test_a_run_that_came_to_grief_is_one_line_and_status_1(command):
  done = command("--number=18")
  assert (done.returncode, done.stderr) == (1, "double.py: error: came to grief\n")
