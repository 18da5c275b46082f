"""Measure what choosing the rows of a step costs: time beside plain steps, and memory.

usage: python tools/bench/selecting.py [--turns 7] [--out FILE]

Runs of the recipe of tools/reproduce/colm.py and of the quickstart choose 16 of 32 rows. Every turn
takes a plain step of 16 rows and a forward pass of the pool, then chooses the rows of a step by
each selection. Figures are medians of the turns, CPU seconds of one thread.

    measuring   losses or features of the pool's rows; the bar is 1.15 times what counting layers
                says: the layers below the last one once, the last one and the head twice a probe
    the rest    reading the pool and the picks, the selector, and the figures for metrics.jsonl, as
                a share of the whole step; the bar is 2 %

Memory is by how much the resident size rises in a step, choosing included; the bar is 1.1 times a
plain step of 16 rows. Weights and the optimizer's state are there before. What is freed goes back
to the system at once.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimizer_step import seconds, temporaries
from report import Table, publish

from llmnorm.config.file import load
from llmnorm.models.row_features import Feature, Measured
from llmnorm.runs import directory as run_directory
from llmnorm.selection.settings import SelectionSettings
from llmnorm.training.prepare import Prepared, prepare
from llmnorm.training.selecting import forwards
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import step

BATCH, POOL = 16, 32
SIZES = {
    "recipe": Path("configs/recipes/colm/pretraining.yaml"),
    "quickstart": Path("configs/quickstart.yaml"),
}
CHOSEN = f"selection.pool={POOL}"
ARMS: dict[str, list[str]] = {
    "plain": [],
    "random": ["selection=random", CHOSEN],
    "stratified": ["selection=stratified", CHOSEN],
    "loss": ["selection=loss", CHOSEN],
    "colm": ["selection=colm", CHOSEN],
    "gradient": ["selection=colm", "selection.feature=gradient", CHOSEN],
    "hidden": ["selection=colm", "selection.feature=hidden", CHOSEN],
    "plain 2b": [f"training.global_batch={POOL}"],
}
REST, MEASURING, MEMORY = 0.02, 1.15, 1.1  # the bars


class Clock:
    """The CPU seconds that features take, summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        measure = Feature.measure

        def timed(*given: Any) -> Measured:
            start = time.process_time()
            found = measure(*given)
            self.seconds += time.process_time() - start
            return found

        Feature.measure = timed  # type: ignore[method-assign, assignment]


def begin(path: Path, words: list[str], place: Path, stack: ExitStack) -> Prepared:
    """A run before its first step."""
    settings = [f"training.global_batch={BATCH}", *words, f"run_dir={place}"]
    config = load(path, settings).config
    directory = run_directory.agree(config, going_on=False)
    return prepare(config, directory, stack, data_command="llmnorm data", dry_run=True)


def pool_forward(run: Prepared) -> Callable[[], None]:
    """A forward pass of a pool's rows, as many at once as in a step."""
    rows = [*run.unselected(0), *run.unselected(BATCH)]

    @torch.no_grad()
    def forward() -> None:
        for batch in rows:
            run.model(**batch.inputs_on(run.parallel.device))

    return forward


def measure(path: Path, turns: int, clock: Clock) -> dict[str, Any]:
    """All figures of one size."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = {name: begin(path, words, place / name, stack) for name, words in ARMS.items()}
        batches = {name: run.batches() for name, run in runs.items()}

        def whole(name: str) -> None:
            step(runs[name], next(batches[name]), StopRequest())

        forward = pool_forward(runs["plain"])
        passes = {
            name: forwards(run.model, run.objective, run.config.selection)
            for name, run in runs.items()
            if isinstance(run.config.selection, SelectionSettings)
        }
        times: dict[str, list[float]] = defaultdict(list)
        for turn in range(turns + 1):
            found = {"plain step": seconds(partial(whole, "plain")), "forward": seconds(forward)}
            for name in passes:
                clock.seconds = 0.0
                choosing = seconds(partial(next, batches[name]))
                found[f"{name} measuring"] = clock.seconds
                found[f"{name} rest"] = choosing - clock.seconds
            for key, value in found.items():
                if turn:  # the first one warms up
                    times[key].append(value)
        for name in runs:
            whole(name)  # has the optimizer make its state
        memory = {name: temporaries(partial(whole, name)) for name in runs}
    return {"seconds": times, "forward passes": passes, "memory": memory}


def tables(size: str, found: dict[str, Any]) -> list[Table]:
    """Time and memory of one size."""
    middle = {name: statistics.median(values) for name, values in found["seconds"].items()}
    plain, forward, memory = middle["plain step"], middle["forward"], found["memory"]
    times, bytes_of = [], []
    for name, passes in found["forward passes"].items():
        measuring, rest = middle[f"{name} measuring"], middle[f"{name} rest"]
        share = rest / (plain + measuring + rest)
        cells = [name, f"{measuring / plain:.2f}", "-", "-", f"{100 * share:.1f} %"]
        if passes:
            against = measuring / (passes * forward)
            cells[2:4] = f"{against:.2f}", _holds(against <= MEASURING, f"{MEASURING}")
        times.append([*cells, _holds(share <= REST, f"{100 * REST:.0f} %")])
    for name, peak in memory.items():
        own = memory["plain"], memory["plain 2b"]
        bar = "-" if name.startswith("plain") else _holds(peak <= MEMORY * own[0], f"{MEMORY}")
        ratios = [f"{peak / other:.2f}" for other in own]
        bytes_of.append([name, f"{peak / 1e6:.0f}", *ratios, bar])
    head = f"{size}: {BATCH} of {POOL} rows"
    return [
        Table(
            f"{head}; a plain step of {BATCH} rows is 1 ({1e3 * plain:.0f} ms)",
            ["selection", "measuring", "against counting", "bar", "the rest", "bar"],
            times,
        ),
        Table(
            f"{head}; by how much memory rises in a step",
            ["selection", "MB", f"against plain {BATCH}", f"against plain {POOL}", "bar"],
            bytes_of,
        ),
    ]


def _holds(holds: bool, bar: str) -> str:
    return f"{bar} {'holds' if holds else 'FAILS'}"


def main() -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    found = {size: measure(path, given.turns, clock) for size, path in SIZES.items()}
    shown = [table for size, one in found.items() for table in tables(size, one)]
    publish(given.out, "What choosing the rows of a step costs", shown, {"sizes": found})


if __name__ == "__main__":
    main()
