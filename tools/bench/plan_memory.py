"""Compare the planned memory of runs with the bytes of tensors that their processes hold.

usage: python tools/bench/plan_memory.py [--out docs/results/plan_memory.json]

Every cell is a run of two steps on packed rows, of 1, 2 or 4 processes over gloo; the cells have
every pair of size, sharding, optimizer, recomputation, mixer and number of micro-batches
(tests/distributed/plan_cells.py). A dispatch mode counts the storages that live. The limit on the
peak is 10 %; state is equal to the byte.
"""

import argparse
import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Table, publish

from llmnorm.config.file import load
from llmnorm.data import packing
from tests.distributed.plan_cells import SHARDINGS, Cell, cells, counting, planned
from tests.distributed.processes import run
from tests.running import SMOKE

LIMIT = 0.1


def main(arguments: list[str] | None = None) -> int:
    """Plan, run, compare, print, write; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose name has this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [cell for cell in cells() if options.only in cell.name]
    if importlib.util.find_spec("deepspeed") is None:
        chosen = [cell for cell in chosen if not cell.sharding.startswith("zero")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        places = [f"data.dir={root}/data"]
        config = load(SMOKE, places).config
        packing.prepare(config.data, config.tokenizer)
        for world in sorted({SHARDINGS[cell.sharding][0] for cell in chosen}):
            together = [cell for cell in chosen if SHARDINGS[cell.sharding][0] == world]
            rows += _rows(together, Path(root) / f"of {world}", world, places)
    rows.sort(key=lambda row: -abs(row["ratio"] - 1))
    table = Table(
        f"{len(rows)} cells, the farthest first; the limit is {LIMIT:.0%}",
        ["cell", "planned peak", "counted", "ratio", "planned at", "state", "holds"],
        [
            [
                row["cell"],
                f"{row['planned']:,}",
                f"{row['counted']:,}",
                f"{row['ratio']:.3f}",
                row["moment"],
                "equal"
                if row["state"] == row["counted_state"]
                else f"{row['state']:,} not {row['counted_state']:,}",
                "yes" if row["holds"] else "no",
            ]
            for row in rows
        ],
    )
    publish(options.out, "Planned memory of a training step", [table], {"cells": rows})
    return 0 if all(row["holds"] for row in rows) else 1


def _rows(together: list[Cell], directory: Path, world: int, places: list[str]) -> Any:
    scenario = partial(counting, chosen=together, places=places)
    answers = run(scenario, directory, world)
    assert all(isinstance(answer, dict) for answer in answers), answers[0]
    print(f"{len(together)} cells of {world} processes are done", file=sys.stderr, flush=True)
    for cell in together:
        said = planned(cell, places)
        peak = max(answer[cell.name]["peak"] for answer in answers)
        state = max(answer[cell.name]["state"] for answer in answers)
        ratio = said["peak"] / peak
        yield {
            "cell": cell.name,
            "planned": said["peak"],
            "counted": peak,
            "ratio": ratio,
            "moment": said["moment"],
            "state": said["state"],
            "counted_state": state,
            "holds": abs(ratio - 1) <= LIMIT and said["state"] == state,
        }


if __name__ == "__main__":
    sys.exit(main())
