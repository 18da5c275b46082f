"""`llmnorm runs [DIR]`: a table of run directories.

    run        steps      loss    best   state         optimizer.lr  model.norm.name
    baseline   2500/2500  2.4113  2.4113 finished      0.004         rms
    layer      1500/2500  2.6021  2.6021 interrupted   0.004         layer

`loss` and `best` are the last and the lowest validation loss. The columns on the right are the
settings that differ between the runs; where a run has branched from another, a column before them
names that run and the step. The states are

    running       a process holds the run's lock
    finished      it reached its last step, or `evaluation.patience` has ended it
    stopped       by a signal, after a checkpoint
    diverged      it ended because of a loss that is not finite
    damaged       its config.yaml or metrics.jsonl cannot be read; a line below the table says why
    interrupted   none of these

A second table says what the runs' time was spent on, in percent of the wall clock, where their
lines tell it; runs/account.py describes its columns. `goodput` is the share in steps that counted:
training, data and waiting together.

What would surprise: settings are compared as they are written in the files, and no part is
imported, so that runs of missing parts or of other versions are listed too ("-": not in that file).
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmnorm.config.manifest import STEP
from llmnorm.config.saved import differences
from llmnorm.config.tree import RunConfig, TrainingSettings
from llmnorm.config.yaml_text import read_yaml
from llmnorm.part import InputError
from llmnorm.runs.account import PARTS, Account, account_of
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import Lines, damage, read_lines
from llmnorm.runs.lock import is_locked

WIDEST = 40  # characters of a setting's value
BRANCH = "training.branch_from"


def describe_runs(directory: Path) -> str:
    """The table of the runs below a directory, or of the one run that the directory is.

    Raises:
        InputError: there is no run.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory")
    found = list(_runs_below(directory))
    if not found:
        raise InputError(f"{directory}: holds no run directory (one with a config.yaml)")
    runs = [_look(RunDirectory(path)) for path in found]
    keys = differing([run.settings for run in runs if run.settings is not None])
    keys = [key for key in keys if key != BRANCH]
    parents = [_parent(run.settings) for run in runs]
    branch = ["branch of"] if any(parents) else []
    rows = [["run", "steps", "loss", "best", "state", *branch, *keys]]
    problems, accounts = [], {}
    for run, parent in zip(runs, parents, strict=True):
        path = run.directory.path
        name = str(path.relative_to(directory)) if path != directory else str(directory)
        losses = run.losses
        last, best = (f"{losses[-1]:.4f}", f"{min(losses):.4f}") if losses else ("-", "-")
        leaves = [_shown(run.settings, key) for key in keys]
        total = "?" if run.settings is None else _total(run.settings)
        whose = [parent or "-"] if branch else []
        rows.append([name, f"{run.step}/{total}", last, best, run.state, *whose, *leaves])
        problems += run.problems
        accounts[name] = run.account
    text = "\n".join([_aligned(rows), *problems])
    times = _times_table(accounts)
    return f"{text}\n\n{times}" if times else text


def _times_table(accounts: Mapping[str, Account]) -> str:
    """What the time of runs was spent on, by their names; empty where no run tells it."""
    columns = (*PARTS, "twice", "goodput")
    rows = [["time in %", "restarts", "wall", *columns]]
    for name, account in accounts.items():
        if account.wall:
            seconds = {**account.seconds, "twice": account.twice}
            shares = [seconds[part] / account.wall for part in columns[:-1]]
            percents = [f"{100 * share:.1f}" for share in (*shares, account.goodput)]
            rows.append([name, str(account.restarts), _duration(account.wall), *percents])
    return _aligned(rows) if len(rows) > 1 else ""


