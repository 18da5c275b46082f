"""EQSPEC: batch speculative decoding with rows aligned anew in every round (arXiv 2510.22876).

    for event in eqspec(step, draft, rows, tokens=5): ...

A round: the draft proposes tokens, one pass of the target verifies them, each row commits its
accepted tokens and the bonus token, and the batch is made anew from what the rows have committed
(unpad, append, repad): rows have gained different numbers of tokens, and a batch with one length
for all has to move them. This is the readable reference; the engine's `ragged` rounds move nothing.

The invariants, for every row, before each pass: positions are 0, 1, ... without holes; a query sees
the row's own tokens up to its own; the cache holds all committed tokens but the last, pending one.

What differs from the released code (eBay/spec_dec), each point with a test: a draft that is wholly
accepted brings its bonus token too (K + 1 tokens); what follows an end token is neither told nor
kept; only tokens of the answer end a row, so a prompt may hold end tokens; padding is known by
numbers and not by a token's id, so it may be the end token; a row near its end drafts less by
itself; rows that have ended leave the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from llmnorm.generation.contract import Draft, Event, Proposal, Step
from llmnorm.generation.row import Row
from llmnorm.generation.sampling import verify
from llmnorm.generation.stacks import SlotStacks, Stack, Stacks


@dataclass
class Costs:
    """What the batches of a run have cost.

    Attributes:
        rounds: passes of the target.
        rows: rows in all of them.
        grouped: rounds with a full group of equal lengths (EXSPEC).
        moved: rows that were copied to align or to group them, or out of a batch.
        moved_tokens: tokens that these held.
        columns: of the batches before each pass, rows times the longest row.
        padding: those of them that are no row's own.
    """

    rounds: int = 0
    rows: int = 0
    grouped: int = 0
    moved: int = 0
    moved_tokens: int = 0
    columns: int = 0
    padding: int = 0

    @property
    def grouping_rate(self) -> float:
        """Share of the rounds with a full group."""
        return self.grouped / max(self.rounds, 1)

    @property
    def realignment_share(self) -> float:
        """Rows copied for each row that was run."""
        return self.moved / max(self.rows, 1)

    @property
    def padding_share(self) -> float:
        """Share of the columns that is padding."""
        return self.padding / max(self.columns, 1)

    def move(self, lengths: Sequence[int]) -> None:
        """Count copied rows of these lengths."""
        self.moved += len(lengths)
        self.moved_tokens += sum(lengths)


class Seats:
    """Numbers of rows, by which the draft knows them: the first ones, without gaps."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._rows: list[Row] = []

    def take(self, row: Row) -> None:
        """Give a row the first free number."""
        row.slot = len(self._rows)
        self._rows.append(row)

    def leave(self, row: Row, heir: Row | None = None) -> None:
        """A row ends; the last one gets its number, or `heir` gets it, and the last one heir's."""
        gap = row.slot
        self._draft.release(gap)
        row.slot = -1
        for mover in (heir, self._rows[-1]):
            if mover is not None and mover.slot > gap:
                self._draft.move(mover.slot, gap)
                self._rows[gap], mover.slot, gap = mover, gap, mover.slot
        self._rows.pop()

    def clear(self) -> None:
        """All rows leave."""
        for row in reversed(list(self._rows)):
            self.leave(row)


def eqspec(
    step: Step | Stacks,
    draft: Draft,
    rows: Iterable[Row],
    tokens: int,
    *,
    batch: int = 8,
    costs: Costs | None = None,
) -> Iterator[Event]:
    """Run rows in batches, one batch after the other, and yield what each row gains in a round.

    Args:
        step: the target.
        draft: proposes tokens; its slots are the rows' numbers in the batch.
        rows: in the order of the requests.
        tokens: drafted for each row and round.
        batch: rows in a batch; it shrinks as they end.
        costs: is counted up.
    """
    stacks, costs, waiting = stacks_of(step), costs or Costs(), iter(rows)
    while going := list(islice(waiting, batch)):
        seats = Seats(draft)
        try:
            for row in going:
                seats.take(row)
            stack = stacks.stack([(stacks.prompt(row.ids[:-1]), 0) for row in going])
            while going:
                events = verified(stack, draft, going, tokens, costs)
                left = [place for place, event in enumerate(events) if event.finish is None]
                for row, event in zip(going, events, strict=True):
                    if event.finish is not None:
                        seats.leave(row)
                going = [going[place] for place in left]
                yield from events
                if going:
                    stack = stacks.stack([(stack, place) for place in left])
                    costs.move(stack.lengths)
        finally:
            seats.clear()


def verified(
    stack: Stack, draft: Draft, rows: Sequence[Row], tokens: int, costs: Costs
) -> list[Event]:
    """A round of the rows of a batch: drafts, the target's pass, and what each row commits.

    The batch holds afterwards what the rows have committed, but for the pending tokens.
    """
    costs.rounds += 1
    costs.rows += len(rows)
    costs.columns += len(rows) * max(stack.lengths)
    costs.padding += len(rows) * max(stack.lengths) - sum(stack.lengths)
    counts = [min(tokens, row.remaining - 1) if row.sampling.speculative else 0 for row in rows]
    proposals = [Proposal([])] * len(rows)
    if any(counts):
        proposals = draft.propose(rows, counts)
    blocks = [[row.ids[-1], *p.tokens] for row, p in zip(rows, proposals, strict=True)]
    logits = stack.feed(blocks)
    verdicts = verify([row.chooser for row in rows], logits, [0] * len(rows), proposals)
    events = []
    for row, verdict, proposal in zip(rows, verdicts, proposals, strict=True):
        if verdict.fault is not None:
            events.append(row.end("error", verdict.fault))
        else:
            events.append(row.commit(verdict, len(proposal.tokens)))
    stack.drop([len(b) - len(event.tokens) for b, event in zip(blocks, events, strict=True)])
    return events


def stacks_of(step: Step | Stacks) -> Stacks:
    """How a target's rows are stacked: in our cache, if nothing else is given."""
    return step if isinstance(step, Stacks) else SlotStacks(step)
