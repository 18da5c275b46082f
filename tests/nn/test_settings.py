"""The model's settings: derived defaults, repeated mixers, refusals that name their keys."""

from typing import Any

import pytest
from pydantic import ValidationError

from llmnorm.config.schema import field_docs
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import explain, one_line


def test_derived_sizes_move_along() -> None:
    """Oracle: Llama's rules by hand: head_dim = 96 / 6, 8/3 * 96 = 256 (a multiple of 64)."""
    settings = ModelSettings(hidden_size=96, num_attention_heads=6, initializer_range=0.1)
    assert (settings.head_dim, settings.num_key_value_heads) == (16, 6)
    assert (settings.intermediate_size, settings.embedding_std) == (256, 0.1)
    assert ModelSettings.model_validate({"mlp": "gelu"}).intermediate_size == 4 * 512
    assert not {"head_dim", "intermediate_size"} & settings.model_fields_set


def test_a_list_of_mixers_repeats() -> None:
    """Oracle: layer i has part i modulo the length of the list."""
    settings = ModelSettings.model_validate(
        {"num_hidden_layers": 5, "mixer": ["softmax", {"name": "softmax", "qk_norm": True}]}
    )
    assert [m.qk_norm for m in settings.mixers()] == [False, True, False, True, False]  # type: ignore[attr-defined]


def test_every_field_is_explained() -> None:
    """Oracle: the fields themselves; each needs a docstring below it."""
    assert set(field_docs(ModelSettings)) == set(ModelSettings.model_fields)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 100, "num_attention_heads": 8}, ["hidden_size 100", "head_dim"]),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"head_dim": 15}, ["head_dim 15", "even"]),
        ({"norm": "rmss"}, ["norm", "did you mean 'rms'"]),
        ({"norm": {"name": "rms", "epss": 1}}, ["norm.epss", "did you mean 'eps'"]),
        ({"mixer": "softmaxx"}, ["mixer", "did you mean 'softmax'"]),
        ({"mixer": ["softmax", "x"]}, ["mixer.1"]),
        ({"mixer": ["softmax"] * 3, "num_hidden_layers": 2}, ["num_hidden_layers is 2"]),
        ({"mixer": {"name": "ssd", "head_dim": 48}}, ["head_dim 48", "hidden_size = 1024"]),
        ({"mixer": {"name": "ssd", "n_groups": 3}}, ["n_groups 3", "16 heads"]),
        ({"mixer": ["hydra", "ssd"]}, ["lists 'hydra', which looks at later", "'ssd'"]),
        ({"mixer": {"bidirectional": True, "sliding_window": 4}}, ["sliding_window", "before"]),
        ({"mixer": {"name": "hydra", "conv_kernel": 4}}, ["conv_kernel", "must be odd", "5"]),
        ({"mixer": {"name": "gla", "num_heads": 5}}, ["expand_k * hidden_size", "num_heads 5"]),
        ({"mixer": {"name": "gated_delta", "num_value_heads": 3}}, ["num_key_heads 8"]),
        ({"mixer": {"name": "nala", "lam": 1.5}}, ["mixer", "lam * tau 0.75"]),
        ({"mixer": {"name": "nala", "norm": "none"}}, ["mixer.norm", "valid: rms, layer"]),
        (
            {"mixer": {"name": "nala", "bidirectional": True, "conv_kernel": 4}},
            ["conv_kernel 4 must be odd"],
        ),
        ({"mlp": "relu"}, ["mlp"]),
        ({"hiden_size": 1}, ["hiden_size", "did you mean 'hidden_size'"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"rope_parameters": {"rope_type": "yarm"}}, ["rope_type", "did you mean 'yarn'"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'linear' needs factor"]),
        ({"rope_parameters": {"factor": 2.0}}, ["'default' does not take factor"]),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 8,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            ["short_factor has 1 numbers", "needs 32"],
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(values: dict[str, Any], words: list[str]) -> None:
    """Oracle: the key and the way out, in one line."""
    with pytest.raises(ValidationError) as caught:
        ModelSettings.model_validate(values)
    message = one_line(explain(caught.value, ModelSettings))
    assert "\n" not in message
    for word in words:
        assert word in message
