"""Checkpoints between layouts: every layout loads the checkpoint of every other one.

usage: python tools/bench/pairs.py [--out docs/results/pairs.json]

Real processes over gloo train the tests' tiny model in float32 for 4 steps under one layout, save,
and continue for 4 steps under another layout. They are compared with one process that is not
interrupted. A figure is the largest relative difference of a loss, over steps and optimizers; the
limit is 1e-6.
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


class RunWithLosses(Run):
    """A run that keeps its losses in `losses`."""

    def __init__(self, layout: str, optimizer: str) -> None:
        sharding, _, replicas = LAYOUTS[layout]
        self.losses: list[float] = []
        super().__init__(sharding, optimizer, replicas, dtype=torch.float32, lr=1e-3)

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        """As `Run.forward_backward`; the loss is kept."""
        self.losses.append(super().forward_backward(step, scale))
        return self.losses[-1]


def saved(directory: Path, rank: int, world: int, *, layout: str) -> dict[str, list[float]]:
    """Train and save under a layout; the losses by optimizer.

    A single process then trains the remaining steps too, as the uninterrupted run.
    """
    losses = {}
    for optimizer in OPTIMIZERS:
        trained = RunWithLosses(layout, optimizer)
        trained.train(0, STEPS)
        trained.save(directory.parent / f"{layout} {optimizer}", STEPS)
        if world == 1:
            trained.train(STEPS, 2 * STEPS)
        losses[optimizer] = trained.losses
    return losses


def resumed(directory: Path, rank: int, world: int, *, layout: str) -> dict[str, Any]:
    """Resume what every layout has saved; the losses by old layout and optimizer."""
    losses: dict[str, Any] = {}
    for old in LAYOUTS:
        for optimizer in OPTIMIZERS:
            continued = RunWithLosses(layout, optimizer)
            continued.load(directory.parent / f"{old} {optimizer}", STEPS)
            continued.train(STEPS, 2 * STEPS)
            losses.setdefault(old, {})[optimizer] = continued.losses
    return losses


def main(arguments: list[str] | None = None) -> int:
    """Save, resume, print, write; returns 1 if a pair exceeds the limit."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "pairs.json")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, float]] = {old: {} for old in LAYOUTS}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        first = {
            layout: run(partial(saved, layout=layout), root, world)[0]
            for layout, (_, world, _) in LAYOUTS.items()
        }
        for layout, (_, world, _) in LAYOUTS.items():
            found = run(partial(resumed, layout=layout), root, world)[0]
            assert isinstance(found, dict), found
            print(f"{layout} has resumed from all", file=sys.stderr, flush=True)
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
