"""Candidates of a benchmark, each in a process of its own, that take turns.

The parent makes a `Candidate` for each command and asks for steps; the others wait meanwhile, so
that a busy machine slows all alike. The child makes a `Turns` and calls `done(loss)` after every
step. They speak JSON lines over the child's stdin and stdout; what libraries print goes to stderr.
"""

import json
import os
import subprocess
import sys
import time
from typing import IO, Any

import torch
from report import memory_of

WARMUP = 2  # steps before the first turn


class Candidate:
    """A candidate's process, seen from the parent; its warm-up is over.

    Args:
        name: for messages.
        command: starts the child.

    Attributes:
        losses: of all steps.
        memory: the most bytes that it had beside its libraries.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.name, self.losses, self.memory = name, list[float](), 0
        self._read()

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(f"{steps}\n")
        stdin.flush()
        return self._read()

    def _read(self) -> float:
        stdout: IO[str] | None = self.process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            sys.exit(f"bench: error: {self.name} ended with code {self.process.wait()}")
        answer = json.loads(line)
        self.losses += answer["losses"]
        self.memory = answer["memory"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Turns:
    """The child's side; made when all libraries are imported, before the model.

    Args:
        cuda: measure the GPU's memory instead of the process's.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cuda, self._before = cuda, memory_of("VmRSS")
        self._left, self._start = WARMUP, time.perf_counter()
        self._losses: list[float] = []

    def done(self, loss: float) -> None:
        """A step is done; waits for the next turn where this one is over."""
        self._losses.append(loss)
        self._left -= 1
        while self._left == 0:
            answer: dict[str, Any] = {
                "seconds": time.perf_counter() - self._start,
                "losses": self._losses,
                "memory": torch.cuda.max_memory_allocated()
                if self._cuda
                else memory_of("VmHWM") - self._before,
            }
            self._out.write(json.dumps(answer) + "\n")
            self._out.flush()
            self._left = int(sys.stdin.readline() or "0") or _exit()
            self._losses = []
            self._start = time.perf_counter()


def _exit() -> int:
    """The parent is gone or has enough."""
    sys.stderr.flush()
    os._exit(0)
