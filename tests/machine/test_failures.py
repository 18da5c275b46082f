"""What no check foresaw becomes one line and an exit code, through the real command line."""

import errno
import os
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.commands import parts
from llmnorm.machine.failures import failure
from tests.running import PATIENCE


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (MemoryError(), 2, "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 4 bytes"),
            2,
            "out of memory",
        ),
        (ImportError("libtorch.so: failed to map segment from shared object"), 2, "out of memory"),
        (RuntimeError("can't start new thread"), 2, "ulimit -u"),
        (
            RuntimeError("The global thread pool has not been initialized.: ThreadPoolBuildError"),
            2,
            "ulimit -u",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "x/y: No space left"),
        (OSError(errno.EMFILE, "Too many open files", "a.npy"), 2, "a.npy: too many files"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "x/y: Permission denied"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]"),
            74,
            "another process of this run was lost",
        ),
    ],
)
def test_kinds_of_failure(error: Exception, code: int, word: str, tmp_path: Path) -> None:
    """Oracle: messages as torch, gloo and the system raise them; no report is written."""
    found = failure(error, ["train", "a.yaml"], tmp_path)
    assert found.exit_code == code and word in found.line
    assert "\n" not in found.line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyError("x"), OSError(errno.ENOSPC, "full", "x")]
)
def test_one_of_several_processes_says_who_it_is(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: rank, host and the traceback's last line first, the scheduler's option last."""
    alone = failure(error, ["train", "a.yaml"], tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    found = failure(error, ["train", "a.yaml"], tmp_path)
    host, last = socket.gethostname(), traceback.format_exception_only(error)[-1].strip()
    assert found.exit_code == alone.exit_code
    assert found.line.startswith(f"rank 3 (host {host}, process {os.getpid()}): {last.strip()}")
    assert found.line.endswith(f"; to leave its host out: --exclude={host}")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("gloo is a nice word"), ValueError("a\nb"), AssertionError(), KeyError(3)],
)
def test_anything_else_is_a_defect_of_ours(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The line names the command and a report that holds the traceback; the exit code is 70."""
    monkeypatch.chdir(tmp_path)

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(parts, "run", broken)
    assert cli.main(["parts"]) == 70
    line = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert line.count("\n") == 1 and "Traceback" not in line
    assert f"llmnorm parts: unexpected; details in {report.name}" in line
    text = report.read_text()
    assert "Traceback" in text and "command: llmnorm parts" in text and "in broken" in text


def test_a_panic_of_another_language_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: an exception that is no `Exception`, as Rust's panics are."""
    monkeypatch.chdir(tmp_path)

    class PanicException(BaseException):
        pass

    def panics(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(parts, "run", panics)
    assert cli.main(["parts"]) == 70
    assert "unexpected; details in" in capsys.readouterr().err


def test_an_interrupt_that_nobody_typed_is_a_lack_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: what OpenBLAS does where no thread starts; the same where threads start."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parts, "run", interrupted)
    assert cli.main(["parts"]) == 130
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert cli.main(["parts"]) == 2
    assert "no more threads can be started" in capsys.readouterr().err


def test_a_limit_in_which_torch_has_no_room_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    """Oracle: a real command under the shell's limit; within it some libraries wait for ever."""
    words = [sys.executable, "-m", "llmnorm", "generate", str(tmp_path)]
    limited = ["bash", "-c", 'ulimit -v 900000 && exec "$@"', "_", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "out of memory: `ulimit -v` leaves this process 922 MB" in line


def test_a_locale_that_is_not_utf_8_is_escaped_in_what_is_printed(run: Path) -> None:
    """Oracle: a real command whose output is Latin-1."""
    words = [sys.executable, "-m", "llmnorm", "generate", str(run), "--prompt", "\u6771"]
    done = subprocess.run(
        [*words, "generation.max_new_tokens=1"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\u6771")
