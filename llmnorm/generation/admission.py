"""Admission: the rows that wait for a slot, first come first served, and the runs of their prompts.

    admission.add(rows)
    for row, event in admission.run(): ...      # rows that run now, or have ended

Prompts are run between two rounds of the rows that run, `chunk` tokens in all. A long one is run in
pieces with rounds between them, so that those rows wait for one piece at most. Short ones that wait
beside each other are run in one pass, where none of them begins as another one or as a row does. By
one thread of a CPU 16 prompts of 16 to 48 tokens take .27 s four at a time and .44 s one by one, of
22.8M weights.

What would surprise: a deterministic engine runs every prompt alone, since a row's numbers in a pass
of several prompts are others in the last digit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from llmnorm.generation.contract import Event
from llmnorm.generation.row import Row
from llmnorm.generation.slots import Slots

TOGETHER = 4  # prompts in a pass; eight were not faster


class Admission:
    """Gives rows their slots.

    Args:
        slots: where they get them.
        chunk: tokens of prompts between two rounds.
        together: whether short prompts that wait beside each other are run in one pass.
    """

    def __init__(self, slots: Slots, chunk: int, *, together: bool) -> None:
        self._slots, self._chunk = slots, chunk
        self._most = TOGETHER if together else 1
        self._waiting: deque[Row] = deque()
        self._filling: list[Row] = []  # the rows whose prompts are being run

    def __len__(self) -> int:
        """Rows that wait, or whose prompt is being run."""
        return len(self._waiting) + len(self._filling)

    @property
    def requests(self) -> set[int]:
        """Those that have rows of which nothing has been run."""
        return {row.request for row in self._waiting}

    def add(self, rows: Sequence[Row]) -> None:
        """Rows that wait."""
        self._waiting += rows

    def abort(self, number: int) -> list[Row]:
        """The request's rows, which are here no more."""
        ended = [row for row in self._waiting if row.request == number]
        for row in ended:
            self._waiting.remove(row)
        if any(row.request == number for row in self._filling):
            ended += self.give_up()
            self._slots.drop()
        return ended

    def give_up(self) -> list[Row]:
        """The rows whose prompts were being run, which are here no more; what waits goes on."""
        ended, self._filling = self._filling, []
        return ended

    def run(self) -> Iterator[tuple[Row, Event | None]]:
        """Run prompts and give rows their slots, as far as `chunk` tokens and the slots go.

        Yields:
            A row, and what there is to be told of it. If it has not ended it runs now (`row.slot`).
        """
        budget = self._chunk
        while self._filling or (self._waiting and self._slots.spare):
            if not self._filling:
                self._filling = self._next(budget)
                if not self._filling:
                    return
                if len(self._filling) > 1:
                    budget -= len(self._filling) * _longest(self._filling)
                    yield from self._run_together()
                    continue
                (row,) = self._filling
                row.cached = self._slots.begin(row.ids, whole=row.scores is not None)
            (row,) = self._filling
            finite = True
            while finite and (piece := self._slots.piece(self._chunk)):
                if piece > budget:
                    return
                budget -= piece
                logits = self._slots.run(self._chunk, every=row.scores is not None)
                finite = bool(logits.isfinite().all())
                if finite and row.scores is not None:
                    row.score(logits[0])
            if finite and budget < self._chunk < row.prompt and self._slots.running:
                return  # its copy comes behind another round: it takes long, and so did the piece
            self._filling = []
            if not finite:
                self._slots.drop()
                self._slots.forget()
                yield row, _failed(row)
            elif not row.limit:  # it was the prompt that was asked about
                self._slots.drop()
                yield row, row.end("length")
            else:
                row.slot = self._slots.admit(row.ids)
                yield row, None if row.scores is None else row.begun()

    def _next(self, budget: int) -> list[Row]:
        """The next row, or the next ones whose prompts are run in one pass of so many tokens.

        None if the next prompt is to be run in a pass, and more is left of it than of the budget.
        """
        rows: list[Row] = []
        for row in islice(self._waiting, min(self._most, self._slots.spare)):
            tokens = (len(rows) + 1) * _longest([*rows, row])
            if not 0 < tokens <= self._chunk or row.scores is not None:
                break
            if self._slots.begins_as_a_row_does(row.ids, beside=[other.ids for other in rows]):
                break
            if tokens > budget:
                if not rows:
                    return []
                break
            rows.append(row)
        return [self._waiting.popleft() for _ in range(max(1, len(rows)))]

    def _run_together(self) -> Iterator[tuple[Row, Event | None]]:
        logits = self._slots.run_together([row.ids for row in self._filling])
        for place, right in enumerate(logits.isfinite().flatten(1).all(1).tolist()):
            row = self._filling[0]
            if right:
                row.slot = self._slots.admit(row.ids, beside=place)
            del self._filling[0]
            yield row, None if right else _failed(row)
        self._slots.drop()


def _longest(rows: Sequence[Row]) -> int:
    """Tokens of the longest prompt that are run; the last one is pending."""
    return max(len(row.ids) - 1 for row in rows)


def _failed(row: Row) -> Event:
    return row.end("error", "the model's logits of the prompt are not finite")
