"""Reading a run's metrics.jsonl, and smoothing its curves.

What would surprise: the mean that smooths is taken over tokens (over 1/50 of the run), not over
lines, so that `logging.every` does not change it. Steps without a finite loss are left out.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.part import InputError

ALL = "all"  # stands for every source, weighted by training bytes
COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "lr", "tokens_per_second")


class Record(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
        training: for each of COLUMNS, a number for each logged step.
        validation: for step, tokens, seconds and loss, a number for each evaluation.
        bits_per_byte: of the last evaluation, ALL first, then each source by name; empty for an
            objective without bits per byte.
    """

    training: dict[str, list[float]]
    validation: dict[str, list[float]]
    bits_per_byte: dict[str, float]


def read_metrics(path: Path) -> Record:
    """Read a run's metrics.jsonl; a last line that is still being written is left out.

    Raises:
        InputError: the file is missing, has no metrics, or has a line that is not metrics.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{path} cannot be read: {reason}") from None
    training: dict[str, list[float]] = {key: [] for key in COLUMNS}
    validation: dict[str, list[float]] = {key: [] for key in COLUMNS[:4]}
    bits_per_byte: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            if "validation" in entry:
                figures = entry["validation"]
                by_source = {ALL: figures, **figures["sources"]}
                row = [float({**entry, "loss": figures["loss"]}[key]) for key in validation]
                bits_per_byte = {
                    name: float(values["bits_per_byte"])
                    for name, values in by_source.items()
                    if "bits_per_byte" in values
                }
                into = validation
            else:
                row, into = [float(entry[key]) for key in training], training
        except (ValueError, KeyError, TypeError, AttributeError):
            if not line.endswith("\n"):
                break
            raise InputError(
                f"{path}, line {number}: not a line of metrics: {line[:60]!r}"
            ) from None
        if all(map(math.isfinite, row)):
            for column, value in zip(into.values(), row, strict=True):
                column.append(value)
    if not training["loss"] and not validation["loss"]:
        raise InputError(f"{path} holds no loss yet; train the run first")
    return Record(training, validation, bits_per_byte)


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
