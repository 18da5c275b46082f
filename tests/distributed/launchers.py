"""torchrun and accelerate launch in the tests: a launcher forked, whose workers are forked too.

`Torchrun` is torchrun's own `main` in a process that has imported everything; its option
`--start-method fork` spares each worker of each life the seconds of its imports. What is patched by
`before` in the launcher holds in its workers.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.running import CHILDREN, PATIENCE, ROOT

WORKER = ROOT / "tests" / "distributed" / "worker.py"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _torchrun(
    options: list[str], words: list[str], log: Path, before: Callable[[], None] | None
) -> None:
    from torch.distributed import run

    os.chdir(ROOT)
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.fsync = lambda fd: None
    if before is not None:
        before()
    run.main(["--start-method", "fork", "--run-path", *options, str(WORKER), *words])


class Torchrun:
    """`torchrun OPTIONS llmnorm WORDS`; `log` holds what it and its workers have printed."""

    def __init__(
        self,
        options: list[str],
        words: list[str],
        log: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        self.process = CHILDREN.Process(target=_torchrun, args=(options, words, log, before))
        self.process.start()

    def finish(self, seconds: float = PATIENCE) -> int:
        """Its exit code; minus the signal's number where a signal ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.log.read_text()}"
        return self.process.exitcode


def children(parent: int) -> list[int]:
    """The processes whose parent this is."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(directory.name))
    return found


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(holds: Callable[[], object], log: Path, seconds: float = PATIENCE) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def steps_in(run: Path) -> int:
    """The steps' lines in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"lr"') if path.exists() else 0


def life() -> int:
    """The number of this process's life under its launcher, from 0."""
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def kill_self() -> None:
    """As another process's kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def python(*words: str) -> list[str]:
    """A command of a module of this environment."""
    return [sys.executable, "-m", *words]
