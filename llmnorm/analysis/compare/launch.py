"""Where the runs of a comparison go, and how one is started.

A run is a process of its own, `llmnorm train ...`, with a GPU to itself (or a share of one), or
with its share of the CPU's cores. `Slots` are the places for runs; `launch` starts one.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from llmnorm.machine.gpus import FREE_GPU_MIB, visible_gpus
from llmnorm.machine.parent import stop_with_parent
from llmnorm.part import InputError


class Process(Protocol):
    """The methods of a started run that a comparison calls; subprocess.Popen has them."""

    def poll(self) -> int | None:
        """The exit code; None while the run is running."""

    def terminate(self) -> None:
        """Send SIGTERM, at which a run saves and stops."""


Launch = Callable[[Sequence[str], IO[bytes], Mapping[str, str]], Process]

PACKAGE = Path(__file__).parents[2]


def launch(arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> Process:
    """Start `llmnorm train ARGUMENTS` with the package that this file belongs to.

    Args:
        arguments: what follows `llmnorm train`.
        log: where standard output and errors go.
        environment: the process's environment variables; PYTHONPATH is extended.
    """
    parent = str(PACKAGE.parent)
    paths = os.pathsep.join([parent, *filter(None, [environment.get("PYTHONPATH")])])
    # In a session of its own, so that Ctrl-C reaches the comparison alone, which then stops the
    # runs by `terminate`.
    return subprocess.Popen(
        [sys.executable, "-m", "llmnorm", "train", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONPATH": paths},
        start_new_session=True,
        preexec_fn=stop_with_parent,
    )


@dataclass(frozen=True)
class Slots:
    """The places for runs; slots are numbered from 0 to `count` - 1.

    Attributes:
        gpus: the GPU of each slot; empty: runs are on the CPU.
        threads: CPU threads of a run.
        count: runs at a time.
        per_gpu: runs that share a GPU.
    """

    gpus: tuple[int, ...]
    threads: int
    count: int
    per_gpu: int = 1

    def environment(self, slot: int) -> dict[str, str]:
        """The environment variables of the run in this slot.

        A launcher's variables are left out: a run is one process, whoever launched this one.
        """
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        kept = {key: value for key, value in os.environ.items() if key not in launcher}
        kept |= {"OMP_NUM_THREADS": str(self.threads)}
        return kept | ({"CUDA_VISIBLE_DEVICES": str(self.gpus[slot])} if self.gpus else {})

    def describe(self) -> str:
        """Device, threads and runs at a time in a few words, as `Record.place` keeps them."""
        where = "GPU" if self.gpus else f"CPU, {self.threads} thread{'s' * (self.threads > 1)}"
        shared = f", {self.per_gpu} on each" if self.per_gpu > 1 else ""
        return f"{where}, {self.count} at a time{shared}"


def slots(parallel: int, device: str, per_gpu: int = 1) -> Slots:
    """The places for `parallel` runs at a time.

    Args:
        parallel: runs at a time.
        device: `training.device`; unless it is `cpu`, free GPUs are used where there are any.
        per_gpu: runs that share a GPU.

    Raises:
        InputError: there are fewer free GPUs, or fewer cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // parallel))
    gpus = visible_gpus() if device != "cpu" else []
    free = [gpu.index for gpu in gpus if gpu.used_mib <= FREE_GPU_MIB]
    if gpus and parallel > len(free) * per_gpu:
        raise InputError(
            f"--parallel {parallel}: {len(free)} of {len(gpus)} GPUs are free, and each run needs "
            f"one; give --parallel {max(1, len(free) * per_gpu)}, or let small runs share a GPU "
            "by --runs-per-gpu"
        )
    if not gpus and per_gpu > 1:
        raise InputError(f"--runs-per-gpu {per_gpu}: there is no GPU; leave it out")
    if not gpus and parallel > cores:
        raise InputError(
            f"--parallel {parallel}: there are {cores} cores, and each run needs one; "
            f"give at most {cores}"
        )
    gpu_of_slot = [gpu for _ in range(per_gpu) for gpu in free]
    return Slots(tuple(gpu_of_slot[:parallel]) if gpus else (), threads, parallel, per_gpu)
