"""Reading a run's metrics.jsonl, and smoothing its curves.

What would surprise: the mean that smooths is taken over tokens (over 1/50 of the run), not over
lines, so that `logging.every` does not change it. Steps without a finite loss are left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from llmnorm.part import InputError
from llmnorm.runs.lines import damage, read_lines

ALL = "all"  # stands for every source, weighted by training bytes
COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "lr", "tokens_per_second")


class Load(NamedTuple):
    """The load of a layer's experts at one step (training/expert_load.py).

    Attributes:
        tokens: trained on so far.
        shares: of each expert; together 1.
    """

    tokens: float
    shares: list[float]


class Record(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
        training: for each of COLUMNS, a number for each logged step.
        validation: for step, tokens, seconds and loss, a number for each evaluation.
        bits_per_byte: of the last evaluation, ALL first, then each source by name; empty for an
            objective without bits per byte.
        damaged: a sentence about damaged lines, which are left out; None if there are none.
        expert_load: by layer the loads of its experts along the run; empty where none were
            measured.
        tasks: of each of lm-eval's tasks that evaluations have scored ("arc_easy acc", the first
            metric of each): the tokens trained on, and the scores.
        stages: the tokens at the first logged step of each later stage of the data; empty where
            there is one.
    """

    training: dict[str, list[float]]
    validation: dict[str, list[float]]
    bits_per_byte: dict[str, float]
    damaged: str | None = None
    expert_load: Mapping[str, list[Load]] = MappingProxyType({})
    tasks: Mapping[str, tuple[list[float], list[float]]] = MappingProxyType({})
    stages: tuple[float, ...] = ()


def read_metrics(path: Path) -> Record:
    """Read a run's metrics.jsonl; damaged lines are left out and named in the record.

    Raises:
        InputError: the file is missing or cannot be read, or has no metrics.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file; train the run first")
    lines = read_lines(path)
    damaged = list(lines.damaged)
    training: dict[str, list[float]] = {key: [] for key in COLUMNS}
    validation: dict[str, list[float]] = {key: [] for key in COLUMNS[:4]}
    bits_per_byte: dict[str, float] = {}
    loads: dict[str, list[Load]] = {}
    tasks: dict[str, tuple[list[float], list[float]]] = {}
    stages: list[float] = []
    stage: Any = None
    for entry in lines.entries:
        try:
            if "validation" in entry.value:
                figures = entry.value["validation"]
                by_source = {ALL: figures, **figures["sources"]}
                row = _row({**entry.value, "loss": figures["loss"]}, validation)
                bits_per_byte = {
                    name: _number(values["bits_per_byte"])
                    for name, values in by_source.items()
                    if "bits_per_byte" in values
                }
                into = validation
                for task, scores in entry.value.get("tasks", {}).items():
                    metric, score = next(iter(scores.items()))
                    points = tasks.setdefault(f"{task} {metric}", ([], []))
                    points[0].append(_number(entry.value["tokens"]))
                    points[1].append(_number(score))
            else:
                row, into = _row(entry.value, training), training
                for layer, figures in entry.value.get("health", {}).items():
                    if found := figures.get("expert_load"):
                        load = Load(_number(entry.value["tokens"]), [*map(_number, found)])
                        loads.setdefault(layer, []).append(load)
                before, stage = stage, entry.value.get("stage")
                if before is not None and stage != before:
                    stages.append(row[1])
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append((entry.number, entry.raw))
            continue
        if all(map(math.isfinite, row)):
            for column, value in zip(into.values(), row, strict=True):
                column.append(value)
    if not training["loss"] and not validation["loss"]:
        text = damage(path, damaged)
        raise InputError(f"{path} holds no loss yet; {text or 'train the run first'}")
    told = damage(path, sorted(damaged))
    return Record(training, validation, bits_per_byte, told, loads, tasks, tuple(stages))


def _row(entry: Mapping[str, Any], keys: Iterable[str]) -> list[float]:
    return [_number(entry[key]) for key in keys]


def _number(value: Any) -> float:
    """A number of metrics.jsonl, where null stands for one that is not finite."""
    return math.nan if value is None else float(value)


def smoothed(tokens: Sequence[float], values: Sequence[float]) -> list[float]:
    """The exponential mean of a curve over 2 % of its tokens.

    At the start, where a loss falls fast, it is over fewer: a fifth of the tokens so far.

    Args:
        tokens: ascending, where the values were taken.
        values: as many.
    """
    if not tokens:
        return []
    longest = 0.02 * (tokens[-1] - tokens[0])
    total = weight = 0.0
    before, means = tokens[0], []
    for token, value in zip(tokens, values, strict=True):
        memory = max(1.0, min(longest, 0.2 * (token - tokens[0])))
        keep = math.exp(-(token - before) / memory)
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
        before = token
    return means
