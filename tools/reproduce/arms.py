"""What all reproductions use: their options, one call that compares, a table's cells."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from llmnorm.analysis.compare.command import compare
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.machine.files import write_whole
from llmnorm.part import InputError


def parser(
    description: str | None, arms: Iterable[str], default: Iterable[str]
) -> argparse.ArgumentParser:
    """The options of every reproduction; scripts add their own.

    Args:
        description: the script's docstring, whose first line is shown.
        arms: the names of all arms.
        default: the arms that are compared if none is named.
    """
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--parallel", type=int, default=1, help="runs at a time")
    made.add_argument("--runs-per-gpu", type=int, default=1, help="small runs share a GPU")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--plan", action="store_true", help="print the runs, make none")
    made.add_argument("--arms", nargs="+", choices=list(arms), default=list(default), metavar="ARM")
    return made


def mean_and_error(values: Sequence[float | str], digits: int) -> str:
    """`3.8026 ± 0.0197`: mean ± standard error; `inf` where a run diverged (JSON: "infinity")."""
    numbers = [float(value) for value in values]
    middle = sum(numbers) / len(numbers)
    if len(numbers) < 2 or math.isinf(middle):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {stdev(numbers) / math.sqrt(len(numbers)):.{digits}f}"


def reproduce(
    read: Callable[[], Protocol],
    table: Callable[[Protocol, dict[str, Any]], str],
    results: Path,
    runs: Path,
    options: argparse.Namespace,
    arguments: list[str] | None,
    keep_checkpoints: bool = False,
) -> int:
    """Make the runs that are missing, then the report and table.md; with --plan print the plan.

    Args:
        read: reads the arms and returns what is compared.
        table: the table in Markdown, from what is compared and the tree of result.json.
        results: the directory of the results.
        runs: where run directories are made.
        options: the parsed options of `parser`.
        arguments: the command line's words; None: sys.argv.
        keep_checkpoints: keep the checkpoints of finished runs.

    Returns:
        The exit code; 2 after a mistake of the user, which is printed.
    """
    try:
        protocol = read()
        code = compare(
            protocol,
            results,
            runs=runs,
            command=shlex.join(["python", *(sys.argv if arguments is None else arguments)]),
            parallel=options.parallel,
            per_gpu=options.runs_per_gpu,
            plan=options.plan,
            keep_checkpoints=keep_checkpoints,
        )
        if code == 0 and not options.plan:
            found = json.loads((results / "result.json").read_text(encoding="utf-8"))
            text = table(protocol, found)
            write_whole(results / "table.md", text + "\n")
            print(text)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code
