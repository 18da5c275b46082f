"""Stock decoders in the engine: speculation, rows that come and go, rows that are taken over."""

import random

import pytest

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Request, Sampling
from llmnorm.generation.engine import Engine
from llmnorm.models.foreign_decoding import ForeignStep
from tests.generation.stacked import Guesses, target
from tests.generation.test_eqspec import prompts


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_the_engine_continues_prompts_with_a_stock_decoder(name: str) -> None:
    """Oracle: greedy decoding by full passes of the class itself, in float64.

    Prompts in pieces, drafts that are mostly right, an end token, more requests than slots, two
    rows of a request, and prompts that go on where a finished row has ended.
    """
    of, chance = target(f"{name}, foreign"), random.Random(1)
    first = prompts(7, 30, seed=2)
    texts = of.continued(first, 20)
    ends = [texts[0][-4]]
    asked = [*first, *([*text[:-8], 5] for text in texts[:3])]
    texts += of.continued(asked[7:], 12)
    draft = Guesses(texts, lambda: chance.random() < 0.8, slots=3)
    settings = GenerationSettings(slots=3, context=96, draft_tokens=4, prefill_chunk=8)
    engine = Engine(ForeignStep(of.model), None, settings, draft, ends=ends)
    own = Sampling(temperature=0, max_tokens=12)
    requests = [Request(tuple(prompt), own, n=1 + (n == 2)) for n, prompt in enumerate(asked)]
    found: dict[tuple[int, int], list[int]] = {}
    for event in engine.generate(requests):
        found.setdefault((event.request, event.row), []).extend(event.tokens)
    for (number, _), tokens in found.items():
        answer = texts[number][len(asked[number]) :][:12]
        end = next((n for n, token in enumerate(answer) if token in ends), len(answer))
        assert tokens == answer[: end + 1]
    assert len(found) == 11 and engine.counters.cached_tokens > 16
    assert sum(engine.counters.accepted) > sum(engine.counters.drafted) // 2 > 10
