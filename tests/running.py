"""Runs in processes of their own, and what is compared of two runs.

A child process forks from a server that has imported torch and the training room already, so that a
killed or resumed run costs its steps, not its imports.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the children are bit-equal only at equal threads

import torch

from llmnorm.checkpoints.format import copy_into, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]  # a test may be imported through a link
SMOKE = ROOT / "configs" / "smoke.yaml"
# What makes the smoke run one of masked tokens.
MASKED = [
    *("objective=masked_lm", "tokenizer.mask=true", "model.mixer=hydra"),
    *("model.mixer.head_dim=32", "model.mixer.state_size=8", "model.mlp=none"),
    "model.num_hidden_layers=1",
]

CHILDREN = multiprocessing.get_context("forkserver")
# There is one server for all files: setting this anywhere else would take the imports from it.
# torch's compiler is imported by DeepSpeed, in every process that begins to shard by it.
CHILDREN.set_forkserver_preload(
    [
        *("llmnorm.cli", "llmnorm.training.loop", "accelerate", "pytest"),
        *("torch._inductor.compile_fx", "tests.frozen"),
    ]
)

# Fields of metrics.jsonl that may differ between two runs of the same numbers.
TIMES = (
    *("seconds", "tokens_per_second", "mfu", "memory_bytes", "stragglers"),
    *("spent", "wall", "goodput", "clock"),
    *("selection_seconds", "selection_share"),
)


# Seconds after which a child counts as hung: far more than any takes on a busy machine.
PATIENCE = 1800


def _command(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    from llmnorm.cli import main

    os.environ.update(environment)
    os.chdir(ROOT)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if before is not None:
        before()
    sys.exit(main(arguments))


class Child:
    """One `llmnorm` command in a process of its own; `log` holds what it has printed.

    `environment` holds variables beside those of this process; `before`, a function of a module, is
    called there before the command.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        self.process = CHILDREN.Process(
            target=_command, args=(arguments, log, environment or {}, before)
        )
        self.process.start()

    def finish(self, seconds: float = PATIENCE) -> int:
        """Its exit code; minus the signal's number where a signal ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.log.read_text()}"
        return self.process.exitcode


class ForkedRun:
    """A run of a comparison, forked from a process that has imported everything."""

    def __init__(self, words: Sequence[str], log: IO[bytes], _: Mapping[str, str]) -> None:
        from llmnorm.cli import main
        from llmnorm.machine.parent import stop_with_parent

        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                stop_with_parent()
                os.setsid()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                # As after an exec: no handler, and no descriptor that holds the comparison's lock.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                code = main(["train", *words])
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        os.kill(self._pid, signal.SIGTERM)


def llmnorm(*words: str | Path) -> None:
    """One command in this process, which must succeed."""
    from llmnorm import cli

    assert cli.main([str(word) for word in words]) == 0


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times, rates and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def state_of(run: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint by name."""
    checkpoint = read_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    state = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in checkpoint.manifest["tensors"].items()
    }
    copy_into(checkpoint, state)
    return state


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Weights, optimizer state and metrics are equal to the bit."""
    first, second = state_of(one, step), state_of(other, step)
    assert first.keys() == second.keys()
    assert any(k.startswith("optimizer.") for k in first)
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name
    assert metrics_of(one) == metrics_of(other)
