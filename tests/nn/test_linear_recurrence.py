"""The chunked engine against the recurrence one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmnorm.nn.mixers import linear_recurrence as engine
from llmnorm.nn.mixers.linear_recurrence import flops_per_token, linear_recurrence
from tests.nn.recurrences import token_by_token

# Heads of queries, keys and values: plain, grouped queries, groups of values, one group.
HEADS = [(4, 4, 4), (4, 2, 2), (2, 2, 6), (3, 1, 1)]


def case(
    length: int, heads: tuple[int, int, int], decay: float, seed: int = 0
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(heads[0], 5), draw(heads[1], 5), draw(heads[2], 3)
    g = -decay * draw(heads[2]).abs() if decay else None
    return {"q": q, "k": k, "v": v, "log_decay": g}


@settings(max_examples=120, deadline=None)
@given(
    length=st.sampled_from([1, 2, 7, 63, 64, 65, 127, 200]),
    chunk=st.sampled_from([1, 3, 16, 64, 256]),
    heads=st.sampled_from(HEADS),
    decay=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
    documents=st.sampled_from([0.0, 0.02, 0.3]),
    began=st.booleans(),
    seed=st.integers(0, 5),
)
def test_chunks_are_the_recurrence(
    length: int,
    chunk: int,
    heads: tuple[int, int, int],
    decay: float,
    documents: float,
    began: bool,
    seed: int,
) -> None:
    """Oracle: the recurrence token by token in float64, to 1e-11 of the largest output."""
    tensors = case(length, heads, decay, seed)
    segments = None
    if documents:
        segments = (torch.rand(2, length) < documents).long().cumsum(1)
    state = torch.randn(2, heads[2], 5, 3, dtype=torch.float64) * began
    got = linear_recurrence(
        **tensors, segments=segments, state=state if began else None, chunk=chunk
    )
    for one, other in zip(got, token_by_token(*tensors.values(), segments, state), strict=True):
        assert (one - other).abs().max() <= 1e-11 * max(1e-300, other.abs().max())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_blocks_are_one_block(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: all chunks in one block, outputs and gradients; documents and a state across."""
    tensors = case(67, (4, 2, 2), decay)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    leaves.append(torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True))
    segments = (torch.arange(67) > 40).long().expand(2, 67)
    found = []
    for blocks in (1, 2, 32):
        monkeypatch.setattr(engine, "BLOCK", blocks)
        y, after = linear_recurrence(**tensors, segments=segments, state=leaves[-1], chunk=8)
        loss = y.square().sum() + after.sum()
        found.append([y, after, *torch.autograd.grad(loss, leaves)])
    for other in found[:-1]:
        for one, whole in zip(other, found[-1], strict=True):
            torch.testing.assert_close(one, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_gradients(heads: tuple[int, int, int], decay: float) -> None:
    """Oracle: finite differences, of both results with respect to everything."""
    leaves = [
        t[:, :7].detach().requires_grad_() for t in case(9, heads, decay).values() if t is not None
    ]
    state = torch.randn(2, heads[2], 5, 3, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1]])

    def run(state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return linear_recurrence(*inputs, segments=segments, state=state, chunk=3)

    assert torch.autograd.gradcheck(run, (state, *leaves), fast_mode=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, 100.0])
def test_another_document_moves_no_bit(decay: float) -> None:
    """Oracle: equal bits, of outputs and gradients, when every other document changes."""
    torch.manual_seed(0)
    segments = torch.tensor([0] * 10 + [1] + [2] * 22 + [3] * 7).expand(2, 40)
    inside = segments[0] == 2
    tensors = [t for t in case(40, (4, 2, 2), decay).values() if t is not None]
    found = []
    for seed in (1, 2):
        noise = [t for t in case(40, (4, 2, 2), 3.0, seed).values() if t is not None]
        leaves = [
            torch.where(inside.view(-1, *[1] * (t.ndim - 2)), t, 9 * n).requires_grad_()
            for t, n in zip(tensors, noise, strict=False)
        ]
        y, _ = linear_recurrence(*leaves, segments=segments, chunk=16)
        grads = torch.autograd.grad(y[:, inside].square().sum(), leaves)
        for grad in grads:
            assert not grad[:, ~inside].any()
        found.append([y[:, inside], *(g[:, inside] for g in grads)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_strong_decay_in_float32() -> None:
    """Oracle: float64; a difference of running sums would lose 1e-5 and more."""
    tensors = {k: v for k, v in case(256, (2, 2, 2), 10.0).items() if v is not None}
    y, state = linear_recurrence(**tensors)
    narrow, narrow_state = linear_recurrence(**{k: v.float() for k, v in tensors.items()})
    assert narrow.dtype == torch.float32
    assert (narrow - y).abs().max() < 2e-6 * y.abs().max()
    assert (narrow_state - state).abs().max() < 2e-6 * state.abs().max()


@pytest.mark.parametrize("heads", HEADS)
def test_operations_are_as_promised_and_linear_in_length(heads: tuple[int, int, int]) -> None:
    """Oracle: torch's counter of the products run; twice the length, twice the work."""
    counts = []
    for length in (512, 1024, 2048):
        tensors = case(length, heads, 0.0)
        with FlopCounterMode(display=False) as counter:
            linear_recurrence(**tensors)
        counts.append(counter.get_total_flops() / 2)
        assert counts[-1] / length == flops_per_token(heads, 5, 3)
    assert counts[2] / counts[1] == counts[1] / counts[0] == 2
