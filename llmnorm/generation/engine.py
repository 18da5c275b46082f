"""The engine: many requests at once, each round one pass of the target for all of their rows.

    engine = Engine(Decoder(model), tokenizer, settings, ends=ends)
    number = engine.add(Request(prompt))
    while not engine.idle:
        for event in engine.step(): ...         # what each row has gained in the round
    for event in engine.generate(requests): ...

A round: prompts (at most `generation.prefill_chunk` tokens between the rounds of the rows that run,
admission.py), then the draft's proposals, one pass of the target over each row's pending token and
drafts, the choice of what is committed (sampling.py), and a rollback of the rest. Rows have any
lengths and any numbers of drafts: `ragged`; without a draft each has one token: `plain`. Requests
are admitted first come first served, a row to a slot (slots.py).

Nothing here runs by itself: no threads, and every change is made by the caller's `add`, `step` and
`abort`. A row that fails (its logits are not finite, a processor of its own raises) ends alone,
with an event that says why. An exception that is no row's own leaves `step`; the rows that ran have
then failed, and the next `step` goes on with those that wait.

What would surprise: all buffers are made at the start, for as many rows of as many tokens as the
settings say, and what does not fit is refused there.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.admission import Admission
from llmnorm.generation.cache_memory import refuse_what_does_not_fit
from llmnorm.generation.contract import Draft, Event, Lengths, Proposal, Request, Step
from llmnorm.generation.row import Row, rows_of
from llmnorm.generation.sampling import verify
from llmnorm.generation.slots import Slots
from llmnorm.nn.layer_cache import PADDING
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = Proposal([])


@dataclass
class Counters:
    """What an engine has done since it was made.

    Attributes:
        rounds: passes of the target over rows that run.
        rows: rows in all of them; rows / rounds is the mean batch.
        tokens: generated.
        prompt_tokens: of admitted prompts. cached_tokens: those that an earlier row's cache saved.
        drafted, accepted: tokens, by their place in the proposal, from 0, those behind the end of
            a row too.
        finished: rows, by how they ended.
    """

    rounds: int = 0
    rows: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Continues prompts with a target model, and verifies a draft's tokens if it has a draft.

    Args:
        step: the target.
        tokenizer: makes text of tokens; None: events have no text, and stop strings are refused.
        settings: method `auto`, `plain` or `ragged`, slots, context, cache_memory, prefill_chunk,
            draft_tokens and deterministic are read here; how tokens are chosen is each request's.
        draft: proposes tokens; None: none.
        ends: the model's end tokens.
        lengths: tokens drafted for each row; None: `settings.draft_tokens`, which is a number then.

    Attributes:
        counters: what it has done.

    Raises:
        InputError: the settings ask for what cannot be: a context beyond the model's, a cache that
            does not fit, a draft without a method for it.
    """

    def __init__(
        self,
        step: Step,
        tokenizer: "PreTrainedTokenizerBase | None",
        settings: GenerationSettings,
        draft: Draft | None = None,
        *,
        ends: Collection[int] = (),
        lengths: Lengths | None = None,
    ) -> None:
        _check(settings, draft, lengths)
        context = settings.context or step.context
        if context > step.context:
            raise InputError(
                f"generation.context: is {context}, and the model takes {step.context} tokens; "
                f"set generation.context={step.context}, or leave it out"
            )
        padding = PADDING if draft is not None else 0
        refuse_what_does_not_fit(step, settings, context, padding)
        self._step, self._tokenizer, self._draft = step, tokenizer, draft
        self._ends, self._context, self._lengths = frozenset(ends), context, lengths
        # Who has to know which row is in which slot.
        self._followers = [some for some in (draft, lengths) if some is not None]
        self._drafted = settings.draft_tokens
        free = not settings.deterministic
        self._slots = Slots(step, settings.slots, context, padding=padding, reuse=free)
        self._admission = Admission(self._slots, settings.prefill_chunk, together=free)
        self.counters = Counters()
        self._rows: list[Row] = []  # those that run, by slot
        self._events: list[Event] = []  # of this step, or of one that was not finished
        self._next = 0

    @property
    def bytes(self) -> int:
        """Of the target's caches; a draft has its own."""
        return self._slots.bytes

    @property
    def copies(self) -> int:
        """Rows of the cache that were copied: on admission, and into a gap; in no round."""
        return self._slots.copies

    @property
    def prefix_lost(self) -> int:
        """Prompts that began as a row did, whose recurrent state could not be taken back there."""
        return self._slots.lost

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and no event to be fetched."""
        return not (self._rows or self.waiting or self._events)

    @property
    def running(self) -> int:
        """Rows that run."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Rows that wait for a slot, or whose prompt is being run."""
        return len(self._admission)

    @property
    def usage(self) -> float:
        """The share of the cache's tokens that running rows hold."""
        return sum(self._slots.lengths) / (self._slots.rows * self._context)

    @property
    def queued(self) -> set[int]:
        """The requests that have rows waiting for a slot."""
        return self._admission.requests

    def add(self, request: Request) -> int:
        """Queue a request; its number, which its events have.

        Raises:
            InputError: it asks for what cannot be.
        """
        self._admission.add(self._rows_of(request))
        self._next += 1
        return self._next - 1

    def check(self, request: Request) -> None:
        """Raise what `add` would raise, and do nothing; any thread may ask."""
        self._rows_of(request)

    def _rows_of(self, request: Request) -> list[Row]:
        return rows_of(
            self._next,
            request,
            tokenizer=self._tokenizer,
            ends=self._ends,
            vocabulary=self._step.vocabulary,
            context=self._context,
        )

    def abort(self, number: int) -> list[Event]:
        """End a request's rows, whatever they do now; returns their last events.

        A request that has finished, or is not known, is left as it is.
        """
        ended = self._admission.abort(number)
        for row in [row for row in self._rows if row.request == number]:
            ended.append(row)
            self._leave(row)
        return [self._closed(row.end("abort")) for row in ended]

    def generate(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Run requests, and yield what their rows gain as it comes.

        An event's `request` is the place among `requests`. An iterator that is closed early aborts
        what is left of them.

        Raises:
            InputError: a request asks for what cannot be; none has been begun then.
            ValueError: the engine has other requests, whose events would be lost.
        """
        if not self.idle:
            raise ValueError("generate: the engine has other requests; call add and step")
        places: dict[int, int] = {}
        try:
            for place, request in enumerate(requests):
                places[self.add(request)] = place
            while not self.idle:
                for event in self.step():
                    yield replace(event, request=places[event.request])
        finally:
            if not self.idle:
                for number in places:
                    self.abort(number)
                self._events = []

    def step(self) -> list[Event]:
        """Admit what fits, run a round, and tell what each row has gained, in the rows' order.

        Raises whatever is no row's own fault: an error of the model or the draft, Ctrl-C. The rows
        that ran have failed then, and the next call tells it.
        """
        try:
            self._admit()
            if self._rows:
                self._round()
        except BaseException as error:
            self._give_up(error)
            raise
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        for row, event in self._admission.run():
            finish = None if event is None else event.finish
            if finish != "error":
                self.counters.prompt_tokens += row.prompt
                self.counters.cached_tokens += row.cached
            if event is not None:
                self._events.append(self._closed(event))
            if finish is None:
                self._rows.append(row)

    def _round(self) -> None:
        rows = list(self._rows)
        proposals = self._proposals(rows)
        blocks = [
            [row.ids[-1], *proposal.tokens] for row, proposal in zip(rows, proposals, strict=True)
        ]
        logits = self._slots.feed(blocks)
        verdicts = verify([row.chooser for row in rows], logits, [0] * len(rows), proposals)
        self.counters.rounds += 1
        self.counters.rows += len(rows)
        back, ended = [], []
        for row, block, verdict in zip(rows, blocks, verdicts, strict=True):
            drafted = len(block) - 1
            if verdict.fault is not None:
                event = row.end("error", verdict.fault)
            else:
                event = row.commit(verdict, drafted)
                self._observe(row, drafted, verdict.accepted)
            self.counters.tokens += len(event.tokens)
            back.append(len(block) - len(event.tokens))
            self._events.append(self._closed(event))
            if event.finish is not None:
                ended.append((row, event.finish))
        self._slots.rollback(back)
        # From the last one on, so that no row moves that is about to leave.
        for row, finish in reversed(ended):
            self._leave(row, failed=finish == "error")

    def _proposals(self, rows: list[Row]) -> list[Proposal]:
        """The drafts of a round, none where a draft is not wanted or would pass the row's end."""
        if self._draft is None:
            return [NONE] * len(rows)
        if self._lengths is not None:
            wanted = self._lengths.counts(rows)
        else:
            assert isinstance(self._drafted, int)
            wanted = [self._drafted] * len(rows)
        counts = [
            min(count, row.remaining - 1) if row.sampling.speculative else 0
            for row, count in zip(rows, wanted, strict=True)
        ]
        if not any(counts):
            return [NONE] * len(rows)
        proposals = self._draft.propose(rows, counts)
        for proposal, count in zip(proposals, counts, strict=True):
            assert len(proposal.tokens) <= count, "a draft proposes at most what is asked for"
        if self._lengths is not None:
            found = sum(bool(proposal.tokens) for proposal in proposals)
            self._lengths.proposed(sum(count > 0 for count in counts), found)
        return proposals

    def _observe(self, row: Row, drafted: int, accepted: int) -> None:
        if not drafted:
            return
        for counts, number in (
            (self.counters.drafted, drafted),
            (self.counters.accepted, accepted),
        ):
            counts += [0] * (drafted - len(counts))
            for place in range(number):
                counts[place] += 1
        if self._lengths is not None:
            self._lengths.observe(row.slot, drafted, accepted)

    def _closed(self, event: Event) -> Event:
        """The event; a row's last one is counted."""
        if event.finish is not None:
            finished = self.counters.finished
            finished[event.finish] = finished.get(event.finish, 0) + 1
        return event

    def _leave(self, row: Row, *, failed: bool = False) -> None:
        """A row runs no more; the last running one takes its place.

        Its cache stays for prompts that begin as it does, unless those who wait need every slot.
        """
        keep = not failed and self.waiting <= self._slots.spare
        moved = self._slots.finish(row.slot, keep=keep)
        if failed:
            self._slots.forget()
        for follower in self._followers:
            follower.release(row.slot)
            if moved is not None:
                follower.move(moved, row.slot)
        last = self._rows.pop()
        if moved is not None:
            self._rows[row.slot] = last
            last.slot = row.slot
        row.slot = -1

    def _give_up(self, error: BaseException) -> None:
        """After an exception in the middle of a round: end the rows that ran, begin new caches."""
        message = f"the round was not finished: {type(error).__name__}: {error}".rstrip(": ")
        for row in self._rows:
            for follower in self._followers:
                follower.release(row.slot)
        told = {(event.request, event.row) for event in self._events if event.finish is not None}
        for row in [*self._rows, *self._admission.give_up()]:
            if (row.request, row.row) not in told:
                self._events.append(self._closed(row.end("error", message)))
        self._rows = []
        self._slots.clear()


def _check(settings: GenerationSettings, draft: Draft | None, lengths: Lengths | None) -> None:
    """What the engine runs is `plain` without a draft, and `ragged` with one."""
    method = settings.method
    if method not in ("auto", "plain", "ragged"):
        raise InputError(f"generation.method: '{method}' is no method of the engine's")
    if method == "ragged" and draft is None:
        raise InputError("generation.method: 'ragged' needs a draft; set generation.draft")
    if method == "plain" and draft is not None:
        raise InputError("generation.method: 'plain' takes no draft; set generation.draft=none")
    counted = isinstance(settings.draft_tokens, int)
    assert draft is None or counted or lengths is not None, "who says how many tokens are drafted?"
