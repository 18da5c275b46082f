"""Counts a decode step's calls and measures its time by kind, for every mixer, on a CPU.

usage: python tools/bench/decode_profile.py [--before DIRECTORY] [--mixers softmax nala]
           [--rows 1 8] [--dtypes float32 bfloat16] [--hidden 512] [--layers 8] [--steps 20]
           [--rounds 3] [--out FILE]

A step is one token a row behind 128. The kinds: products (linear layers), norm, rotation, attention
(keys and values), state (a recurrence, its features and convolution), and the rest. The ways are
those of decode_kinds.py, which runs in a process for each checkout and mixer; with `--before`, a
directory of another checkout, its model stands beside them. One thread, CPU time. The table of a
whole step gives medians over the rounds, in which all take turns, and each mixer's captured step
over softmax's.

The times by kind are taken around each call, so they are more than a step without that: what they
say is where it goes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import ROOT, Table, publish
from tqdm import tqdm

MIXERS: dict[str, Any] = {
    "softmax": "softmax",
    "window": {"name": "softmax", "sliding_window": 64},
    "linear": "linear",
    "nala": "nala",
    "ssd": {"name": "ssd", "expand": 1},
    "gla": "gla",
    "gated_delta": "gated_delta",
}
KINDS = ("products", "norm", "rotation", "attention", "state", "rest")
Key = tuple[str, int, str, str]  # mixer, rows, dtype, way


def figures_of(tree: Path, mixer: str, rows: int, dtype: str, given: Any) -> dict[str, Any]:
    """What decode_kinds.py prints for a checkout."""
    asked = {"mixer": MIXERS[mixer], "rows": rows, "dtype": dtype, "steps": given.steps}
    asked |= {"hidden": given.hidden, "layers": given.layers}
    script = Path(__file__).with_name("decode_kinds.py")
    found = subprocess.run(
        [sys.executable, str(script), json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        sys.exit(f"bench: error: {mixer} of {tree}: {found.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return figures


def measured(given: Any) -> dict[Key, list[dict[str, Any]]]:
    """The figures of every round."""
    trees = {"": ROOT} | ({"before: ": given.before.resolve()} if given.before else {})
    found: dict[Key, list[dict[str, Any]]] = {}
    total = given.rounds * len(trees) * len(given.mixers) * len(given.rows) * len(given.dtypes)
    with tqdm(total=total, desc="decode steps", unit="process", disable=None) as bar:
        for _ in range(given.rounds):
            for dtype in given.dtypes:
                for rows in given.rows:
                    for mixer in given.mixers:
                        for name, tree in trees.items():
                            ways = figures_of(tree, mixer, rows, dtype, given)
                            for way, figures in ways.items():
                                if way == "model" or not name:
                                    key = mixer, rows, dtype, name + way
                                    found.setdefault(key, []).append(figures)
                            bar.update()
    return found


def tables(found: dict[Key, list[dict[str, Any]]], layers: int) -> list[Table]:
    """Whole steps; calls and times by kind."""
    steps, calls, times = [], [], []
    for (mixer, rows, dtype, way), rounds in found.items():
        step = [each["step"] for each in rounds]
        softmax = found.get(("softmax", rows, dtype, way), [])
        over = [a / each["step"] for a, each in zip(step, softmax, strict=False)]
        title = f"{mixer}, {rows} row{'s' if rows > 1 else ''}, {dtype}, {way}"
        steps.append(
            [
                title,
                f"{statistics.median(step):.2f}",
                f"{statistics.median(over):.2f}" if over else "",
                f"{sum(rounds[-1]['calls'].values()) / layers:.0f}",
            ]
        )
        by_kind = [rounds[-1]["calls"].get(kind, 0) / layers for kind in KINDS]
        calls.append([title, *(f"{n:.1f}" for n in by_kind)])
        us = [statistics.median(each["us"].get(kind, 0) for each in rounds) for kind in KINDS]
        times.append([title, *(f"{n / 1e3:.2f} ({n / max(1e-9, sum(us)):.0%})" for n in us)])
    return [
        Table("Whole steps, one thread", ["", "CPU ms", "over softmax", "calls a layer"], steps),
        Table("Calls a layer by kind", ["", *KINDS], calls),
        Table("CPU ms a step in calls by kind, and the share of all calls", ["", *KINDS], times),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout, whose model is measured too")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    found = measured(given)
    entries = [
        {"mixer": key[0], "rows": key[1], "dtype": key[2], "way": key[3], "rounds": rounds}
        for key, rounds in found.items()
    ]
    title = f"Where a decode step goes (width {given.hidden}, {given.layers} layers)"
    publish(given.out, title, tables(found, given.layers), {"entries": entries})
    return 0


if __name__ == "__main__":
    sys.exit(main())
