"""Every layout's checkpoint, loaded by every layout: the matrix of pairs.

usage: python tools/bench/pairs.py [--out docs/results/pairs.json]

Real processes over gloo train the tests' tiny model in float32 for 4 steps under one layout, save,
and go on for 4 steps under another; one process that never stopped is beside them. A figure is the
largest relative difference of a loss, over steps and optimizers; the limit is 1e-6.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Table, publish

from tests.distributed.processes import run
from tests.distributed.tiny import Run

# Sharding, processes, replicas.
LAYOUTS = {
    "1 process": ("none", 1, 1),
    "ddp 2": ("ddp", 2, 1),
    **{f"fsdp2 {world}": ("fsdp2", world, 1) for world in (2, 3, 4)},
    "hsdp 2x2": ("hsdp", 4, 2),
    **{f"{stage} 2": (stage, 2, 1) for stage in ("zero1", "zero2", "zero3")},
}
OPTIMIZERS = ("adamw", "muon", "conda", "muon+nap")  # elementwise, momentum, bases, norms
STEPS, LIMIT = 4, 1e-6


class Told(Run):
    """A run that keeps its losses."""

    def __init__(self, layout: str, optimizer: str) -> None:
        sharding, _, replicas = LAYOUTS[layout]
        self.losses: list[float] = []
        super().__init__(sharding, optimizer, replicas, dtype=torch.float32, lr=1e-3)

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        """As a run's."""
        self.losses.append(super().forward_backward(step, scale))
        return self.losses[-1]


def saved(directory: Path, rank: int, world: int, *, layout: str) -> dict[str, list[float]]:
    """Train and save; the losses, and of one process those of the steps that follow too."""
    said = {}
    for optimizer in OPTIMIZERS:
        one = Told(layout, optimizer)
        one.train(0, STEPS)
        one.save(directory.parent / f"{layout} {optimizer}", STEPS)
        if world == 1:
            one.train(STEPS, 2 * STEPS)
        said[optimizer] = one.losses
    return said


def gone_on(directory: Path, rank: int, world: int, *, layout: str) -> dict[str, Any]:
    """Load what every layout saved and train; the losses."""
    said: dict[str, Any] = {}
    for old in LAYOUTS:
        for optimizer in OPTIMIZERS:
            one = Told(layout, optimizer)
            one.load(directory.parent / f"{old} {optimizer}", STEPS)
            one.train(STEPS, 2 * STEPS)
            said.setdefault(old, {})[optimizer] = one.losses
    return said


def main(arguments: list[str] | None = None) -> int:
    """Save, go on, print, write; 1 if a pair misses the limit."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "pairs.json")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, float]] = {old: {} for old in LAYOUTS}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        first = {
            layout: run(partial(saved, layout=layout), place, world)[0]
            for layout, (_, world, _) in LAYOUTS.items()
        }
        for layout, (_, world, _) in LAYOUTS.items():
            found = run(partial(gone_on, layout=layout), place, world)[0]
            assert isinstance(found, dict), found
            print(f"{layout} has gone on from all", file=sys.stderr, flush=True)
            for old in LAYOUTS:
                figures[old][layout] = max(
                    abs(loss - alone) / alone
                    for optimizer in OPTIMIZERS
                    for loss, alone in zip(
                        first[old][optimizer][:STEPS] + found[old][optimizer],
                        first["1 process"][optimizer],
                        strict=True,
                    )
                )
    rows = [[old, *(f"{figures[old][new]:.0e}" for new in LAYOUTS)] for old in LAYOUTS]
    table = Table("saved by (lines), loaded by (columns)", ["", *LAYOUTS], rows)
    title = "Checkpoints between layouts: largest relative difference of a loss from one process's"
    publish(options.out, title, [table], {"limit": LIMIT, "figures": figures})
    return int(any(value > LIMIT for line in figures.values() for value in line.values()))


if __name__ == "__main__":
    sys.exit(main())
