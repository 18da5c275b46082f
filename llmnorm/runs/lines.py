"""A run's JSON lines, metrics.jsonl and samples.jsonl: reading them, and cutting them to a step.

A line is a JSON object that begins with its step, `{"step": 12, ...}`. Steps never fall from one
line to the next.

    read_lines(path)      the whole records, and what of the file is damaged
    plan_cut(path, step)  what a run that goes on from `step` keeps of the file; writes nothing
    Cut.apply()           makes the file so

A file may be damaged: a disk that fails leaves blocks of NUL bytes, a copy ends early. Every record
that is whole is used, also one that follows damage on the same line. A damaged line is kept aside
(`metrics.damaged.jsonl`) when the file is cut, and its number is told.

What would surprise: an unfinished last line is no damage. A process that was killed while it wrote
has left it, and its step is trained again.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from llmnorm.machine.reading import json_lines

_BEGIN = b'{"step": '
_LISTED = 5  # numbers of lines in a message


class Entry(NamedTuple):
    """A whole record.

    Attributes:
        number: of its line, from 1.
        raw: its bytes, without the end of the line.
        value: its object.
    """

    number: int
    raw: bytes
    value: dict[str, Any]

    @property
    def step(self) -> int:
        """The step that it belongs to."""
        return int(self.value["step"])


class Lines(NamedTuple):
    """What a file of JSON lines holds.

    Attributes:
        entries: its whole records.
        damaged: number (from 1) and bytes of each line that is not one whole record.
        unfinished: bytes of a last line that has no end and is no record.
        closed: whether the last line has its end.
    """

    entries: list[Entry]
    damaged: list[tuple[int, bytes]]
    unfinished: bytes = b""
    closed: bool = True


def read_lines(path: Path) -> Lines:
    """The records of a run's file; a file that is not there has none.

    Raises:
        InputError: it is no regular file, or cannot be read.
    """
    found = Lines([], [])
    if not path.exists():
        return found
    for line in json_lines(path):
        found = found._replace(closed=not line.unfinished)
        if line.value is not None and _has_step(line.value):
            found.entries.append(Entry(line.number, line.raw.rstrip(b"\r\n"), line.value))
            continue
        whole = list(_whole_records(line.number, line.raw))
        found.entries.extend(whole)
        if line.unfinished and not whole:
            return found._replace(unfinished=line.raw)
        if line.raw.strip():
            found.damaged.append((line.number, line.raw))
    return found


def whole_lines(path: Path) -> Iterator[Entry]:
    """The records of a run's file, one at a time; lines that are not one whole record are left out.

    Raises:
        InputError: as `read_lines`.
    """
    if path.exists():
        for line in json_lines(path):
            if line.value is not None and _has_step(line.value):
                yield Entry(line.number, line.raw.rstrip(b"\r\n"), line.value)


def damage(path: Path, damaged: Sequence[tuple[int, bytes]]) -> str | None:
    """The beginning of a sentence about a file's damaged lines; None if there are none."""
    if not damaged:
        return None
    numbers = ", ".join(str(number) for number, _ in damaged[:_LISTED])
    more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
    one = len(damaged) == 1
    return f"{path}: {'line' if one else 'lines'} {numbers}{more} {'is' if one else 'are'} damaged"


class Cut(NamedTuple):
    """What a run that goes on from a step keeps of a file.

    Attributes:
        path: the file.
        step: the step.
        kept: the records up to it.
        past: the records past it, whose steps are trained again.
        damaged: as in `Lines`; a record whose step is out of order is among them.
        unfinished, closed: as in `Lines`.
    """

    path: Path
    step: int
    kept: list[Entry]
    past: list[Entry]
    damaged: list[tuple[int, bytes]]
    unfinished: bytes
    closed: bool

    @property
    def aside(self) -> Path:
        """Where damaged lines are kept."""
        return self.path.with_suffix(".damaged.jsonl")

    def notes(self) -> list[str]:
        """What was lost, in sentences; nothing of a line that a killed process has not finished."""
        notes = []
        if text := damage(self.path, self.damaged):
            stays = "is" if len(self.damaged) == 1 else "are"
            notes.append(f"{text} and {stays} kept in {self.aside.name}; whole lines stay")
        begun = re.match(rb'\{"step": (\d+)', self.unfinished)
        if self.unfinished and not (begun and int(begun[1]) > self.step):
            notes.append(f"{self.path}: the last line has no end and is dropped")
        return notes

    def apply(self) -> None:
        """Make the file so, if it is not; a kill at any moment leaves the old file or the new.

        Raises:
            OSError: the disk refuses.
        """
        if self.closed and not (self.past or self.damaged or self.unfinished):
            return
        if self.damaged:
            with self.aside.open("ab") as file:
                file.writelines(raw.rstrip(b"\n") + b"\n" for _, raw in self.damaged)
                _sync(file)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(entry.raw + b"\n" for entry in self.kept)
            _sync(file)
        temporary.replace(self.path)


def plan_cut(path: Path, step: int) -> Cut:
    """What a run that goes on from `step` keeps of a file; nothing is written.

    Raises:
        InputError: as `read_lines`.
    """
    found = read_lines(path)
    entries = found.entries
    last = max((index for index, entry in enumerate(entries) if entry.step <= step), default=-1)
    # A step past the cut in front of one that is not: the number was damaged.
    astray = [(entry.number, entry.raw) for entry in entries[: last + 1] if entry.step > step]
    return Cut(
        path,
        step,
        kept=[entry for entry in entries if entry.step <= step],
        past=entries[last + 1 :],
        damaged=sorted([*found.damaged, *astray]),
        unfinished=found.unfinished,
        closed=found.closed,
    )


def append_whole(path: Path, lines: Sequence[bytes]) -> None:
    """Append lines to a file, but for those that it has; they are on the disk when it returns.

    A process that is killed in between leaves an unfinished line, which the next call removes.

    Args:
        lines: without their ends.

    Raises:
        OSError: the disk refuses.
    """
    *known, unfinished = (path.read_bytes() if path.exists() else b"").split(b"\n")
    there = set(known)
    new = [line for line in lines if line not in there]
    if not new:
        return
    with path.open("ab") as file:
        file.truncate(file.tell() - len(unfinished))
        file.writelines(line + b"\n" for line in new)
        _sync(file)


def _has_step(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("step")) is int and value["step"] >= 0


def _whole_records(number: int, raw: bytes) -> Iterator[Entry]:
    """The whole records of a damaged line: one after a block of NULs, two without an end between.

    Quotes inside of a record's texts are escaped, so `_BEGIN` stands where a record begins.
    """
    starts = [match.start() for match in re.finditer(re.escape(_BEGIN), raw)]
    for start, end in zip(starts, [*starts[1:], len(raw)], strict=False):
        text = raw[start:end].decode("utf-8", errors="surrogateescape")
        try:
            value, length = json.JSONDecoder().raw_decode(text)
            record = text[:length].encode("utf-8")  # refuses what was not UTF-8
        except (ValueError, RecursionError):
            continue
        if _has_step(value):
            yield Entry(number, record, value)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
