"""Our generation for generation.py: the engine with each draft, EQSPEC and EXSPEC, and the pair.

What a run with drafts was like is noted on the way (`Told`), since the engine knows tokens alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from decode_candidates import Clock, models  # noqa: E402
from draft_costs import timed  # noqa: E402
from generation_peers import Answers, Work, without_ends  # noqa: E402

from llmnorm.config.file import load  # noqa: E402
from llmnorm.config.generation import GenerationSettings  # noqa: E402
from llmnorm.generation.contract import DraftedRow, Proposal, Request  # noqa: E402
from llmnorm.generation.costs import (  # noqa: E402
    LENGTHS,
    Costs,
    DraftLengths,
    costs_for,
    expected_tokens,
    size_of,
)
from llmnorm.generation.draft import Lookup  # noqa: E402
from llmnorm.generation.engine import Engine  # noqa: E402
from llmnorm.generation.eqspec import Costs as Copies  # noqa: E402
from llmnorm.generation.eqspec import eqspec  # noqa: E402
from llmnorm.generation.exspec import Schedule, exspec  # noqa: E402
from llmnorm.generation.model_draft import ModelDraft, check_draft  # noqa: E402
from llmnorm.generation.row import rows_of  # noqa: E402
from llmnorm.generation.stacks import Place, SlotStack, SlotStacks  # noqa: E402
from llmnorm.models import LlmNormForCausalLM  # noqa: E402
from llmnorm.models.decoding import Decoder  # noqa: E402

SHORTEST, LONGEST = 16, 48  # tokens of a prompt
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@dataclass
class Pair:
    """The models: ours behind Decoders, and transformers' on the same weights.

    Attributes:
        context: tokens of a row in this bench.
    """

    ours: LlmNormForCausalLM
    small: LlmNormForCausalLM
    theirs: Any
    assistant: Any
    context: int
    target: Decoder = field(init=False)
    draft: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.target, self.draft = Decoder(self.ours), Decoder(self.small)

    def costs(self, *, draft: bool) -> Costs:
        """By the committed table; of a lookup's drafts without `draft`."""
        small = size_of(self.small) if draft else None
        return costs_for(size_of(self.ours), small, threads=torch.get_num_threads())


@dataclass
class Told:
    """What a run with drafts was like.

    Attributes:
        rounds: rounds in all. rows: of all rounds together.
        drafts: for each round with drafts, the number of rows, and the tokens drafted for each.
        looked_at, accepted: drafted tokens.
    """

    rounds: int = 0
    rows: int = 0
    drafts: list[tuple[int, list[int]]] = field(default_factory=list)
    looked_at: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted ones of those that were looked at."""
        return self.accepted / max(1, self.looked_at)

    @property
    def drafted(self) -> float:
        """The longest draft of a round, on average."""
        return sum(max(drafted) for _, drafted in self.drafts) / self.rounds


class Noted:
    """A draft that notes what it has proposed."""

    def __init__(self, draft: Any, told: Told) -> None:
        self._draft, self._told = draft, told
        self.move, self.release = draft.move, draft.release

    def propose(self, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[Proposal]:
        """The draft's own proposals."""
        found: list[Proposal] = self._draft.propose(rows, counts)
        self._told.drafts.append((len(rows), [len(proposal.tokens) for proposal in found]))
        return found


class NotedLengths(DraftLengths):
    """Draft lengths that note what was accepted."""

    def __init__(self, costs: Costs, told: Told, drafted: int | Literal["auto"]) -> None:
        super().__init__(costs, drafted)
        self._told = told

    def observe(self, slot: int, drafted: int, accepted: int) -> None:
        """Count, beside what is estimated."""
        super().observe(slot, drafted, accepted)
        self._told.looked_at += min(drafted, accepted + 1)
        self._told.accepted += accepted


def our_engine(
    pair: Pair, kind: str, work: Work, told: Told, drafted: int | Literal["auto"] = "auto"
) -> Answers:
    """Our engine: `plain`, or `ragged` with the draft of that name."""
    settings = GenerationSettings(slots=work.batch, context=pair.context)
    if kind == "plain":
        engine = Engine(pair.target, None, settings)
    else:
        draft: Any = Lookup()
        if kind == "draft":
            draft = ModelDraft(pair.draft, work.batch, context=pair.context)
        lengths = NotedLengths(pair.costs(draft=kind == "draft"), told, drafted)
        engine = Engine(pair.target, None, settings, Noted(draft, told), lengths=lengths)
    requests = [Request(tuple(p), work.sampling(row)) for row, p in enumerate(work.prompts)]
    answers: Answers = [[] for _ in requests]
    for event in engine.generate(requests):
        answers[event.request] += event.tokens
    told.rounds, told.rows = engine.counters.rounds, engine.counters.rows
    return answers


