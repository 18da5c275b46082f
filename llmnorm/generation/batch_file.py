"""The answers to a file of requests, as lines of a file, in the order of the requests.

    {"line": 1, "request": "5f0c...", "text": "...", "tokens": [5, 9], "finish": "length",
     "drafted": 12, "accepted": 7}
    {"line": 2, "request": "91ab...", "error": "prompts.jsonl:2: unknown key 'tmperature'; ..."}

A request of n rows has n lines, with `row` from 0. Rows finish in any order; a line is written once
all before it are. A process that is killed leaves whole lines, and perhaps the beginning of one. So
the same command goes on behind the last request whose lines are all there: `Output` compares what
it finds with the requests, by number and mark (`requests.Asked`), and drops the rest.

What would surprise: without seeds the texts that a killed process had not written come out
differently. The counts of drafted tokens may differ even with them.
"""

import errno
import fcntl
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from llmnorm.generation.contract import Event
from llmnorm.generation.requests import Asked
from llmnorm.generation.streams import Runs
from llmnorm.machine.files import json_text
from llmnorm.machine.reading import Line, json_lines
from llmnorm.part import InputError


@dataclass
class Row:
    """What one row has so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    drafted: int = 0
    accepted: int = 0
    finish: str | None = None
    message: str | None = None

    def take(self, event: Event) -> None:
        """Add what a round has brought."""
        self.tokens += event.tokens
        self.text += event.text
        self.drafted += event.drafted
        self.accepted += event.accepted
        self.finish, self.message = event.finish, event.message


@dataclass
class Totals:
    """What a file of requests came to, for the bar and the last line.

    Attributes:
        requests: that were answered now, refused ones too.
        found: that were answered before.
        problems: of lines without an answer, in their order.
    """

    requests: int = 0
    found: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, event: Event) -> None:
        """Add what a row has gained in a round."""
        self.tokens += len(event.tokens)
        self.drafted += event.drafted
        self.accepted += event.accepted


class Output:
    """A file that answers are appended to; a context manager.

    Args:
        path: of the file, which may be there; None: standard output.

    Raises:
        InputError: on entry, if another process writes the file, or it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] = sys.stdout.buffer

    def __enter__(self) -> Self:
        """The file, opened and locked."""
        if self._path is None:
            return self
        try:
            self._file = self._path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"--output: {self._path} is being written by another process"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise InputError(
                    f"--output: {self._path} cannot be written ({error.strerror})"
                ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._path is not None:
            self._file.close()

    def resume(self, requests: Iterator[Asked], totals: Totals) -> Iterator[Asked]:
        """The requests whose lines are not in the file; what is behind the others' is cut off.

        Args:
            totals: learns how many are there, and their problems.

        Raises:
            InputError: a line of the file does not belong to the request of its place.
        """
        if self._path is None or not self._path.stat().st_size:
            return requests
        found = (line for line in json_lines(self._path) if not line.unfinished)
        size = 0
        for asked in requests:
            lines = self._lines_of(asked, found)
            if lines is None:
                self._cut(size)
                return itertools.chain([asked], requests)
            size += sum(len(line.raw) for line in lines)
            totals.found += 1
            totals.problems += [str(v["error"]) for _, _, v, _ in lines if v and "error" in v]
        if next(found, None) is not None:
            raise InputError(
                f"--output: {self._path} holds more answers than there are requests; give another "
                "file, or remove it"
            )
        self._cut(size)
        return iter(())

    def _lines_of(self, asked: Asked, found: Iterator[Line]) -> list[Line] | None:
        """The lines of a request's answer; None where they are not all there."""
        rows = 1 if asked.request is None else asked.request.n
        lines: list[Line] = []
        while len(lines) < rows:
            line = next(found, None)
            if line is None:
                return None
            mine = {"line": asked.number, "request": asked.mark, "row": len(lines)}
            value = line.value or {}
            if any(value.get(key, 0) != expected for key, expected in mine.items()):
                raise InputError(
                    f"--output: {self._path}:{line.number}: is not the answer to {asked.where} by "
                    "this model and these settings; give another file, or remove it"
                )
            lines.append(line)
            if "text" not in value:  # the request was refused, which is one line
                break
        return lines

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines, whole."""
        text = "".join(json_text(line, ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "replace"))
        self._file.flush()

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)


@dataclass
class _Open:
    """A request whose lines are not written yet; `rows` are empty where there is a problem."""

    asked: Asked
    problem: str | None
    rows: list[Row]

    @property
    def done(self) -> bool:
        return all(row.finish is not None for row in self.rows)


def answer_all(
    engine: Runs,
    requests: Iterator[Asked],
    output: Output,
    *,
    ahead: int,
    totals: Totals,
    shown: Callable[[], None],
) -> None:
    """Run the requests and write their answers, in order, as soon as they can be.

    Args:
        ahead: rows that are handed to the engine at once; they wait there for a slot.
        totals: what is counted; problems of lines go there too.
        shown: called after each round.

    Raises:
        OSError: the disk refuses.
    """
    order: deque[_Open] = deque()
    running: dict[int, _Open] = {}
    more = True
    while more or order:
        while more and sum(len(r.rows) for r in running.values()) < ahead:
            asked = next(requests, None)
            if asked is None:
                more = False
                break
            order.append(_begin(engine, asked, running))
        if running:
            for event in engine.step():
                running[event.request].rows[event.row].take(event)
                totals.count(event)
            running = {number: request for number, request in running.items() if not request.done}
        while order and order[0].done:
            finished = order.popleft()
            lines = _lines(finished)
            output.write(lines)
            totals.requests += 1
            totals.problems += [line["error"] for line in lines if "error" in line]
        shown()


def _begin(engine: Runs, asked: Asked, running: dict[int, _Open]) -> _Open:
    """Hand a request to the engine, if it is one."""
    if asked.request is None:
        return _Open(asked, asked.problem, [])
    try:
        number = engine.add(asked.request)
    except InputError as error:
        return _Open(asked, f"{asked.where}: {error}", [])
    running[number] = begun = _Open(asked, None, [Row() for _ in range(asked.request.n)])
    return begun


def _lines(request: _Open) -> list[dict[str, Any]]:
    """The lines of a request that is done."""
    asked = request.asked
    head: dict[str, Any] = {"line": asked.number, "request": asked.mark}
    if asked.id is not None:
        head["id"] = asked.id
    if request.problem is not None:
        return [{**head, "error": request.problem}]
    lines = []
    for number, row in enumerate(request.rows):
        place = {"row": number} if len(request.rows) > 1 else {}
        line = {**head, **place, "text": row.text, "tokens": row.tokens, "finish": row.finish}
        line |= {"drafted": row.drafted, "accepted": row.accepted}
        if row.message is not None:
            line["error"] = f"{asked.where}: {row.message}"
        lines.append(line)
    return lines
