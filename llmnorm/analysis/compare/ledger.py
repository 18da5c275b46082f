"""The finished runs of a comparison, on disk: `runs.jsonl`, a line a run."""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmnorm.machine.reading import json_lines
from llmnorm.part import InputError


@dataclass(frozen=True)
class Record:
    """A finished run, as a line of runs.jsonl.

    Attributes:
        run: the run's key, `plan.Run.key`.
        steps, tokens: how long it trained.
        loss: final loss on the validation text in nats a token; None where the run diverged.
        bits_per_byte: of the validation text, at the end.
        curve: (tokens, training loss) of each logged step.
        tokens_per_second: median of the logged rates, evaluation and saving left out.
        place: device, threads and runs at a time; speeds are comparable at equal places only.
        version: version of the code.
        figures: those of the last evaluation, of every source too (objectives/figures.py).
        seconds: of the run, its evaluations included.
        memory_bytes: the most that it used: on a GPU what torch allocated, on a CPU the process.

    Lines that were written before the last three were kept lack them.
    """

    run: str
    steps: int
    tokens: int
    loss: float | None
    bits_per_byte: float | None
    curve: list[list[float]]
    tokens_per_second: float | None
    place: str
    version: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    memory_bytes: int | None = None

    @property
    def final(self) -> float:
        """The final loss; infinite where the run diverged."""
        return math.inf if self.loss is None else self.loss


class Ledger:
    """The file runs.jsonl and its records by key.

    A line is on the disk before `add` returns, so a kill loses no finished run.
    """

    def __init__(self, path: Path) -> None:
        """Read the records that are there.

        A last line without its end, which a kill left, is ignored; the next `add` overwrites it.

        Raises:
            InputError: a line is not a record, or the file cannot be read.
        """
        self._path = path
        self.records: dict[str, Record] = {}
        self._whole = 0  # bytes of the whole lines
        for line in json_lines(path) if path.exists() else ():
            if line.unfinished:
                break
            record = _record(line.value)
            if record is None:
                problem = "not a line of runs.jsonl; delete it, and its run is made again"
                raise InputError(f"{path}, line {line.number}: {problem}")
            self.records[record.run] = record
            self._whole += len(line.raw)

    @property
    def losses(self) -> dict[str, float]:
        """Final losses by key; infinite where a run diverged."""
        return {key: record.final for key, record in self.records.items()}

    def add(self, record: Record) -> None:
        """Append a record and fsync the file.

        Raises:
            InputError: the file cannot be written.
        """
        line = (json.dumps(asdict(record), allow_nan=False) + "\n").encode()
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self._path}: cannot be written: {error.strerror}; finished runs before this one "
                "are kept, and the same command continues"
            ) from None
        self.records[record.run] = record
        self._whole += len(line)


_CHECKED = TypeAdapter(Record)
_KEYS = {key.name for key in fields(Record)}
_OPTIONAL = {
    key.name
    for key in fields(Record)
    if key.default is not MISSING or key.default_factory is not MISSING
}


def _record(value: dict[str, Any] | None) -> Record | None:
    """A line's value as a record; None if it is none."""
    if value is None or not _KEYS - _OPTIONAL <= value.keys() <= _KEYS:
        return None
    try:
        record = _CHECKED.validate_python(value)
    except ValidationError:
        return None
    return record if record.loss is None or math.isfinite(record.loss) else None
