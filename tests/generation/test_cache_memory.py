"""A cache that does not fit is refused before it is made."""

import pytest

from llmnorm.config.tree import GenerationSettings
from llmnorm.generation.engine import Engine
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
