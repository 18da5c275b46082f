"""A seeded request has one text: alone, among others, on a reused row, with and without drafts."""

from typing import Any

import pytest
import torch

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Draft, Request, Sampling
from llmnorm.generation.draft import Lookup
from llmnorm.generation.engine import Engine
from llmnorm.generation.model_draft import ModelDraft
from llmnorm.models.decoding import Decoder
from tests.models.cache_rounds import VOCABULARY, build

CONTEXT, ROWS = 64, 16
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 1},
    {"temperature": 1.4, "top_k": 12, "presence_penalty": 0.6, "min_tokens": 5},
    {"temperature": 0.7, "min_p": 0.02, "logit_bias": {3: 2.0}, "frequency_penalty": 0.5},
]


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(VOCABULARY, (ROWS, 30), generator=generator).tolist()
    return [
        Request(
            tuple(text[: 1 + (5 * number) % 29]),
            Sampling(max_tokens=16, seed=40 + number, **KINDS[number % len(KINDS)]),
        )
        for number, text in enumerate(texts)
    ]


def ran(step: Decoder, draft: Draft | None, given: list[Request], slots: int) -> list[list[int]]:
    """Each request's tokens."""
    settings = GenerationSettings(
        slots=slots,
        context=CONTEXT,
        draft_tokens=4,
        draft="none" if draft is None else "lookup",
        prefill_chunk=7,
    )
    engine = Engine(step, None, settings, draft, ends=[9])
    found: dict[int, list[int]] = {engine.add(request): [] for request in given}
    while not engine.idle:
        for event in engine.step():
            assert event.message is None
            found[event.request] += event.tokens
    if slots == 1 and len(given) > 1:
        assert engine.counters.cached_tokens > 0, "no row was reused"
    return list(found.values())


@pytest.mark.parametrize("name", ["softmax", "softmax before nala"])
def test_a_seeded_text_is_the_same_in_any_company(name: str) -> None:
    """Oracle: each request alone, without a draft; float64, so that no rounding moves a token."""
    model = build(name)
    step, given = Decoder(model, captured=False), requests()
    want = [ran(step, None, [request], 1)[0] for request in given]
    assert len({tuple(text) for text in want}) == ROWS
    other = build(name)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, dtype=weight.dtype)
    small = Decoder(other, captured=False)
    for draft in (None, Lookup(), ModelDraft(small, ROWS, context=CONTEXT)):
        assert ran(step, draft, given, ROWS) == want
    # One slot: each goes on in the row of the one before, which began as it does.
    number = max(range(0, ROWS, len(KINDS)), key=lambda row: len(want[row]))
    first, text = given[number], want[number]
    counts = [count for count in (12, 7, 3) if count < len(text)]
    longer = [Request((*first.prompt, *text[:count]), first.sampling) for count in counts]
    assert len(longer) > 1
    again = ran(step, Lookup(), longer, 1)
    assert again == [ran(step, None, [request], 1)[0] for request in longer]
    for count, found in zip(counts, again, strict=True):
        # Noise is by the position in the text, and this request has no penalties.
        assert found[: len(text) - count] == text[count:]
