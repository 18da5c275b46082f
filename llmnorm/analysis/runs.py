"""`llmnorm runs [DIR]`: a table of run directories.

    run        steps      loss    best   state         optimizer.lr  model.norm.name
    baseline   2500/2500  2.4113  2.4113 finished      0.004         rms
    layer      1500/2500  2.6021  2.6021 interrupted   0.004         layer

`loss` and `best` are the last and the lowest validation loss. The columns on the right are the
settings that differ between the runs. The states are

    running       a process holds the run's lock
    finished      it reached its last step
    stopped       by SIGTERM or Ctrl-C, after a checkpoint
    diverged      it ended because of a loss that is not finite
    interrupted   none of these

What would surprise: settings are compared as they are written in the files, and no part is
imported, so that runs of missing parts or of other versions are listed too ("-": not in that file).
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmnorm.config.file import read_yaml
from llmnorm.config.tree import TrainingSettings, differences
from llmnorm.data.packing import find
from llmnorm.data.settings import DataSettings, TokenizerSettings
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lock import held

WIDEST = 40  # characters of a setting's value


def describe_runs(directory: Path) -> str:
    """The table of the runs below a directory, or of the one run that the directory is.

    Raises:
        InputError: there is no run, or a configuration cannot be read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory")
    found = list(_runs_below(directory))
    if not found:
        raise InputError(f"{directory}: holds no run directory (one with a config.yaml)")
    runs = [RunDirectory(path) for path in found]
    trees = [_settings(run) for run in runs]
    keys = differing(trees)
    rows = [["run", "steps", "loss", "best", "state", *keys]]
    for run, tree in zip(runs, trees, strict=True):
        name = str(run.path.relative_to(directory)) if run.path != directory else str(directory)
        step, losses = progress(run)
        last, best = (f"{losses[-1]:.4f}", f"{min(losses):.4f}") if losses else ("-", "-")
        leaves = [_shown(tree, key) for key in keys]
        rows.append([name, f"{step}/{_total(tree)}", last, best, state(run), *leaves])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def state(run: RunDirectory) -> str:
    """The run's state: running, finished, diverged, stopped or interrupted."""
    if held(run.path):
        return "running"
    if run.done.exists():
        return "finished"
    if run.diverged.exists():
        return "diverged"
    return "stopped" if run.preempted.exists() else "interrupted"


def progress(run: RunDirectory) -> tuple[int, list[float]]:
    """The last logged step, and all validation losses so far."""
    step, losses = 0, []
    if run.metrics.is_file():
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                step = int(entry["step"])
                if "validation" in entry:
                    losses.append(float(entry["validation"]["loss"]))
            except (ValueError, KeyError, TypeError):
                break  # the last line is being written, or a kill left half of it
    return step, losses


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


def _runs_below(directory: Path) -> Iterator[Path]:
    """Run directories at any depth; a run is not searched, since trackers keep files in it."""
    if (directory / "config.yaml").is_file():
        yield directory
        return
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _runs_below(path)


def _settings(run: RunDirectory) -> dict[str, Any]:
    tree = read_yaml(run.config)
    if not isinstance(tree, dict):
        raise InputError(f"{run.config}: expected a mapping of sections")
    return {key: value for key, value in tree.items() if key != "run_dir"}


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
            tokenizer = TokenizerSettings.model_validate(tree["tokenizer"])
            packed = find(DataSettings.model_validate(tree["data"]), tokenizer)
            if packed is None:
                return "?"
            rows = sum(source.rows for source in packed.sources)
        return str(training.total_steps(rows, tree["data"]["context_length"]))
    except (KeyError, ValueError):  # InputError and pydantic's are ValueErrors
        return "?"
