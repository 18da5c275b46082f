"""Caches that do not fit are refused before they are made."""

from types import SimpleNamespace
from typing import Any

import pytest

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation.build import engine_of
from llmnorm.generation.engine import Engine
from llmnorm.generation.model_draft import ModelDraft
from llmnorm.models.decoding import Decoder
from llmnorm.part import InputError
from tests.generation.watched import model_of


@pytest.mark.parametrize("name", ["softmax", "window", "nala"])
def test_a_cache_that_does_not_fit_is_refused_with_what_would(name: str) -> None:
    """Oracle: each of the cures is accepted, and takes no more than it may."""
    step = Decoder(model_of(name), captured=False)
    whole = Engine(step, None, GenerationSettings(slots=7, context=512)).bytes
    allowed = 0.6 * whole / 2**30
    with pytest.raises(InputError, match="7 slots of 512 tokens need") as caught:
        Engine(step, None, GenerationSettings(slots=7, context=512, cache_memory=allowed))
    cures = dict(
        word.removeprefix("generation.").split("=")
        for word in str(caught.value).split()
        if "=" in word
    )
    # Of states a shorter row needs no less.
    assert set(cures) == ({"slots"} if name == "nala" else {"slots", "context"})
    for key, value in cures.items():
        keys = {"slots": 7, "context": 512, "cache_memory": allowed, key: int(value)}
        assert 0 < Engine(step, None, GenerationSettings(**keys)).bytes <= 0.6 * whole
    with pytest.raises(InputError, match="not even one row would fit"):
        Engine(step, None, GenerationSettings(slots=1, context=64, cache_memory=1e-9))


def test_a_draft_counts() -> None:
    """Oracle: the bytes of both caches are just enough; the cure is accepted with one byte less,
    and what the target needs alone is too little."""
    tokenizer: Any = SimpleNamespace(get_vocab=dict)
    model, draft = model_of("softmax"), model_of("window")

    def built(slots: int, allowed: int | None) -> int:
        memory = None if allowed is None else allowed / 2**30
        keys = {"context": 512, "draft": "small", "draft_tokens": 2, "cache_memory": memory}
        settings = GenerationSettings(slots=slots, **keys)
        made = engine_of(model, tokenizer, settings, (), draft=(draft, tokenizer)).engine
        assert isinstance(made, Engine)
        return made.bytes

    of_target = built(7, None)
    both = of_target + ModelDraft(Decoder(draft), 7, context=512).bytes
    built(7, both)
    with pytest.raises(InputError, match="with the draft's, .* generation.slots=6 "):
        built(7, both - 1)
    built(6, both - 1)
    with pytest.raises(InputError, match="with the draft's"):
        built(7, of_target)
