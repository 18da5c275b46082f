"""Every method, draft and mixer against full passes without a cache in float64 (watched.py).

    python -m tests.generation.equality MODEL METHOD DRAFT PROMPTS SEED float64|float32

Uneven prompts, from 1 token to the context, are split over batches of 1 to 16 rows, each with a
number of drafted tokens of its own; rows end at an end token, at their limits and at the context.
The last line says how many rows were equal, how many of them tied (float32 alone), the largest
difference of a logit, and what was accepted. tools/campaigns/generation.py runs all combinations.
"""

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmnorm.generation import eqspec as eqspec_module
from llmnorm.generation.contract import Draft, Event, Request, Sampling
from llmnorm.generation.draft import Lookup
from llmnorm.generation.eqspec import eqspec
from llmnorm.generation.exspec import Schedule, exspec
from llmnorm.generation.model_draft import ModelDraft
from llmnorm.generation.row import rows_of
from llmnorm.generation.sampling import verify
from llmnorm.models import LlmNormForCausalLM
from llmnorm.models.decoding import Decoder
from tests.generation.watched import Answer, KnownDraft, Watched, check
from tests.models.cache_rounds import VOCABULARY, build

SHARES = {"sometimes right": 0.7, "always right": 1.0, "never right": 0.0}
CONTEXT, LONGEST = 72, 24  # tokens of a row, and of an answer
BATCHES = range(1, 17)
WINDOW = 3  # EXSPEC's, in batches
MOST_TIES = 0.01  # of the rows


def main(words: Sequence[str]) -> int:
    """Run one combination; 1 where a row is not what full passes give."""
    name, method, kind, count, seed, precision = words
    torch.set_num_threads(1)
    chance = random.Random(f"{name} {method} {kind} {seed}")
    model = build(name).to(getattr(torch, precision))
    requests = [_request(chance) for _ in range(int(count))]
    known = _known(model, requests)
    end = _end(known, requests)
    answers: list[Answer] = []
    drafted = 0
    for number, batch in enumerate(BATCHES):
        mine = requests[number :: len(BATCHES)]
        tokens = 1 + (batch * 5 + int(seed)) % 8
        draft = None if method == "plain" else _draft(kind, name, model.dtype, known, chance, batch)
        if not mine:
            continue
        if method in ("plain", "ragged"):
            made = Watched(
                model, draft, ends=[end], slots=batch, context=CONTEXT, draft_tokens=tokens
            )
            for request in mine:
                made.add_request(request)
            answers += made.run()
            drafted += sum(made.engine.counters.drafted)
        else:
            assert draft is not None
            answers += _reference(method, model, draft, mine, end, batch, tokens)
    worst, ties = check(model, answers, {end}, CONTEXT)
    assert [a.request for a in answers if a.finish is None] == [], "rows that never ended"
    ends = Counter(answer.finish for answer in answers)
    accepted, total = sum(a.accepted for a in answers), sum(len(a.tokens) for a in answers)
    print(
        f"{name}, {method}, {kind}: {len(answers)} of {len(requests)} rows equal, {ties} ties, "
        f"logits within {worst:.1e}, {accepted} of {total} tokens drafted, ended by {dict(ends)}"
    )
    return int(len(answers) != len(requests) or ties > MOST_TIES * len(answers))


def _request(chance: random.Random) -> Request:
    size = chance.choice([1, 2, CONTEXT, *[chance.randint(1, CONTEXT)] * 9])
    prompt = tuple(chance.randrange(VOCABULARY) for _ in range(size))
    sampling = Sampling(
        temperature=0,
        max_tokens=chance.randint(1, LONGEST),
        speculative=chance.random() < 0.9,
        ignore_end=chance.random() < 0.3,
    )
    return Request(prompt, sampling)


def _known(model: LlmNormForCausalLM, requests: Sequence[Request]) -> list[list[int]]:
    """Each prompt with LONGEST tokens of its greedy continuation, checked."""
    plain = Watched(model, slots=16, context=CONTEXT)
    for request in requests:
        plain.add(request.prompt, max_tokens=LONGEST)
    answers = plain.run()
    plain.check()
    return [[*a.request.prompt, *a.tokens] for a in answers]


def _end(known: Sequence[Sequence[int]], requests: Sequence[Request]) -> int:
    """The token that ends most rows behind their second token."""
    late: Counter[int] = Counter()
    for text, request in zip(known, requests, strict=True):
        answer = text[len(request.prompt) :][: request.sampling.max_tokens]
        late.update(set(answer[2:]) - set(answer[:2]))
    return late.most_common(1)[0][0] if late else 0


def _draft(
    kind: str,
    name: str,
    dtype: torch.dtype,
    known: Sequence[Sequence[int]],
    chance: random.Random,
    batch: int,
) -> Draft:
    if kind == "lookup":
        return Lookup()
    if kind not in SHARES:
        near = {"near model": True, "other model": False}[kind]
        model, scale = (build(name), 0.01) if near else (build("softmax"), 0.1)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += scale * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
        return ModelDraft(Decoder(model.to(dtype), captured=False), WINDOW * batch, context=CONTEXT)
    share = SHARES[kind]
    return KnownDraft(
        known,
        lambda: chance.random() < share,
        (lambda count: chance.randint(0, count)) if 0 < share < 1 else (lambda count: count),
        in_front=False,
    )


def _reference(
    method: str,
    model: LlmNormForCausalLM,
    draft: Draft,
    requests: Sequence[Request],
    end: int,
    batch: int,
    tokens: int,
) -> list[Answer]:
    """The answers of eqspec or exspec."""
    decoder = Decoder(model, captured=False)
    rows = [
        rows_of(
            number, request, tokenizer=None, ends=[end], vocabulary=VOCABULARY, context=CONTEXT
        )[0]
        for number, request in enumerate(requests)
    ]
    answers = [Answer(request) for request in requests]
    schedule = Schedule(batch=batch, window=WINDOW * batch)
    with _recorded() as logits:
        events: Iterator[Event] = (
            eqspec(decoder, draft, rows, tokens, batch=batch)
            if method == "eqspec"
            else exspec(decoder, draft, rows, tokens, schedule=schedule)
        )
        for event in events:
            answer = answers[event.request]
            answer.tokens += event.tokens
            answer.accepted += event.accepted
            answer.finish, answer.message = event.finish, event.message
    for answer, row in zip(answers, rows, strict=True):
        answer.logits = logits[id(row.chooser)][: len(answer.tokens)]
    return answers


@contextmanager
def _recorded() -> Iterator[dict[int, list[Tensor]]]:
    """The logits that tokens were chosen from, by the row's chooser; those behind its end too."""
    kept: dict[int, list[Tensor]] = defaultdict(list)

    def recording(choosers: Any, logits: Tensor, first: Sequence[int], proposals: Any) -> Any:
        verdicts = verify(choosers, logits, first, proposals)
        for chooser, lines, start, verdict in zip(choosers, logits, first, verdicts, strict=True):
            kept[id(chooser)] += list(lines[start : start + len(verdict.tokens)])
        return verdicts

    eqspec_module.verify = recording
    try:
        yield kept
    finally:
        eqspec_module.verify = verify


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
