"""What the reproductions share: their command line, the comparison itself, a table's cells."""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import stdev

from llmnorm.analysis.compare.command import compare
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.machine.files import write_whole


def parser(
    description: str | None, arms: Iterable[str], default: Iterable[str]
) -> argparse.ArgumentParser:
    """The words that every reproduction takes; scripts add their own.

    Args:
        description: the script's docstring, whose first line is shown.
        arms: all that there are.
        default: those that are compared if none is named.
    """
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--parallel", type=int, default=1, help="runs at a time")
    made.add_argument("--runs-per-gpu", type=int, default=1, help="small runs share a GPU")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--plan", action="store_true", help="print the runs, make none")
    made.add_argument("--arms", nargs="+", choices=list(arms), default=list(default), metavar="ARM")
    return made


def mean(values: Sequence[float | str], digits: int) -> str:
    """Mean ± standard error; `inf` where a run diverged (in JSON: "infinity")."""
    numbers = [float(value) for value in values]
    middle = sum(numbers) / len(numbers)
    if len(numbers) < 2 or math.isinf(middle):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {stdev(numbers) / math.sqrt(len(numbers)):.{digits}f}"


def keep_table(results: Path, text: str) -> None:
    """Write the table beside the results, and print it."""
    write_whole(results / "table.md", text + "\n")
    print(text)


def run(
    protocol: Protocol,
    results: Path,
    runs: Path,
    options: argparse.Namespace,
    arguments: list[str] | None,
    keep_checkpoints: bool = False,
) -> int:
    """Make the runs that are missing, or print the plan; the exit code."""
    return compare(
        protocol,
        results,
        runs=runs,
        command=shlex.join(["python", *(sys.argv if arguments is None else arguments)]),
        parallel=options.parallel,
        per_gpu=options.runs_per_gpu,
        plan=options.plan,
        keep_checkpoints=keep_checkpoints,
    )
