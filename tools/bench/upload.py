"""Measure how long copying a checkpoint up to a store holds a loop up, and its memory.

usage: python tools/bench/upload.py [--mebibytes 512] [--rounds 5] [--out docs/results/upload.json]

A checkpoint of `--mebibytes` is copied up to a real S3 server (moto's, on this machine) as in a run
(llmnorm/runs/upload.py), while the main thread takes steps: a few hundred small calls of torch,
which need the interpreter, and a product of matrices, which does not. `held` is the processor time
of the process's other threads in the meantime: no longer can they have had the interpreter, for
which a step waits. Its limit is 1.3 times a copy of the tensors in memory. `wall` is the time by
which steps take longer. It has no limit: the server, which is elsewhere in a run, takes a processor
and shares the other's caches here, and a machine whose speed changes by some percent within seconds
moves it by more than the limit. The memory is what the process and the one that sends large files
have grown by (anonymous pages); its limit is one copy of the checkpoint.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint import TENSOR, grown
from report import RESULTS, Table, publish

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.store import Keep
from llmnorm.remote.objects import open_store
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.upload import There, Upload
from tests.remote.served import environment, s3_server

LIMIT = 1.3  # copies of the tensors


class Taken(NamedTuple):
    """Steps that were taken.

    Attributes:
        number: of steps.
        seconds: of the wall clock.
        others: seconds of processor time of the process's other threads.
    """

    number: int
    seconds: float
    others: float


class Steps:
    """Steps of some milliseconds on one thread."""

    def __init__(self) -> None:
        self._matrix = torch.randn(512, 512)
        self._small = torch.zeros(64)

    def take(self, until: Callable[[int], bool]) -> Taken:
        """Take steps until `until` of their number is true."""
        number, start, others = 0, time.perf_counter(), of_other_threads()
        while not until(number):
            for _ in range(300):
                self._small.add_(1)
            self._matrix @ self._matrix
            number += 1
        return Taken(number, time.perf_counter() - start, of_other_threads() - others)


def of_other_threads() -> float:
    """Seconds of processor time that this process's other threads have used."""
    return time.process_time() - time.thread_time()


def of_children() -> int:
    """Anonymous memory of the processes that this one has started to send files, bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"llmnorm.remote.sender" in (folder / "cmdline").read_bytes():
                fields = dict(
                    line.split(":", 1) for line in (folder / "status").read_text().splitlines()
                )
                if int(fields["PPid"]) == os.getpid():
                    total += int(fields["RssAnon"].split()[0]) * 1024
        except OSError:  # it has ended
            continue
    return total


def measure(place: Path, state: dict[str, torch.Tensor], step: int) -> dict[str, float]:
    """Seconds of one round: `copy`, `held`, `wall`, `up` (until it is there); and its `steps`."""
    run = RunDirectory(place)
    run.path.mkdir(parents=True)
    run.config.write_text("# a run\n")
    Checkpoints(run.checkpoints).save(step, state, {})
    copies = {name: torch.empty_like(tensor).fill_(0) for name, tensor in state.items()}
    start = time.perf_counter()
    for name, tensor in state.items():
        copies[name].copy_(tensor)
    copy = time.perf_counter() - start
    del copies
    steps = Steps()
    steps.take(lambda n: n == 20)
    quiet = [steps.take(lambda n: n == 200)]
    store = open_store(f"s3://bucket/{place.name}", "run_dir")
    store.names()  # the client is made before a run's first step, when the lease is taken
    upload = Upload(run, store, Keep(2, None, False), There())
    upload.start()
    upload.finish()
    with_it = steps.take(lambda _: upload.is_up(0))
    quiet.append(steps.take(lambda n: n == 200))
    upload.stop()
    shutil.rmtree(place)
    share = with_it.number / sum(taken.number for taken in quiet)
    return {
        "copy": copy,
        "held": with_it.others,
        "wall": with_it.seconds - share * sum(taken.seconds for taken in quiet),
        "up": with_it.seconds,
        "steps": with_it.number,
    }


def memory(place: Path, state: dict[str, torch.Tensor]) -> float:
    """The growth of memory while a checkpoint is copied up, MiB."""
    run = RunDirectory(place)
    run.path.mkdir(parents=True)
    run.config.write_text("# a run\n")
    Checkpoints(run.checkpoints).save(1, state, {})
    store = open_store(f"s3://bucket/{place.name}", "run_dir")
    store.names()  # the client's own memory
    upload = Upload(run, store, Keep(2, None, False), There())

    def work() -> None:
        upload.start()
        upload.finish()
        while not upload.is_up(0.05):
            others.append(of_children())

    others = [0]
    found = grown(work)
    upload.stop()
    shutil.rmtree(place)
    return found + max(others) / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "upload.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = TENSOR * 2**8
    state = {
        f"model.{number}": torch.full((rows, 2**10), float(number))
        for number in range(max(1, options.mebibytes // TENSOR))
    }
    with tempfile.TemporaryDirectory() as folder, s3_server() as port:
        os.environ.update(environment(port))
        grew = memory(Path(folder) / "memory", state)
        rounds = [measure(Path(folder) / f"round-{n}", state, n + 1) for n in range(options.rounds)]
    ratio = statistics.median(found["held"] / found["copy"] for found in rounds)
    wall = statistics.median(found["wall"] / found["copy"] for found in rounds)
    limits: dict[str, Any] = {"ratio": LIMIT, "memory": options.mebibytes}
    size = options.mebibytes / statistics.median(found["up"] for found in rounds)
    table = Table(
        f"{options.mebibytes} MiB copied up to an S3 server on this machine, at {size:.0f} MiB/s",
        ["", "measured", "limit", "holds"],
        [
            [
                "processor time of other threads, for which steps may have waited, in copies",
                f"{ratio:.3g}",
                f"{LIMIT:g}",
                "yes" if ratio <= LIMIT else "no",
            ],
            [
                "time by which steps take longer, the server's work here included",
                f"{wall:.3g}",
                "",
                "",
            ],
            [
                "memory, MiB",
                f"{grew:.4g}",
                f"{options.mebibytes}",
                "yes" if grew <= options.mebibytes else "no",
            ],
        ],
    )
    figures = {"limits": limits, "ratio": ratio, "memory": grew, "rounds": rounds}
    publish(options.out, "Copying a checkpoint up", [table], figures)
    return 0 if ratio <= LIMIT and grew <= options.mebibytes else 1


if __name__ == "__main__":
    sys.exit(main())