def _duration(seconds: float) -> str:
    """A time in the unit in which it is easy to read."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@dataclass
class _Run:
    directory: RunDirectory
    settings: dict[str, Any] | None  # None where they cannot be read
    step: int
    losses: list[float]
    account: Account
    state: str
    problems: list[str]


def _look(directory: RunDirectory) -> _Run:
    run = _Run(directory, None, 0, [], Account(), state(directory), [])
    try:
        run.settings = _settings(directory)
        lines = read_lines(directory.metrics)
        repeated = read_lines(directory.repeated)
    except InputError as error:
        run.problems.append(str(error))
        run.state = "running" if run.state == "running" else "damaged"
        return run
    run.step, run.losses = _progress(lines)
    run.account = account_of(lines.entries, repeated.entries)
    if text := damage(directory.metrics, lines.damaged):
        run.problems.append(f"{text} and left out")
    return run


def state(run: RunDirectory) -> str:
    """The run's state: running, finished, diverged, stopped or interrupted."""
    if is_locked(run.path):
        return "running"
    if run.done.exists():
        return "finished"
    if run.diverged.exists():
        return "diverged"
    return "stopped" if run.preempted.exists() else "interrupted"


def progress(run: RunDirectory) -> tuple[int, list[float]]:
    """The last logged step, and all finite validation losses so far; damaged lines are left out.

    Raises:
        InputError: metrics.jsonl cannot be read.
    """
    return _progress(read_lines(run.metrics))


def _progress(lines: Lines) -> tuple[int, list[float]]:
    figures = [entry.value.get("validation") for entry in lines.entries]
    losses = [found.get("loss") for found in figures if isinstance(found, dict)]
    finite = [float(x) for x in losses if isinstance(x, int | float) and math.isfinite(x)]
    return (lines.entries[-1].step if lines.entries else 0), finite


def differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """The key paths whose values are not the same in all of the settings."""
    keys: dict[str, None] = {}
    for tree in trees[1:]:
        keys |= dict.fromkeys(differences(trees[0], tree))
    # Where the part differs (`optimizer.name`), only settings that all of the parts have are shown.
    parts = tuple(key.removesuffix("name") for key in keys if key.endswith(".name"))
    return [
        key
        for key in keys
        if not key.startswith(parts) or all(_value(tree, key) is not None for tree in trees)
    ]


def _runs_below(directory: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Run directories at any depth; a run is not searched, since trackers keep files in it.

    Args:
        directory: where to search.
        seen: the directories above it; a link back to one of them is not followed.
    """
    if (directory / "config.yaml").is_file():
        yield directory
        return
    seen |= {directory.resolve()}
    try:
        below = sorted(directory.iterdir())
    except OSError:  # a directory of somebody else's
        return
    for path in below:
        if path.is_dir() and not path.name.startswith(".") and path.resolve() not in seen:
            yield from _runs_below(path, seen)


def _settings(run: RunDirectory) -> dict[str, Any]:
    tree = read_yaml(run.config)
    if not isinstance(tree, dict):
        raise InputError(f"{run.config}: expected a mapping of sections")
    return {key: value for key, value in tree.items() if key != "run_dir"}


def _parent(settings: Any) -> str | None:
    """The run and the step that a run has branched from: "stable step 2000"."""
    point = _value(settings, BRANCH)
    if point is None:
        return None
    path = Path(str(point))
    number = STEP.fullmatch(path.name)
    return f"{path.parent.parent.name} step {int(number[1])}" if number else str(point)


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _shown(tree: Any, key: str) -> str:
    value = _value(tree, key)
    return "-" if value is None else textwrap.shorten(str(value), WIDEST, placeholder="...")


def _total(tree: Mapping[str, Any]) -> str:
    """The run's length in steps; "?" where it is in epochs and the prepared data is gone."""
    try:
        training = TrainingSettings.model_validate(tree["training"])
        rows = 0
        if training.epochs is not None:
            config = RunConfig.model_validate(tree)
            preparation = config.objective.preparation(config)
            prepared = None if preparation is None else preparation.find()
            if prepared is None:
                return "?"
            rows = prepared.rows
        pool = tree.get("selection", {}).get("pool")
        return str(training.total_steps(rows, tree["data"]["context_length"], pool))
    except (AssertionError, KeyError, TypeError, ValueError):  # InputError's kind, pydantic's too
        return "?"
