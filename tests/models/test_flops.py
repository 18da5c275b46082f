"""Operations of a token by kind."""

import pytest

from llmnorm.models import LlmNormConfig
from llmnorm.models.flops import flops_by_kind, flops_per_token

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("mixer", "attention", "recurrences"),
    [("softmax", 4, 0), ("ssd", 0, 4), (["softmax", "ssd"], 2, 2)],
    ids=str,
)
def test_kinds(mixer: str | list[str], attention: int, recurrences: int) -> None:
    """Oracle: 3 * 4 * width * context of a layer of attention; what is left of the sum."""
    config = LlmNormConfig(**SHAPE, mixer=mixer)
    found = flops_by_kind(config, 64)
    assert found.attention == attention * 3 * 4 * 32 * 64
    assert bool(found.recurrences) == bool(recurrences)
    assert sum(found) == flops_per_token(config, 64)
    longer = flops_by_kind(config, 128)
    assert longer.recurrences == found.recurrences
    assert longer.products == found.products
