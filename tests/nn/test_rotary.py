"""Rotary tables and the rotation against transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmnorm.nn.mixers.rotary import Rotary, rotate
from llmnorm.nn.settings import RopeParameters

HEAD_DIM, LIMIT = 16, 128
KINDS = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "factor": 4.0,
        "attention_factor": 1.5,
    },
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rope_type"])
@pytest.mark.parametrize("longest", [5, LIMIT, 300])
def test_float32_tables_are_bit_equal_to_transformers(kind: dict, longest: int) -> None:
    """Oracle: transformers' LlamaRotaryEmbedding on the same positions, within and past limits."""
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=LIMIT,
        rope_parameters={"rope_theta": 10000.0} | kind,
    )
    positions = torch.stack([torch.arange(longest), torch.arange(longest).flip(0)])
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = Rotary(RopeParameters(**kind), HEAD_DIM, LIMIT)(positions, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(torch.cat((one, one), -1).squeeze(2), other)


def test_rotation_is_transformers() -> None:
    """Oracle: apply_rotary_pos_emb in float64."""
    x = torch.randn(2, 7, 3, HEAD_DIM, dtype=torch.float64)
    cos, sin = Rotary(RopeParameters(), HEAD_DIM, LIMIT)(
        torch.arange(7).expand(2, 7), torch.float64
    )
    whole = [torch.cat((t, t), -1).squeeze(2) for t in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), *whole)
    torch.testing.assert_close(rotate(x, cos, sin).transpose(1, 2), expected, rtol=0, atol=1e-15)


@given(shift=st.integers(0, 1000), distance=st.integers(0, 100))
def test_scores_depend_on_distance_alone(shift: int, distance: int) -> None:
    """Oracle: the defining property, q_i . k_j is a function of i - j (float64)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64, generator=generator)
    rotary = Rotary(RopeParameters(), HEAD_DIM, LIMIT)

    def score(i: int, j: int) -> torch.Tensor:
        return (at(q, i) * at(k, j)).sum()

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rotary(torch.tensor([[position]]), torch.float64))

    torch.testing.assert_close(
        score(shift + distance, shift), score(distance, 0), rtol=0, atol=1e-10
    )


def test_bf16_is_rounded_once() -> None:
    """Oracle: the rotation of the same bf16 values in float64, rounded."""
    x = torch.randn(1, 300, 2, HEAD_DIM).bfloat16()
    positions = torch.arange(300).unsqueeze(0)
    rotary = Rotary(RopeParameters(), HEAD_DIM, LIMIT)
    got = rotate(x, *rotary(positions, torch.float32))
    expected = rotate(x.double(), *rotary(positions, torch.float64))
    assert got.dtype == torch.bfloat16
    error = (got.double() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 + 1e-4).all())


def test_dynamic_remembers_nothing() -> None:
    """Oracle: a short call after a long one gives what it gave before."""
    rotary = Rotary(RopeParameters(rope_type="dynamic", factor=2.0), HEAD_DIM, LIMIT)
    short, long = torch.arange(9).unsqueeze(0), torch.arange(2 * LIMIT).unsqueeze(0)
    before = rotary(short, torch.float32)[0]
    assert not torch.equal(rotary(long, torch.float32)[0][:, :9], before)
    assert torch.equal(rotary(short, torch.float32)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_gradients_the_rotation_has_the_bits_of_training(dtype: torch.dtype) -> None:
    """Oracle: the pass that records gradients."""
    x, (cos, sin) = torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 2, 3, 1, 4, dtype=dtype)
    trained = rotate(x.clone().requires_grad_(), cos, sin)
    with torch.no_grad():
        assert torch.equal(rotate(x, cos, sin), trained)
