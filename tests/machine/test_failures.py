"""What no check foresaw becomes one line and an exit code, through the real command line."""

import errno
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.commands import parts
from llmnorm.machine.failures import failure


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
