"""What a model in training makes of prompts: by the engine, and by `generate` over processes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from llmnorm.generation.continuations import continuations
from llmnorm.generation.contract import Request, Sampling
from llmnorm.part import InputError
from tests.generation.test_text import TOKENIZERS
from tests.models.cache_rounds import build

BYTES = TOKENIZERS["byte level"]
PROMPTS = [(5, 6, 7, 8), (9,), (4, 4, 20)]
KINDS = {
    "greedy": Sampling(temperature=0, max_tokens=12),
    "seeded": Sampling(temperature=0.9, top_k=9, top_p=0.9, seed=3, max_tokens=12),
    "penalties": Sampling(
        temperature=1.2, seed=4, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=12
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    """A real group of one process, which `generate` asks whether all have ended."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_choose_the_same_tokens(kind: str) -> None:
    """Oracle: each other, by two libraries' loops, in float64; an end token that ends one row."""
    model = build("softmax")
    requests = [Request(prompt, KINDS[kind]) for prompt in PROMPTS]
    free = continuations(model, BYTES, requests, ends=())
    assert [len(ids) for ids in free] == [12] * 3
    end = next(token for n, token in enumerate(free[0]) if n > 2 and token not in free[0][:n])
    found = continuations(model, BYTES, requests, ends=[end])
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert found == cut and len(cut[0]) < 12
    assert continuations(model, BYTES, requests, ends=[end], together=True) == cut


def test_a_text_is_not_longer_than_the_context() -> None:
    """Oracle: the context; a row may have one token more, which is not run."""
    model = build("softmax")
    model.config.max_position_embeddings = 20
    request = Request(tuple(range(4, 18)), Sampling(temperature=0, max_tokens=50))
    for together in (False, True):
        (found,) = continuations(model, BYTES, [request], ends=(), together=together)
        assert len(found) == 20 - 14 + 1


@pytest.mark.parametrize("together", [False, True])
def test_logits_that_are_not_finite_are_told(together: bool) -> None:
    """Oracle: the message; no token is made up."""
    model = build("softmax")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    request = Request(PROMPTS[0], Sampling(temperature=0.5))
    with pytest.raises(InputError, match="not finite"):
        continuations(model, BYTES, [request], ends=(), together=together)
