"""Compare every optimizer on mixtures of experts and fused layers, sharded, with one process.

usage: python tools/bench/expert_sharding.py [--families qwen3_moe gpt_oss mixtral gpt2]
           [--optimizers muon conda ...] [--cells fsdp2 zero3 ...]
           [--out docs/results/expert_sharding.json]

Real processes over gloo train tiny random models of transformers' classes for 4 steps. A figure is
the largest difference of any weight from that of one process, in float64 (DeepSpeed's weights are
float32). A yardstick stands beside it: the same difference between two runs of one process that cut
a step's rows into 1 and into 2 micro-batches. The limit is 1e-6, or 3 times the yardstick if that
is more: experts get few tokens here, so that Conda and SOAP find directions of gradients that hold
rounding errors alone, and bring them to the size of a step. The share of the state is the most that
a process holds of the matrices' state, over that of one process, beside what it would be by the
balance that a run prints.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Table, publish
from sharding import Weights, distance, whole

from llmnorm.models.foreign import Foreign
from llmnorm.optim.stacks import RuleOptimizer
from tests.distributed.foreign_steps import steps
from tests.distributed.processes import run
from tests.distributed.tiny import OPTIMIZERS

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "gpt2")
# (processes, replicas) of each sharding.
CELLS = {
    "ddp": (2, 1),
    "fsdp2": (2, 1),
    "hsdp": (4, 2),
    "zero1": (2, 1),
    "zero2": (2, 1),
    "zero3": (2, 1),
}
LIMIT = 1e-6


def trained(family: str, optimizer: str, sharding: str, **more: Any) -> tuple[Weights, int, float]:
    """Whole weights after the steps; bytes of this process's state of matrices; the balance."""
    weights: Weights = {}
    state: list[float] = []

    def keep(model: Foreign, rule: torch.optim.Optimizer) -> None:
        weights.update({name: whole(p) for name, p in model.named_parameters()})
        stacks = rule.stacks if isinstance(rule, RuleOptimizer) else []
        state.append(sum(t.nbytes for s in stacks for t in s.state.values() if t.ndim))
        state.append(getattr(rule, "balance", 1.0))

    steps(family, sharding, optimizer=optimizer, after=keep, **more)
    return weights, int(state[0]), state[1]


def dtype_of(sharding: str) -> torch.dtype:
    """Of the weights: DeepSpeed's are float32."""
    return torch.float32 if sharding.startswith("zero") else torch.float64


def column(
    directory: Path, rank: int, world: int, *, sharding: str, families: list[str], names: list[str]
) -> dict[str, tuple[int, float]]:
    """All families and optimizers of a sharding; the first process writes their weights."""
    found = {}
    for family in families:
        for name in names:
            weights, size, balance = trained(
                family, name, sharding, replicas=CELLS[sharding][1], dtype=dtype_of(sharding)
            )
            found[f"{family} {name}"] = size, balance
            if rank == 0:
                torch.save(weights, directory.parent / f"{family} {name}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--optimizers", nargs="+", default=[*OPTIMIZERS], choices=[*OPTIMIZERS])
    parser.add_argument("--cells", nargs="+", default=[*CELLS], choices=[*CELLS])
    parser.add_argument("--out", type=Path, default=RESULTS / "expert_sharding.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    families, names = list(options.families), list(options.optimizers)
    figures: list[dict[str, Any]] = []
    single = {
        (family, name, dtype): trained(family, name, "none", dtype=dtype)
        for family in families
        for name in names
        for dtype in {dtype_of(sharding) for sharding in options.cells}
    }
    yardsticks = {
        (family, name, dtype): distance(
            trained(family, name, "none", micro_batches=2, dtype=dtype)[0], found[0]
        )
        for (family, name, dtype), found in single.items()
    }
    with tempfile.TemporaryDirectory() as root:
        for sharding in options.cells:
            world, replicas = CELLS[sharding]
            directory = Path(root) / sharding
            task = partial(column, sharding=sharding, families=families, names=names)
            results = run(task, directory, world)
            assert all(isinstance(found, dict) for found in results), results
            print(f"{sharding} on {world} processes is done", file=sys.stderr, flush=True)
            for family in families:
                for name in names:
                    weights, state, _ = single[family, name, dtype_of(sharding)]
                    parts = [found[f"{family} {name}"] for found in results]
                    difference = distance(torch.load(directory / f"{family} {name}"), weights)
                    yardstick = yardsticks[family, name, dtype_of(sharding)]
                    figures.append(
                        {
                            "family": family,
                            "optimizer": name,
                            "sharding": sharding,
                            "processes": world // replicas,
                            "difference": difference,
                            "yardstick": yardstick,
                            "state": max(size for size, _ in parts) / state if state else None,
                            "balance": parts[0][1],
                            "holds": difference <= max(LIMIT, 3 * yardstick),
                        }
                    )
    publish(options.out, "Experts under every sharding", _tables(figures), {"cells": figures})
    return 0 if all(row["holds"] for row in figures) else 1


def _tables(figures: list[dict[str, Any]]) -> list[Table]:
    columns = list(dict.fromkeys(row["sharding"] for row in figures))

    def table(title: str, cell: Any) -> Table:
        rows: dict[str, list[str]] = {}
        for row in figures:
            key = f"{row['family']}, {row['optimizer']}"
            rows.setdefault(key, [key]).append(cell(row))
        return Table(title, ["family, optimizer", *columns], list(rows.values()))

    return [
        table(
            "largest difference of a weight (/ the yardstick; ! misses its limit)",
            lambda row: (
                f"{row['difference']:.0e} / {row['yardstick']:.0e}" + ("" if row["holds"] else " !")
            ),
        ),
        table(
            "state of the matrices on the process with most, over that of one process (/ balance)",
            lambda row: (
                "-"
                if row["state"] is None
                else f"{row['state']:.3f} ({row['balance'] / row['processes']:.3f})"
            ),
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
