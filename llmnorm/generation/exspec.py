"""EXSPEC: batch speculative decoding over a window of rows, grouped by length (arXiv 2510.22876).

    for event in exspec(step, draft, rows, tokens=5, schedule=Schedule(batch=8, window=24)): ...

Rows of equal lengths need no alignment. So more rows are under way than a batch has, and each round
runs a batch of those that have the same length; where there are none, the first rows of the window
are aligned and run as in EQSPEC. Which rows are run is a pure function of lengths and waiting times
(`group`), with rows in the order of the requests.

A batch's cache is kept while the same rows are run again and need no alignment. Otherwise who is
left behind in it is taken out, and the next rows are copied into a new one; in our cache the rows
that stay keep their places, and the others are copied into theirs.

What would surprise: with natural prompts there are hardly any full groups (W = 3B: under 1 % of the
rounds), so the grouping rate is counted and belongs beside every figure. In our cache no row is
ever moved for alignment, so rounds that fall back cost as little there.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmnorm.generation.contract import Draft, Event, Step
from llmnorm.generation.eqspec import Costs, Seats, stacks_of, verified
from llmnorm.generation.row import Row
from llmnorm.generation.stacks import Place, Stack, Stacks


@dataclass(frozen=True)
class Schedule:
    """How a window's rows are grouped.

    Attributes:
        batch: rows that are run at once.
        window: rows that are under way; None: three batches.
        part: a group of this part of the batch, or more, is run alone; 1: full groups only.
        page: rows count as equal where their lengths rounded up to a page are; 1: equal lengths.
        patience: rounds that one of the window's first rows, a batch of them, may be passed over.
    """

    batch: int = 8
    window: int | None = None
    part: float = 1.0
    page: int = 1
    patience: int = 4

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 < self.part <= 1 or self.page < 1 or self.patience < 1:
            raise ValueError(f"a batch, page and patience from 1 on, a part in (0, 1]: {self}")
        if self.window is not None and self.window < self.batch:
            raise ValueError(f"window: must be at least the batch, got {self}")

    @property
    def size(self) -> int:
        """Rows of the window."""
        return 3 * self.batch if self.window is None else self.window


class Group(NamedTuple):
    """The rows of a round, by their places in the window, in its order; whether they were found
    to be of equal lengths, or are those that are aligned."""

    rows: list[int]
    equal: bool


def group(lengths: Sequence[int], waited: Sequence[int], schedule: Schedule) -> Group:
    """The rows to run next.

    In this order: the window's first rows, where one of them has waited for too long; the first
    rows, in the window's order, to fill a batch with equal lengths; the largest group that is a
    sufficient part of a batch; the window's first rows.

    Args:
        lengths: of the window's rows, in the order in which they came.
        waited: rounds since each was run, or came.
        schedule: how.
    """
    first = list(range(min(schedule.batch, len(lengths))))
    if any(waited[row] >= schedule.patience for row in first):
        return Group(first, False)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        equal = groups.setdefault(-(-length // schedule.page), [])
        equal.append(row)
        if len(equal) == schedule.batch:
            return Group(equal, True)
    largest = max(groups.values(), key=len)
    if len(largest) >= math.ceil(schedule.part * schedule.batch):
        return Group(largest, True)
    return Group(first, False)


@dataclass(eq=False)
class _Member:
    """A row of the window: where its cache is, and rounds since it was run."""

    row: Row
    place: Place
    waited: int = 0


def exspec(
    step: Step | Stacks,
    draft: Draft,
    rows: Iterable[Row],
    tokens: int,
    *,
    schedule: Schedule = Schedule(),  # noqa: B008 (it cannot be changed)
    costs: Costs | None = None,
) -> Iterator[Event]:
    """Run rows from a sliding window, and yield what each gains in a round.

    Rows enter the window in their order; the events of a round are in that order too, and say which
    request they belong to.

    Args:
        step: the target.
        draft: proposes tokens; its slots are numbers in the window.
        rows: in the order of the requests.
        tokens: drafted for each row and round.
        schedule: window, batch and groups.
        costs: is counted up.
    """
    stacks, costs, waiting = stacks_of(step), costs or Costs(), iter(rows)
    seats = Seats(draft)
    window: list[_Member] = []
    batch: Stack | None = None
    try:
        while True:
            while len(window) < schedule.size and (row := next(waiting, None)) is not None:
                seats.take(row)
                window.append(_Member(row, (stacks.prompt(row.ids[:-1]), 0)))
            if not window:
                return
            lengths = [len(member.row.ids) for member in window]
            chosen = group(lengths, [member.waited for member in window], schedule)
            run = [window[place] for place in chosen.rows]
            batch, members = _gathered(stacks, batch, run, window, costs)
            costs.grouped += chosen.equal
            events = verified(batch, draft, [m.row for m in members], tokens, costs)
            for member in window:
                member.waited += 1
            event_of = dict(zip(members, events, strict=True))
            for member in run:
                member.waited = 0
                if event_of[member].finish is not None:
                    _leave(window, member, seats, schedule.batch)
            yield from (event_of[member] for member in run)
    finally:
        seats.clear()


def _leave(window: list[_Member], member: _Member, seats: Seats, batch: int) -> None:
    """A row ends. The window's first rows, a batch of them, keep the draft's first numbers: a pass
    of the draft runs as many rows as the largest number in it."""
    first = window.index(member) < batch < len(window)
    seats.leave(member.row, window[batch].row if first else None)
    window.remove(member)


def _gathered(
    stacks: Stacks,
    batch: Stack | None,
    chosen: Sequence[_Member],
    window: Sequence[_Member],
    costs: Costs,
) -> tuple[Stack, list[_Member]]:
    """A batch of the chosen members' rows, and the members in the order of its rows.

    Who stays behind in the last batch is taken out of it first.
    """
    members = list(chosen)
    if batch is None:
        batch, copied = (
            stacks.stack([member.place for member in members]),
            list(range(len(members))),
        )
    else:
        for member in window:
            if member.place[0] is batch and member not in chosen:
                costs.move([batch.lengths[member.place[1]]])
                member.place = stacks.stack([member.place]), 0
        members = _in_their_places(batch, members)
        places: list[Place] = [(batch, row) for row in range(len(batch.lengths))]
        if batch.aligned and [member.place for member in members] == places:
            return batch, members
        batch, copied = stacks.exchange(batch, [member.place for member in members])
    costs.move([batch.lengths[row] for row in copied])
    for number, member in enumerate(members):
        member.place = batch, number
    return batch, members


def _in_their_places(batch: Stack, members: Sequence[_Member]) -> list[_Member]:
    """Members in such an order that rows of the batch stay where they are, if that can be."""
    rows = {m.place[1]: m for m in members if m.place[0] is batch and m.place[1] < len(members)}
    others = iter([member for member in members if member not in rows.values()])
    return [rows[row] if row in rows else next(others) for row in range(len(members))]
