"""Compare every optimizer under every sharding with one process on the same rows.

usage: python tools/bench/sharding.py [--steps 20] [--out docs/results/sharding.json]

Real processes over gloo train the tests' tiny model with learning rate 0.001. A figure is the
largest difference of any weight from that of one process. In float64 the limit is 1e-9. In float32
there is a yardstick beside it: the difference between two runs of one process that cut a step's
rows into 1 and into W micro-batches. The limit is 3 times the yardstick, and 2e-6 for AdamW and
Muon after 5 steps. DeepSpeed's weights are always float32; `zero1` to `zero3` need its extra. All
optimizers of a column run in one launch.

With learning rate 0.01 all cells keep their limits (SOAP 1.5 times the yardstick) except AdamW's
after 5 steps: 4.6e-6 on 3 and 2.1e-6 on 4 processes. It is a single weight, whose first gradient of
1.4e-8 is as small as AdamW's eps, beside an RMS of 2e-4. Its sum over processes is rounded
differently by 2.6e-11, of which lr g / (|g| + eps) makes 4.6e-6; cutting the rows of one process
into micro-batches has the same effect.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Table, publish
from torch import Tensor, nn

from llmnorm.optim import sharded
from tests.distributed.processes import run
from tests.distributed.tiny import OPTIMIZERS, Run

# (sharding, processes, replicas)
CELLS = [
    *((kind, world, 1) for kind in ("ddp", "fsdp2") for world in (2, 3, 4)),
    ("hsdp", 4, 2),
    *((kind, world, 1) for kind in ("zero1", "zero2", "zero3") for world in (2, 3, 4)),
]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LR = 1e-3
SOON, AT_ONCE = 5, ("adamw", "muon")  # after these steps, these optimizers have a limit too
LIMITS = {"float64": 1e-9, "soon": 2e-6, "times the yardstick": 3}
Weights = dict[str, Tensor]


def trained(run: Run, steps: int) -> dict[str, Weights]:
    """Whole weights after SOON steps (`soon`) and after all (`end`)."""
    found: dict[str, Weights] = {}

    def keep(step: int) -> None:
        for name, when in (("soon", SOON), ("end", steps)):
            if step + 1 == when:
                found[name] = {n: whole(p) for n, p in run.model.named_parameters()}

    run.train(0, steps, keep)
    return found


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy of a whole parameter, however it is sharded."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).clone()
    local = parameter.detach()
    return getattr(local, "full_tensor", local.clone)()


def precisions(sharding: str) -> dict[str, torch.dtype]:
    """The precisions that a sharding offers: DeepSpeed's weights are float32."""
    return {p: d for p, d in DTYPES.items() if p == "float32" or not sharding.startswith("zero")}


def column(
    directory: Path, rank: int, world: int, *, sharding: str, replicas: int, steps: int
) -> bool:
    """All optimizers in both precisions; the first process writes their weights."""
    sharded.BUCKET_BYTES = 4096  # several buckets
    for name in OPTIMIZERS:
        for precision, dtype in precisions(sharding).items():
            found = trained(
                Run(sharding, name, replicas, micro_batches=1, dtype=dtype, lr=LR), steps
            )
            if rank == 0:
                torch.save(found, directory.parent / f"{name} {precision}")
    return True


def distance(first: Weights, second: Weights) -> float:
    """The largest difference of a weight."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharding.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cuts = sorted({1, *(world for _, world, _ in CELLS)})
    alone: dict[str, Any] = {
        f"{name} {precision} {cut}": trained(
            Run("none", name, micro_batches=cut, dtype=dtype, lr=LR), options.steps
        )
        for name in OPTIMIZERS
        for precision, dtype in DTYPES.items()
        for cut in (cuts if precision == "float32" else [1])
    }
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for sharding, world, replicas in CELLS:
            directory = Path(root) / f"{sharding} {world}"
            task = partial(column, sharding=sharding, replicas=replicas, steps=options.steps)
            results = run(task, directory, world)
            assert results == [True] * world, results
            print(f"{sharding} on {world} processes is done", file=sys.stderr, flush=True)
            for name in OPTIMIZERS:
                found = {p: torch.load(directory / f"{name} {p}") for p in precisions(sharding)}
                single = {p: alone[f"{name} {p} 1"] for p in DTYPES}
                cut = alone[f"{name} float32 {world}"]
                exact = None
                if "float64" in found:
                    exact = distance(found["float64"]["end"], single["float64"]["end"])
                figures.append(
                    {
                        "optimizer": name,
                        "sharding": sharding,
                        "processes": world,
                        "float64": exact,
                        "float32": distance(found["float32"]["end"], single["float32"]["end"]),
                        "yardstick": distance(cut["end"], single["float32"]["end"]),
                        "soon": distance(found["float32"]["soon"], single["float32"]["soon"]),
                    }
                )
    for row in figures:
        row["holds"] = _holds(row)
    title = f"Sharded runs against one process, {options.steps} steps"
    publish(options.out, title, _tables(figures), {"limits": LIMITS, "cells": figures})
    return 0 if all(row["holds"] for row in figures) else 1


def _holds(row: dict[str, Any]) -> bool:
    exact = (row["float64"] or 0.0) <= LIMITS["float64"]
    soon = row["soon"] <= LIMITS["soon"] or row["optimizer"] not in AT_ONCE
    return exact and soon and row["float32"] <= LIMITS["times the yardstick"] * row["yardstick"]


def _tables(figures: list[dict[str, Any]]) -> list[Table]:
    columns = [f"{sharding} {world}" for sharding, world, _ in CELLS]

    def table(title: str, cell: Any, names: Iterable[str] = OPTIMIZERS) -> Table:
        rows = []
        for name in names:
            of_optimizer = [row for row in figures if row["optimizer"] == name]
            rows.append([name, *map(cell, of_optimizer)])
        return Table(title, ["optimizer", *columns], rows)

    return [
        table(
            "float64, largest difference of a weight (! misses its limit)",
            lambda row: (
                ("-" if row["float64"] is None else f"{row['float64']:.0e}")
                + ("" if row["holds"] else " !")
            ),
        ),
        table(
            "float32, and the yardstick beside it",
            lambda row: f"{row['float32']:.0e} / {row['yardstick']:.0e}",
        ),
        table(f"float32 after {SOON} steps", lambda row: f"{row['soon']:.0e}", AT_ONCE),
    ]


if __name__ == "__main__":
    sys.exit(main())
