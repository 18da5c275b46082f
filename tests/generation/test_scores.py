"""Log-probabilities of a prompt's tokens, in pieces of the prefill, and requests that ask for them
alone."""

import pytest
import torch

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.contract import Event, Request, Sampling
from llmnorm.generation.engine import Engine
from llmnorm.models.decoding import Decoder
from llmnorm.part import InputError
from tests.generation.watched import CONTEXT, model_of, prompts

ALONE = Sampling(temperature=0, max_tokens=0, prompt_logprobs=2)


def engine_of(name: str, slots: int = 2) -> Engine:
    settings = GenerationSettings(slots=slots, context=CONTEXT, prefill_chunk=7)
    return Engine(Decoder(model_of(name), captured=False), None, settings)


@pytest.mark.parametrize("name", ["softmax", "softmax before nala"])
def test_a_prompts_scores_are_a_full_passs(name: str) -> None:
    """Oracle: log_softmax of one pass without a cache, in float64; rows that have finished and
    begin alike save nothing, and of two rows one tells it."""
    engine = engine_of(name)
    (start,) = prompts(1, CONTEXT - 20, seed=3)
    start = (start * 9)[: CONTEXT - 20]
    asked = [
        Request(tuple(start), Sampling(temperature=0, max_tokens=3)),
        Request(tuple(start), Sampling(temperature=0, max_tokens=3, prompt_logprobs=1), n=2),
        Request(tuple(start), ALONE),
        Request(tuple(start[:1]), ALONE),
        Request(tuple(start[:2]), ALONE),
    ]
    with torch.no_grad():
        laws = model_of(name)(torch.tensor([start])).logits[0].log_softmax(-1)
    wanted = [float(laws[i, token]) for i, token in enumerate(start[1:])]
    events: list[Event] = []
    for request in asked:  # one after the other, so that rows could be taken over
        events += engine.generate([request])
        told = [event for event in events if event.prompt is not None]
        events = []
        if request.sampling.prompt_logprobs is None:
            assert not told
            continue
        (event,) = told
        assert event.row == 0 and event.prompt is not None
        numbers = [chosen.logprob for chosen in event.prompt]
        assert numbers == pytest.approx(wanted[: len(request.prompt) - 1], abs=1e-10)
        for i, chosen in enumerate(event.prompt):
            tokens = laws[i].topk(request.sampling.prompt_logprobs).indices.tolist()
            assert [token for token, _ in chosen.top] == tokens
        if request.sampling is ALONE:
            assert (event.finish, event.tokens, event.cached) == ("length", [], 0)
    assert engine.idle and engine.running == 0 and engine.usage == 0


def test_a_request_is_checked_without_being_added() -> None:
    """Oracle: what `add` raises; the engine stays idle. Who waits for a slot is known."""
    engine = engine_of("softmax", slots=1)
    for wrong in (Request(()), Request((1,), Sampling(max_tokens=0)), Request((10**6,))):
        with pytest.raises(InputError) as told:
            engine.check(wrong)
        with pytest.raises(InputError) as added:
            engine.add(wrong)
        assert str(told.value) == str(added.value)
    engine.check(Request((1, 2)))
    assert engine.idle
    first, second = engine.add(Request((1, 2))), engine.add(Request((3, 4)))
    assert engine.queued == {first, second}
    engine.step()
    assert engine.queued == {second} and engine.usage == pytest.approx(2 / CONTEXT)
