"""Measure the choice of a coreset: facility location beside submodlib's, and the distances.

usage: python tools/bench/coreset.py [--peer PYTHON] [--turns 5] [--out FILE]

Both pick from one matrix of similarities, made of l1 distances of random features, in turns.
submodlib-py 0.0.3 runs in an interpreter of its own (`--peer`), which needs `pip install
submodlib-py==0.0.3 numba scikit-learn`; its object is made before the clock starts. Its matrix is
float32 as ours is. The objective of both is computed here, in float64.

Seconds are CPU seconds of one thread. Memory is the highest of the process over what it had before.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Table, memory_of, publish

from llmnorm.selection.facility_location import facility_location, similarity_of

POOLS = ((512, 256), (2048, 512), (2048, 1024))
WIDTH = 2560  # the paper's coordinates of a feature

PEER = """
import json, sys, time
import numpy as np
from submodlib.functions.facilityLocation import FacilityLocationFunction
alike, budget = np.load(sys.argv[1]), int(sys.argv[2])
made = FacilityLocationFunction(n=len(alike), mode="dense", sijs=alike, separate_rep=False)
start = time.process_time()
picks = made.maximize(budget=budget, optimizer="LazyGreedy", stopIfZeroGain=False,
                      stopIfNegativeGain=False, verbose=False, show_progress=False)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "picks": [int(row) for row, _ in picks]}))
"""


def features(rows: int, width: int) -> torch.Tensor:
    """Random features, the same every time."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def reached(alike: Any, picks: Any) -> float:
    """The objective of some picks."""
    return float(alike[:, picks].max(1).astype("float64").sum())


def compare(rows: int, budget: int, peer: str | None, turns: int) -> dict[str, Any]:
    """Seconds of every turn, and the objectives."""
    alike = similarity_of(features(rows, 64), "l1")
    found: dict[str, Any] = {"rows": rows, "budget": budget, "ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "alike.npy"
        np.save(path, alike)
        for _ in range(turns):
            start = time.process_time()
            order, _ = facility_location(alike, budget)
            found["ours"].append(time.process_time() - start)
            found["our objective"] = reached(alike, order)
            if peer is None:
                continue
            command = [peer, "-c", PEER, str(path), str(budget)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            theirs = json.loads(ran.stdout.splitlines()[-1])
            found["theirs"].append(theirs["seconds"])
            found["their objective"] = reached(alike, theirs["picks"])
    return found


def distances() -> dict[str, float]:
    """CPU seconds and highest memory of the similarities of the largest pool."""
    drawn = features(POOLS[-1][0], WIDTH)
    before = memory_of("VmRSS")
    start = time.process_time()
    similarity_of(drawn, "l1")
    seconds = time.process_time() - start
    after = memory_of("VmHWM")
    return {"seconds": seconds, "MB": (after - before) / 1e6}


def main() -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--peer", help="a Python that has submodlib-py")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    apart = distances()  # first: memory only grows
    pools = [compare(rows, budget, given.peer, given.turns) for rows, budget in POOLS]
    rows = []
    for found in pools:
        ours = statistics.median(found["ours"])
        cells = [f"{found['budget']} of {found['rows']}", f"{1e3 * ours:.1f}", "-", "-", "-"]
        if found["theirs"]:
            theirs = statistics.median(found["theirs"])
            ratio = statistics.median(
                t / o for t, o in zip(found["theirs"], found["ours"], strict=True)
            )
            objective = found["our objective"] / found["their objective"]
            cells[2:] = [f"{1e3 * theirs:.1f}", f"{ratio:.2f}", f"{objective - 1:+.1e}"]
        rows.append(cells)
    columns = ["picks", "llmnorm ms", "submodlib ms", "times as fast", "objective against its"]
    title = f"Similarities by l1 distances over {WIDTH} coordinates"
    tables = [
        Table("Lazy greedy facility location on a given matrix", columns, rows),
        Table(
            title,
            ["rows", "CPU seconds", "memory MB"],
            [[str(POOLS[-1][0]), f"{apart['seconds']:.2f}", f"{apart['MB']:.0f}"]],
        ),
    ]
    publish(given.out, "The choice of a coreset", tables, {"pools": pools, "distances": apart})


if __name__ == "__main__":
    main()
