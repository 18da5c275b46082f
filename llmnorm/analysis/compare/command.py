"""`llmnorm compare BASE --arm NAME key=value ...`: is this part better here?

    llmnorm compare base.yaml --arm layer model.norm=layer          against base.yaml as it is
    llmnorm compare base.yaml --arm rms model.norm=rms --arm layer model.norm=layer --parallel 2

plan.py says which runs are needed and why, arms.py reads and checks the arms, runs.py makes the
runs, statistics.py and results.py turn their losses into numbers, report.py and plot.py show them.
Afterwards the directory holds

    report.md, comparison.png    the page and its picture
    result.json, table.csv       the numbers
    runs.jsonl                   a line a finished run, from which the files above are made
    comparison.json              the arms' settings, to check later calls against
    runs/                        run directories and their logs (may be deleted)

After a stop the same command continues. With more seeds, arms or learning rates it adds the runs
that are missing.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmnorm.analysis.compare import report
from llmnorm.analysis.compare.arms import check_same_arms, save_arms
from llmnorm.analysis.compare.estimate import Estimate, duration
from llmnorm.analysis.compare.launch import Launch, Slots, launch, slots
from llmnorm.analysis.compare.ledger import Ledger
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.results import results
from llmnorm.analysis.compare.runs import execute
from llmnorm.machine.files import write_whole
from llmnorm.machine.gpus import check_gpu
from llmnorm.part import InputError
from llmnorm.runs.lock import RunLock, is_locked


def compare(
    protocol: Protocol,
    directory: Path,
    *,
    command: str,
    runs: Path | None = None,
    parallel: int = 1,
    per_gpu: int = 1,
    plan: bool = False,
    keep_checkpoints: bool = False,
    start: Launch = launch,
) -> int:
    """Make the runs that are missing, then tables, picture and report; or print the plan.

    Args:
        protocol: what is compared, from `arms.read_protocol`.
        directory: where results are written, and where finished runs are looked for.
        command: the command line that the report names.
        runs: where run directories are made; left out, `directory / "runs"`.
        parallel: runs at a time.
        per_gpu: runs that share a GPU; 1: each has one of its own.
        plan: print every run that would be made, with an estimate of the time, and make none.
        keep_checkpoints: keep the checkpoints of finished runs.
        start: how a run is started.

    Returns:
        The exit code: 0, or that of a signal, after which the runs have saved.

    Raises:
        InputError: an arm, an option or the directory is wrong, or a run failed.
    """
    device = protocol.configs[protocol.baselines[0]].training.device
    places = slots(parallel, device, per_gpu)
    check_same_arms(protocol, directory)
    ledger = Ledger(directory / "runs.jsonl")
    estimate = Estimate(protocol, ledger, places)
    runs = directory / "runs" if runs is None else runs
    if plan:
        print(describe(protocol, ledger, runs, places, estimate))
        return 0
    check_gpu(device)
    if is_locked(directory):
        raise InputError(
            f"--out {directory}: another comparison is running in this directory; wait for it, or "
            "give another --out"
        )
    with RunLock(directory):
        save_arms(protocol, directory)
        config = protocol.configs[protocol.baselines[0]]
        preparation = config.objective.preparation(config)
        assert preparation is not None, "arms are checked before"
        prepared = preparation.prepare()  # all arms read the same tokens
        code = execute(
            protocol,
            ledger,
            runs,
            places,
            estimate.seconds,
            keep_checkpoints=keep_checkpoints,
            start=start,
        )
        if code:
            return code
        tokens = sum(source.validation_tokens for source in prepared.sources)
        found = results(protocol, ledger.records, tokens)
        write(found, directory, command)
    for baseline in protocol.baselines:
        print(report.text_table(found, baseline))
    print(f"report: {directory / 'report.md'}")
    return 0


def write(found: Mapping[str, Any], directory: Path, command: str) -> None:
    """Write comparison.png, report.md, table.csv and result.json.

    Args:
        found: what `results` returned.
        directory: where they are written; its name is the title.
        command: the command line that the report names.
    """
    from llmnorm.analysis.compare.plot import draw

    draw(found, directory / "comparison.png", directory.name)
    page = report.page(found, directory.name, command, "comparison.png")
    without_curves = {name: _without_curves(arm) for name, arm in found["arms"].items()}
    numbers = {**found, "arms": without_curves}
    for name, text in (
        ("report.md", page),
        ("table.csv", report.csv_table(found)),
        ("result.json", json.dumps(json_value(numbers), indent=1, allow_nan=False) + "\n"),
    ):
        write_whole(directory / name, text)


def describe(
    protocol: Protocol, ledger: Ledger, runs: Path, places: Slots, estimate: Estimate
) -> str:
    """The plan as text: a table of the runs, its sum, then the commands of those to be made."""
    expected = protocol.needed(ledger.losses, expected=True)
    rows, commands, left = [("run", "steps", "tokens", "time")], [], []
    for run in expected:
        time = "finished"
        if run.key not in ledger.records:
            left.append((run, 1.0))
            time = duration(estimate.seconds(left[-1:]))
            words = ["llmnorm", "train", *protocol.train_arguments(run, runs / run.key)]
            commands.append(f"  {shlex.join(words)}")
        steps, tokens = protocol.steps_of(run), protocol.tokens_of(run)
        rows.append((run.key, f"{steps}", f"{tokens:,}", time))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    total = estimate.seconds(left) / places.count
    lines.append(
        f"{len(left)} of {len(expected)} runs to make, {places.describe()}: {duration(total)} if "
        f"nothing else runs here ({estimate.source})"
    )
    if any(protocol.tuned(name) for name in protocol.arms):
        lines.append(
            "If the best learning rate of an arm is the lowest or highest of its grid, the grid "
            "grows and there will be more runs."
        )
        lines.append("The runs with paired seeds will use the learning rate that the tuning finds.")
    if commands:
        lines += ["", "Their commands:", *commands]
    return "\n".join(lines)


def _without_curves(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key != "curves"}


def json_value(value: Any) -> Any:
    """The value with null for nan and text for infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' * (value < 0)}infinity"
    return value
