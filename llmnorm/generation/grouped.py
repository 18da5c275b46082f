"""EQSPEC and EXSPEC with the engine's `add` and `step`, for files of requests and several prompts.

    grouped = Grouped(step, tokenizer, draft, settings, ends=ends)
    number = grouped.add(request)
    events = grouped.step()             # of one row

What would surprise: rows are taken from the queue when a batch or the window has room for them, in
their order, so an EQSPEC batch is made of what has been added when it begins. Caches grow with
their rows, and a row that runs cannot be ended from outside.
"""

from collections import deque
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Draft, Event, Request, Step
from llmnorm.generation.eqspec import Costs, eqspec
from llmnorm.generation.exspec import Schedule, exspec
from llmnorm.generation.row import Row, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Grouped:
    """Runs requests by EQSPEC or EXSPEC (`settings.method`).

    Args:
        step: the target.
        tokenizer: makes text of tokens.
        draft: proposes tokens for `draft_slots(settings)` rows.
        settings: method, slots (rows of a batch) and draft_tokens, a number.
        ends: the model's end tokens.

    Attributes:
        costs: what the batches have cost.
    """

    def __init__(
        self,
        step: Step,
        tokenizer: "PreTrainedTokenizerBase",
        draft: Draft,
        settings: GenerationSettings,
        *,
        ends: Collection[int] = (),
    ) -> None:
        assert isinstance(settings.draft_tokens, int)
        self._step, self._tokenizer, self._draft = step, tokenizer, draft
        self._settings, self._tokens, self._ends = settings, settings.draft_tokens, ends
        self._waiting: deque[Row] = deque()
        self._events: Iterator[Event] | None = None
        self._next = 0
        self.costs = Costs()

    @property
    def says(self) -> str:
        """What the batches have cost, in one line."""
        costs = self.costs
        return (
            f"{self._settings.method}: {costs.grouping_rate:.1%} of {costs.rounds} rounds had a "
            f"full group of equal lengths; {costs.realignment_share:.2f} rows copied for each row "
            f"that was run; {costs.padding_share:.1%} of the columns were padding"
        )

    def add(self, request: Request) -> int:
        """Queue a request; its number, which its events have.

        Raises:
            InputError: it asks for what cannot be.
        """
        self._waiting += rows_of(
            self._next,
            request,
            tokenizer=self._tokenizer,
            ends=self._ends,
            vocabulary=self._step.vocabulary,
            context=self._settings.context or self._step.context,
        )
        self._next += 1
        return self._next - 1

    def step(self) -> list[Event]:
        """What one row has gained; nothing where no row is left."""
        while self._events is not None or self._waiting:
            if self._events is None:
                self._events = self._run()
            event = next(self._events, None)
            if event is not None:
                return [event]
            self._events = None
        return []

    def _run(self) -> Iterator[Event]:
        rows = _Queue(self._waiting)
        batch = self._settings.slots
        if self._settings.method == "eqspec":
            return eqspec(
                self._step, self._draft, rows, self._tokens, batch=batch, costs=self.costs
            )
        schedule = Schedule(batch=batch)
        return exspec(
            self._step, self._draft, rows, self._tokens, schedule=schedule, costs=self.costs
        )


def draft_slots(settings: GenerationSettings) -> int:
    """Rows that a draft works for: a batch, and in EXSPEC a window."""
    return Schedule(batch=settings.slots).size if settings.method == "exspec" else settings.slots


class _Queue:
    """The rows that wait, in their order; one that was empty may have more later."""

    def __init__(self, rows: deque[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> "Iterator[Row]":
        return self

    def __next__(self) -> Row:
        if not self._rows:
            raise StopIteration
        return self._rows.popleft()
