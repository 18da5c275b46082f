"""The script behind the campaign of generation: its names, and that it finds errors."""

import pytest

from llmnorm.generation.slots import Slots
from tests.generation import equality
from tests.generation.watched import WrongTextError
from tests.models.cache_rounds import MODELS
from tools.campaigns import generation

WORDS = ["softmax", "ragged", "sometimes right", "12", "3"]


def test_the_campaign_names_every_model() -> None:
    """Oracle: the table of models of the cache's own campaign."""
    assert list(MODELS) == list(generation.MODELS)
    assert set(equality.SHARES) < set(generation.DRAFTS)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_rows_that_differ_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """Oracle: the same words with the rows of every pass in their order, and exchanged."""
    assert equality.main([*WORDS, precision]) == 0
    assert "12 of 12 rows equal, 0 ties" in capsys.readouterr().out
    feed = Slots.feed
    monkeypatch.setattr(Slots, "feed", lambda slots, blocks: feed(slots, blocks).flip(0))
    with pytest.raises(WrongTextError):
        equality.main([*WORDS, precision])