class TimedStacks(SlotStacks):
    """Stacks of rows that time what they copy."""

    def __init__(self, step: Decoder, clock: Clock) -> None:
        super().__init__(step)
        self._clock, self.seconds = clock, 0.0

    def stack(self, places: Sequence[Place]) -> SlotStack:
        """A new batch with copies of these rows."""
        begin = self._clock.now()
        try:
            return super().stack(places)
        finally:
            self.seconds += self._clock.now() - begin


def by_method(
    pair: Pair, method: str, work: Work, tokens: int, copies: Copies, clock: Clock
) -> tuple[Answers, float]:
    """EQSPEC or EXSPEC with the draft; the answers, and the seconds of copying rows."""
    rows = [
        rows_of(
            number,
            Request(tuple(prompt), work.sampling(number)),
            tokenizer=None,
            ends=(),
            vocabulary=pair.target.vocabulary,
            context=pair.context,
        )[0]
        for number, prompt in enumerate(work.prompts)
    ]
    schedule = Schedule(batch=work.batch)
    draft = ModelDraft(pair.draft, schedule.size, context=pair.context)
    stacks = TimedStacks(pair.target, clock)
    if method == "eqspec":
        events = eqspec(stacks, draft, rows, tokens, batch=work.batch, costs=copies)
    else:
        events = exspec(stacks, draft, rows, tokens, schedule=schedule, costs=copies)
    for _ in events:
        pass
    return [row.ids[row.prompt :] for row in rows], stacks.seconds


def predicted(told: Told, measured: dict[str, Any], costs_nothing: bool) -> float:
    """The speed-up that acceptance and measured c and v give for the rounds as they were."""
    v, c = measured["v"], 0.0 if costs_nothing else measured["c"]
    known = {1: 1.0, **{int(n): ratio for n, ratio in v.items()}}
    points = sorted(known)
    made = time = float(told.rounds - len(told.drafts))
    for rows, drafted in told.drafts:
        widest = max(drafted)
        made += sum(expected_tokens(told.acceptance, count) for count in drafted) / rows
        time += widest * c + float(np.interp(widest + 1, points, [known[n] for n in points]))
    return made / time


def measured_costs(
    pair: Pair, batch: int, clock: Clock, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    """c and v of this pair at this batch, each the fastest of three times in turns."""
    drafted = [1, *(length + 1 for length in lengths)]
    turns = [
        [
            timed(pair.draft, batch, 1, clock),
            *(timed(pair.target, batch, n, clock) for n in drafted),
        ]
        for _ in range(3)
    ]
    of_draft, step, *others = (min(some) for some in zip(*turns, strict=True))
    return {
        "milliseconds": 1e3 * step,
        "c": of_draft / step,
        "v": {n: seconds / step for n, seconds in zip(drafted[1:], others, strict=True)},
    }


def held_out(target: Path, overrides: Sequence[str], count: int) -> Answers:
    """The beginnings of held-out documents, of SHORTEST to LONGEST tokens, from all sources."""
    config = load(target, overrides).config
    data: Any = config.objective.build(config, alone=True, command=f"llmnorm data {target}").data
    prompts: Answers = []
    streams = [source.validation for source in data.sources]
    starts = [np.append(stream.starts(), stream.tokens) for stream in streams]
    for number in range(max(map(len, starts))):
        for stream, places in zip(streams, starts, strict=True):
            if number + 1 >= len(places):
                continue
            wanted = SHORTEST + 7 * len(prompts) % (LONGEST - SHORTEST + 1)
            if places[number + 1] - places[number] < wanted + 1:
                continue
            out = np.empty(wanted, np.int64)
            stream.read(int(places[number]), out)
            prompts.append(out.tolist())
            if len(prompts) == count:
                return prompts
    sys.exit(f"bench: error: {data.directory} has only {len(prompts)} held-out documents")


def pair_of(options: argparse.Namespace, directory: Path) -> tuple[Pair, Answers]:
    """The models and the prompts."""
    context = LONGEST + options.new + 1
    if options.quick:
        made = [models(TINY | {"num_hidden_layers": layers}) for layers in (2, 1)]
        (ours, theirs), (small, assistant) = made
        drawn = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(3, ours.config.vocab_size, (n,), generator=drawn).tolist()
            for n in (16, 19, 17, 30, 24, 16)
        ]
        return Pair(ours, small, without_ends(theirs), without_ends(assistant), context), prompts
    from transformers import AutoModelForCausalLM

    from llmnorm.exchange.export import export
    from llmnorm.exchange.loading import load_model

    stock: list[Any] = []
    for name, path in (("target", options.target), ("draft", options.draft)):
        export(path, directory / name, stock=True)
        model = AutoModelForCausalLM.from_pretrained(directory / name)
        stock.append(without_ends(model.float()))
    (ours, tokenizer), (small, other) = load_model(options.target), load_model(options.draft)
    check_draft(tokenizer, other, str(options.draft))
    prompts = held_out(options.target, options.overrides, 32)
    return Pair(ours.float(), small.float(), stock[0], stock[1], context), prompts
