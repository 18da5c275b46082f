"""Measure what choosing the rows of a step costs: time beside plain steps, and memory.

usage: python tools/bench/selecting.py [--turns 7] [--out FILE]

Runs of the recipe of tools/reproduce/colm.py and of the quickstart choose 16 of 32 rows. Every turn
takes a plain step of 16 rows, then chooses the rows of a step by each selection, right behind a
forward pass of the pool. Figures are medians over the turns of ratios in a turn, of the CPU seconds
of one thread.

    measuring   losses or features of the pool's rows, in plain steps; the bar is 1.15 times what
                counting layers says: those below the last one once, the last one and the head twice
                a probe
    reading     the rows of the pool and of the picks, as a share of the whole step
    choosing    all else: sources, the selector, the figures for metrics.jsonl; the bar is 2 %

Memory is by how much the resident size rises in a step, choosing included; the bar is 1.1 times a
plain step of 16 rows. Weights and the optimizer's state are there before. What is freed goes back
to the system at once.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimizer_step import seconds, temporaries
from report import Table, publish

from llmnorm.config.file import load
from llmnorm.models.row_features import Feature
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.packed_text import PackedText
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
CHOOSING, MEASURING, MEMORY = 0.02, 1.15, 1.1  # the bars


class Clock:
    """The CPU seconds that measuring and reading rows take, summed up."""

    def __init__(self) -> None:
        self.seconds = {"measuring": 0.0, "reading": 0.0}
        Feature.measure = self._timed("measuring", Feature.measure)  # type: ignore[method-assign]
        PackedText.read = self._timed("reading", PackedText.read)  # type: ignore[method-assign]

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            found = function(*given, **named)
            self.seconds[name] += time.process_time() - start
            return found

        return timed


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


def all_runs(path: Path, stack: ExitStack) -> dict[str, Prepared]:
    """A run of each arm."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return {name: begin(path, words, place / name, stack) for name, words in ARMS.items()}


def times(path: Path, turns: int, clock: Clock) -> dict[str, dict[str, list[float]]]:
    """What the table of times shows of each selection, and seconds of plain steps, each turn."""
    with ExitStack() as stack:
        runs = all_runs(path, stack)
        batches = {name: run.batches() for name, run in runs.items()}
        forward = pool_forward(runs["plain"])
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(turns + 1):
            plain = seconds(partial(whole_step, runs["plain"], batches["plain"]))
            figures = {"plain": {"seconds": plain}}
            for name, run in runs.items():
                if not isinstance(run.config.selection, SelectionSettings):
                    continue
                counted = forwards(run.model, run.objective, run.config.selection)
                passed = seconds(forward) if counted else 0.0
                clock.seconds = dict.fromkeys(clock.seconds, 0.0)
                chosen = seconds(partial(next, batches[name]))
                measuring, reading = clock.seconds["measuring"], clock.seconds["reading"]
                figures[name] = {
                    "measuring": measuring / plain,
                    "reading": reading / (plain + chosen),
                    "choosing": (chosen - measuring - reading) / (plain + chosen),
                }
                if counted:
                    figures[name]["against counting"] = measuring / (counted * passed)
            for name, values in figures.items():
                for key, value in values.items():
                    if turn:  # the first one warms up
                        found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


def memory(path: Path) -> dict[str, int]:
    """Bytes by which memory rises in a step of each arm, the median of three."""
    temporaries(lambda: None)  # from here on what is freed goes back to the system
    with ExitStack() as stack:
        found = {}
        for name, run in all_runs(path, stack).items():
            taken = partial(whole_step, run, run.batches())
            taken()  # has the optimizer make its state
            found[name] = sorted(temporaries(taken) for _ in range(3))[1]
        return found


def whole_step(run: Prepared, batches: Iterator[list[MicroBatch]]) -> None:
    """A step, with the choice of its rows."""
    step(run, next(batches), StopRequest())


def time_table(size: str, found: dict[str, dict[str, list[float]]]) -> Table:
    """Medians over the turns."""
    rows = []
    for name, figures in found.items():
        if name == "plain":
            continue
        middle = {key: statistics.median(values) for key, values in figures.items()}
        cells = [name, f"{middle['measuring']:.2f}", "-", "-"]
        if against := middle.get("against counting"):
            cells[2:] = f"{against:.2f}", _holds(against <= MEASURING, f"{MEASURING}")
        cells += [f"{100 * middle[key]:.1f} %" for key in ("reading", "choosing")]
        rows.append([*cells, _holds(middle["choosing"] <= CHOOSING, f"{100 * CHOOSING:.0f} %")])
    plain = 1e3 * statistics.median(found["plain"]["seconds"])
    return Table(
        f"{size}: {BATCH} of {POOL} rows; a plain step of {BATCH} rows ({plain:.0f} ms) is 1",
        ["selection", "measuring", "against counting", "bar", "reading", "choosing", "bar"],
        rows,
    )


def memory_table(size: str, found: dict[str, int]) -> Table:
    """The arms beside plain steps."""
    rows = []
    for name, peak in found.items():
        plain = found["plain"], found["plain 2b"]
        bar = "-" if name.startswith("plain") else _holds(peak <= MEMORY * plain[0], f"{MEMORY}")
        rows.append([name, f"{peak / 1e6:.0f}", *(f"{peak / other:.2f}" for other in plain), bar])
    return Table(
        f"{size}: {BATCH} of {POOL} rows; by how much memory rises in a step",
        ["selection", "MB", f"against plain {BATCH}", f"against plain {POOL}", "bar"],
        rows,
    )


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
    taken = {size: times(path, given.turns, clock) for size, path in SIZES.items()}
    # Behind all times: giving what is freed back to the system is slow.
    risen = {size: memory(path) for size, path in SIZES.items()}
    shown = [
        table
        for size in SIZES
        for table in (time_table(size, taken[size]), memory_table(size, risen[size]))
    ]
    figures = {"times": taken, "memory": risen}
    publish(given.out, "What choosing the rows of a step costs", shown, figures)


if __name__ == "__main__":
    main()
