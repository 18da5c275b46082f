"""One process trains in a run directory; processes are real ones."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm.part import InputError
from llmnorm.runs.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from llmnorm.runs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its standard input is closed."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    """Oracle: the other process's own number and this machine's name."""
    other = hold(tmp_path / "run")
    with pytest.raises(InputError) as caught, RunLock(tmp_path / "run"):
        pass
    other.communicate()
    assert f"process {other.pid} on {socket.gethostname()} is training in" in str(caught.value)
    assert "\n" not in str(caught.value)
    with RunLock(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").read_text().startswith(f"process {os.getpid()} on")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """Oracle: kill -9 of the holder."""
    other = hold(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with RunLock(tmp_path):
        pass


def test_a_lock_can_be_taken_again_after_an_error_inside(tmp_path: Path) -> None:
    """Oracle: the second entry succeeds, and a lock that is held is not taken twice."""
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path), pytest.raises(InputError), RunLock(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """Oracle: a file stands in the way."""
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(InputError, match="run_dir: .*/run cannot be made: File"),
        RunLock(tmp_path / "run"),
    ):
        pass
