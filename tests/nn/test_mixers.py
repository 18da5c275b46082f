"""The mixer contract, one body for every mixer and every kind of context."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.mixers.contract import (
    Context,
    Mixer,
    document_lengths,
    document_mask,
    padding_mask,
)
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.settings import ModelSettings

BATCH, LENGTH = 3, 11
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "softmax qk_norm": {"name": "softmax", "qk_norm": True},
    "softmax qkv bias": {"name": "softmax", "attention_bias": "qkv"},
    "softmax bias": {"name": "softmax", "attention_bias": True},
}
PACKED = torch.tensor(
    [
        [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5],
        list(range(11)),
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
    ]
)


def settings(mixer: dict[str, Any], kv_heads: int = 2) -> ModelSettings:
    return ModelSettings.model_validate(
        {
            "hidden_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 6,
            "num_hidden_layers": 1,
            "mixer": mixer,
        }
    )


@pytest.fixture(params=MIXERS.values(), ids=MIXERS)
def model(request: pytest.FixtureRequest) -> ModelSettings:
    return settings(request.param)


def build(model: ModelSettings) -> Mixer:
    torch.manual_seed(0)
    mixer = model.mixers()[0].build(model, 0).double()
    for parameter in mixer.parameters():
        parameter.data.normal_(std=0.5)
    return mixer


def tables(model: ModelSettings, positions: Tensor) -> tuple[Tensor, Tensor]:
    return Rotary(model.rope_parameters, model.head_dim, 2048)(positions, torch.float64)


def contexts(model: ModelSettings) -> Iterator[Context]:
    yield Context(*tables(model, torch.arange(LENGTH).unsqueeze(0)))
    documents = document_lengths(PACKED)
    assert documents is not None
    yield Context(*tables(model, PACKED), documents=documents)
    yield Context(*tables(model, PACKED), document_mask(documents, BATCH, torch.device("cpu")))
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[1, :4] = False
    yield Context(*tables(model, (real.cumsum(1) - 1).clamp(min=0)), padding_mask(real))


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, LENGTH, 20, dtype=torch.float64, generator=generator)


def test_mix_is_the_matrix_times_the_values(model: ModelSettings) -> None:
    """Oracle: the materialised matrix, for plain, packed (loop and mask) and padded rows."""
    mixer, x = build(model), inputs()
    for context in contexts(model):
        p = mixer.prepare(x, context)
        matrix = mixer.materialize(p, context)
        assert matrix.shape == (BATCH, 4, LENGTH, LENGTH)
        values = p.v.repeat_interleave(4 // p.v.shape[2], dim=2)
        expected = torch.einsum("bhij,bjhv->bihv", matrix, values)
        torch.testing.assert_close(mixer.mix(p, context), expected, rtol=0, atol=1e-13)
        expected = mixer.finish(expected, x, p)
        torch.testing.assert_close(mixer(x, context), expected, rtol=0, atol=1e-12)


def test_later_tokens_and_other_documents_weigh_nothing(model: ModelSettings) -> None:
    """Oracle: entries of the matrix that must be exactly zero, counted by hand per pair."""
    mixer, x = build(model), inputs()
    number = (PACKED == 0).cumsum(1)
    for context in contexts(model):
        matrix = mixer.materialize(mixer.prepare(x, context), context)
        for i in range(LENGTH):
            assert not matrix[:, :, i, i + 1 :].any()
        packed = context.documents is not None
        for row, i, j in [(0, 4, 3), (0, 5, 4), (0, 10, 2), (2, 10, 9)] if packed else []:
            assert number[row, i] != number[row, j]
            assert not matrix[row, :, i, j].any()


@pytest.mark.parametrize("by_mask", [False, True])
def test_documents_never_see_each_other(model: ModelSettings, by_mask: bool) -> None:
    """Oracle: exact zeros in the gradient, and outputs equal to the bit when the other changes."""
    mixer, x = build(model), inputs().requires_grad_()
    documents = document_lengths(PACKED)
    assert documents is not None
    context = Context(*tables(model, PACKED), documents=documents)
    if by_mask:
        mask = document_mask(documents, BATCH, torch.device("cpu"))
        context = Context(context.cos, context.sin, mask)
    out = mixer(x, context)
    (grad,) = torch.autograd.grad(out[0, 5:].square().sum(), x)
    assert grad[0, 5:].abs().min() > 0
    assert not grad[0, :5].any() and not grad[1:].any()
    changed = x.detach().clone()
    changed[0, :5] = 7.0
    assert torch.equal(mixer(changed, context)[0, 5:], out[0, 5:])
    assert not torch.equal(mixer(changed, context)[0, :5], out[0, :5])


def test_packed_documents_are_the_documents_alone(model: ModelSettings) -> None:
    """Oracle: each document in a call of its own, positions from 0."""
    mixer, x = build(model), inputs()
    documents = document_lengths(PACKED)
    assert documents is not None
    out = mixer(x, Context(*tables(model, PACKED), documents=documents)).flatten(0, 1)
    for part, whole in zip(x.flatten(0, 1).split(documents), out.split(documents), strict=True):
        context = Context(*tables(model, torch.arange(len(part)).unsqueeze(0)))
        alone = mixer(part.unsqueeze(0), context).squeeze(0)
        torch.testing.assert_close(whole, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cuts", [[LENGTH], [1] * LENGTH, [4, 1, 1, 5], [3, 8]])
def test_any_cut_through_the_cache_is_one_pass(model: ModelSettings, cuts: list[int]) -> None:
    """Oracle: the pass without a cache, in float64."""
    mixer, x, cache = build(model), inputs(), RaggedCache(1)
    outs = []
    with torch.no_grad():
        for part in x.split(cuts, 1):
            places = cache.places(BATCH, part.shape[1], x.device)
            context = Context(
                *tables(model, places.index),
                mask=places.mask(),
                causal=places.causal,
                places=places,
            )
            outs.append(mixer(part, context, cache.layers[0]))
        whole = mixer(x, Context(*tables(model, torch.arange(LENGTH).unsqueeze(0))))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_share_keys(kv_heads: int) -> None:
    """Oracle: full heads whose key and value weights are the shared ones, repeated."""
    grouped, full = build(settings(MIXERS["softmax"], kv_heads)), build(settings({}, 4))
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].view(kv_heads, 6, 20)
        state[name] = heads.repeat_interleave(4 // kv_heads, 0).reshape(24, 20)
    full.load_state_dict(state)
    x = inputs()
    context = Context(*tables(settings({}), torch.arange(LENGTH).unsqueeze(0)))
    torch.testing.assert_close(grouped(x, context), full(x, context), rtol=0, atol=1e-12)


def test_document_lengths() -> None:
    """Oracle: by hand; a row without a restart is one document, whatever it starts at."""
    assert document_lengths(torch.tensor([[0, 1, 0], [5, 6, 7]])) == (2, 1, 3)
    assert document_lengths(torch.tensor([[0, 1, 2], [5, 6, 7]])) is None
    assert document_lengths(torch.tensor([[0, 0, 0]])) == (1, 1, 1)
    positions = torch.tensor([[3, 4, 0]])
    assert document_lengths(positions) == (2, 1)
    assert positions.tolist() == [[3, 4, 0]]


def test_padding_on_the_right_needs_no_mask() -> None:
    """Oracle: by hand."""
    assert padding_mask(torch.tensor([[True, True, False], [True, True, True]])) is None
    mask = padding_mask(torch.tensor([[False, True, True]]))
    assert mask is not None
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
