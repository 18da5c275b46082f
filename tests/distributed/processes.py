"""Several real processes over gloo that a test starts.

A scenario runs on every process and returns what JSON can say; the tests judge what comes back.
"""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmnorm import cli
from tests.running import CHILDREN, PATIENCE, ROOT

Scenario = Callable[[Path, int, int], Any]


def run(
    scenario: Scenario,
    directory: Path,
    world: int = 2,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """What the scenario returns on each process; a killed one gives its exit code.

    The processes have a group, unless they are given a launcher's environment to make it by.
    """
    directory.mkdir(exist_ok=True)
    for file in directory.glob("rendezvous*"):
        file.unlink()
    started = [
        CHILDREN.Process(target=_process, args=(scenario, directory, rank, world, environment))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    answers = []
    for rank, process in enumerate(started):
        file = directory / f"answer_{rank}.json"
        answers.append(json.loads(file.read_text()) if file.exists() else process.exitcode)
        file.unlink(missing_ok=True)
    return answers


def command(directory: Path, rank: int, world: int, *, words: list[str]) -> tuple[int, str, str]:
    """A scenario: a command on every process; its exit code and what it printed."""
    os.chdir(ROOT)
    files = [directory.with_name(f"{name}_{rank}") for name in ("out", "err")]
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = cli.main(words)
    sys.stdout.flush()
    out, err = (file.read_text() for file in files)
    return code, out, err


def launch_environment(file: str, world: int = 2) -> dict[str, str]:
    """What `accelerate launch` with this file sets for its processes, by accelerate itself.

    Its last act, which starts Python, is left out: a fork costs a second's part of that.
    """
    from accelerate.commands import launch
    from torch.distributed import run as torchrun

    words = ["--config_file", file, "--num_processes", str(world), "-m", "llmnorm"]
    found: dict[str, str] = {}
    parsed = launch.launch_command_parser().parse_args(words)
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchrun, "run", lambda _: found.update(os.environ))
        launch.launch_command(parsed)
    assert dict(os.environ) == before
    with socket.socket() as free:
        free.bind(("localhost", 0))
        found["MASTER_PORT"] = str(free.getsockname()[1])
    return {name: text for name, text in found.items() if before.get(name) != text}


def _process(
    scenario: Scenario, directory: Path, rank: int, world: int, environment: dict[str, str] | None
) -> None:
    torch.set_num_threads(1)
    # No test here loses its power: hundreds of checkpoints need not wait for the disk.
    os.fsync = lambda fd: None
    # As torchrun says it; accelerate then takes the group that there is.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", **(environment or {})}
    if environment is None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE),
        )
    try:
        answer = scenario(directory / "checkpoints", rank, world)
    except Exception:
        answer = traceback.format_exc()
    (directory / f"answer_{rank}.json").write_text(json.dumps(answer))
    os._exit(0)  # a teardown would wait for a process that is gone
