"""Measure saving and loading of a sharded state: extra memory, and how long a save blocks a run.

usage: python tools/bench/checkpoint.py [--mebibytes 512] [--rounds 5] [--out docs/results/checkpoint.json]

Each of two processes over gloo holds half of every tensor's rows, `--mebibytes` in all. Memory is
the growth of a process's anonymous pages (mapped files are the system's cache), sampled every
millisecond. Its limit is the size of the largest tensor and 64 MiB; a background save may use one
copy of the shard more. A background save may block the loop for 1.3 times as long as copying the
shard takes; the two are timed in turns, after a first save that also allocates.
"""  # noqa: E501

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import RESULTS, Table, memory_of, publish

from llmnorm.checkpoints.checkpoints import Checkpoints, Interval
from tests.distributed.processes import run

TENSOR = 32  # MiB of one tensor's rows on one process
SPARE = 64  # MiB


def grown(work: Callable[[], object]) -> float:
    """The largest growth of the process's anonymous memory during `work`, MiB."""
    before, found, ended = memory_of("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.001):
            found.append(memory_of("RssAnon") - before)

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    ended.set()
    thread.join()
    return max(found) / 2**20


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes when all processes start together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    directory: Path, rank: int, world: int, *, mebibytes: int, rounds: int
) -> dict[str, Any]:
    """This process's figures: MiB of `saving`, `loading`, `saving behind`; `ratio`; `seconds`."""
    rows, columns = TENSOR * 2**8, 2**10
    state = {
        f"model.{number}": Interval(
            torch.full((rows, columns), float(number)), rank * rows, (world * rows, columns)
        )
        for number in range(mebibytes // TENSOR)
    }
    plain = Checkpoints(directory, rank=rank, world=world)
    found: dict[str, Any] = {"saving": grown(lambda: plain.save(1, state, {}))}
    saved = plain.find(1)
    found["loading"] = grown(lambda: plain.load(saved, state))
    behind = Checkpoints(directory, rank=rank, world=world, asynchronous=True)

    def first() -> None:
        behind.save(2, state, {})
        behind.wait()

    found["saving behind"] = grown(first)
    copies = {name: torch.empty_like(part.tensor).fill_(0) for name, part in state.items()}

    def copy() -> None:
        for name, part in state.items():
            copies[name].copy_(part.tensor)

    copy()
    times: dict[str, list[float]] = {"save": [], "copy": []}
    for number in range(rounds):
        times["copy"].append(seconds(copy))
        times["save"].append(seconds(partial(behind.save, 3 + number, state, {})))
        behind.wait()
    found["ratio"] = statistics.median(
        save / copied for save, copied in zip(times["save"], times["copy"], strict=True)
    )
    return {**found, "seconds": times}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args(arguments)
    task = partial(measure, mebibytes=options.mebibytes, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as directory:
        by_process = run(task, Path(directory) / "run")
    assert all(isinstance(figures, dict) for figures in by_process), by_process
    shard = options.mebibytes
    limits = {
        "saving": TENSOR + SPARE,
        "loading": TENSOR + SPARE,
        "saving behind": shard + TENSOR + SPARE,
        "ratio": 1.3,
    }
    worst = {key: max(figures[key] for figures in by_process) for key in limits}
    holds = {key: worst[key] <= limits[key] for key in limits}
    names = {
        "saving": "saving, MiB",
        "loading": "loading, MiB",
        "saving behind": "saving in the background, MiB",
        "ratio": "time that a background save blocks, over a copy of the shard",
    }
    rows = [
        [names[key], f"{worst[key]:.4g}", f"{limits[key]:g}", "yes" if holds[key] else "no"]
        for key in limits
    ]
    table = Table(
        f"{shard} MiB a process in tensors of {TENSOR}, two processes; the worse of both",
        ["", "measured", "limit", "holds"],
        rows,
    )
    publish(options.out, "Checkpoints", [table], {"limits": limits, "processes": by_process})
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
