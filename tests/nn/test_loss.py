"""Chunked linear cross-entropy against logits and F.cross_entropy."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.analysis.plan.storages import Storages
from llmnorm.nn import linear
from llmnorm.nn import loss as loss_module
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import NewRows, chunk_size, linear_cross_entropy, token_gradients, token_losses


def data(tokens: int, width: int, vocabulary: int, ignored: float = 0.3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def full(hidden: Tensor, weight: Tensor, labels: Tensor, items: float) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum") / items


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Nothing is compiled, so that this needs no C++ compiler and no minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 37),
    chunk=st.integers(1, 41),
    items=st.sampled_from([None, 1.0, 13.0, 0.37]),
    compiled=st.booleans(),
)
def test_loss_and_gradients_are_those_of_the_full_logits(
    eager: None,
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
    items: float | None,
    compiled: bool,
) -> None:
    """Oracle: F.cross_entropy on full logits in float64, gradients included; also of what a
    compiler would be given."""
    hidden, weight, labels = data(tokens, width, vocabulary)
    divisor = max(int((labels != -100).sum()), 1) if items is None else items
    got = linear_cross_entropy(hidden, weight, labels, items, chunk=chunk, compiled=compiled)
    expected = full(hidden, weight, labels, divisor)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = (hidden, weight)
    for one, other in zip(
        torch.autograd.grad(3 * got, inputs),
        torch.autograd.grad(3 * expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradcheck_with_frozen_inputs(wanted: tuple[bool, bool]) -> None:
    """Oracle: finite differences; a frozen input gets no gradient and none is computed."""
    hidden, weight, labels = data(7, 3, 5)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk=3), (hidden, weight)
    )
    linear_cross_entropy(hidden, weight, labels).backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted


@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 37),
    chunk=st.integers(1, 41),
    scale=st.sampled_from([1.0, 0.37]),
    compiled=st.booleans(),
    drawn=st.data(),
)
def test_rows_in_the_place_of_others(
    eager: None,
    tokens: int,
    vocabulary: int,
    chunk: int,
    scale: float,
    compiled: bool,
    drawn: st.DataObject,
) -> None:
    """Oracle: full logits in float64 of a weight that is put together; the weight's own rows there
    are large, and count for nothing."""
    first = drawn.draw(st.integers(0, vocabulary - 1))
    count = drawn.draw(st.integers(1, vocabulary - first))
    hidden, weight, labels = data(tokens, 5, vocabulary)
    divisor = max(int((labels != -100).sum()), 1)
    (full(hidden, weight, labels, divisor) * scale).backward()
    expected = full(hidden, weight, labels, divisor).detach()
    assert weight.grad is not None and hidden.grad is not None
    rows = weight.detach()[first : first + count].clone().requires_grad_()
    frozen, again = weight.detach().clone(), hidden.detach().clone().requires_grad_()
    frozen[first : first + count] = 1e3
    got = linear_cross_entropy(
        again, frozen, labels, new_rows=NewRows(first, rows), chunk=chunk, compiled=compiled
    )
    (got * scale).backward()
    torch.testing.assert_close(got.detach(), expected)
    torch.testing.assert_close(rows.grad, weight.grad[first : first + count])
    torch.testing.assert_close(again.grad, hidden.grad)


def test_labels_all_ignored() -> None:
    """Oracle: a loss of exactly 0 with zero gradients, no nan."""
    hidden, weight, labels = data(5, 3, 4, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_certain_and_hopeless_labels_stay_finite() -> None:
    """Oracle: full logits; a probability of exp(-2000) underflows, its logarithm must not."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    labels = torch.tensor([1, 1])
    got = linear_cross_entropy(hidden, weight, labels, 1.0)
    torch.testing.assert_close(got, full(hidden, weight, labels, 1.0))
    assert got.item() == 2000.0


def test_items_may_be_a_tensor_and_scale_the_gradient() -> None:
    """Oracle: two micro batches divided by their common count add up to the whole batch."""
    hidden, weight, labels = data(20, 4, 11)
    items = (labels != -100).sum()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    parts = sum(
        linear_cross_entropy(hidden[cut], weight, labels[cut], items)
        for cut in (slice(0, 13), slice(13, 20))
    )
    assert isinstance(parts, Tensor)
    for one, other in zip(torch.autograd.grad(parts, (hidden, weight)), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_bf16_autocast_keeps_float32_where_it_matters() -> None:
    """Oracle: float32 gradients; the sum over 64 chunks must not lose what bf16 would lose."""
    hidden, weight, labels = (t.float() if t.is_floating_point() else t for t in data(512, 16, 50))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, chunk=8)
    assert got.dtype == torch.float32
    got.backward()
    expected = full(hidden, weight, labels, int((labels != -100).sum()))
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    assert abs(got.item() - expected.item()) < 2e-2 * expected.item()
    for one, other in zip((hidden.grad, weight.grad), expected_grads, strict=True):
        assert one is not None and one.dtype == torch.float32
        assert (one - other).norm() < 2e-2 * other.norm()


def test_bf16_weights() -> None:
    """Oracle: gradients come back in the weights' dtype, near the float32 ones."""
    hidden, weight, labels = (
        t.detach().bfloat16() if t.is_floating_point() else t for t in data(64, 16, 50)
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).backward()
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(
        full(wide[0], wide[1], labels, int((labels != -100).sum())), wide
    )
    for one, other in zip((hidden.grad, weight.grad), expected, strict=True):
        assert one is not None and one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 2e-2 * other.norm()


def test_without_gradients_only_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the value of the full logits; no tensor of the weight's shape is made."""
    hidden, weight, labels = data(40, 5, 11)
    made = []
    zeros = Tensor.new_zeros
    monkeypatch.setattr(Tensor, "new_zeros", lambda t, *s, **k: made.append(s) or zeros(t, *s, **k))
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels)
    assert not got.requires_grad and not made
    linear_cross_entropy(hidden, weight, labels)
    assert len(made) == 1, "what is looked for above is there with gradients"
    torch.testing.assert_close(got, full(hidden, weight, labels, int((labels != -100).sum())))


def test_full_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the largest chunk of logits seen, for more tokens than a chunk has."""
    hidden, weight, labels = data(1000, 3, 8192)
    seen = []
    logits = loss_module._logits
    monkeypatch.setattr(
        loss_module, "_logits", lambda h, *more: seen.append(len(h)) or logits(h, *more)
    )
    linear_cross_entropy(hidden, weight, labels).backward()
    assert max(seen) == chunk_size(weight) == 512 and sum(seen) == 1000


@pytest.mark.parametrize("kept", [True, False])
def test_the_logits_memory_is_used_again(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Oracle: the loss and gradients with new memory for every chunk, to the bit."""
    hidden, weight, labels = data(1300, 3, 8192)
    seen, leaves = [], [hidden, weight]
    logits = loss_module._logits

    def recorded(*arguments):
        memory, made = arguments[3], logits(*arguments)
        seen.append(memory is not None and memory.data_ptr() == made.data_ptr())
        return made

    monkeypatch.setattr(loss_module, "_logits", recorded)
    monkeypatch.setattr(loss_module, "fills_memory", lambda *_: kept)
    monkeypatch.setattr(linear, "choice", lambda: None)  # oneDNN would not write into the memory
    loss = linear_cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(loss, leaves)
    assert seen == [False, kept, kept]
    monkeypatch.setattr(loss_module, "fills_memory", lambda *_: False)
    other = linear_cross_entropy(hidden, weight, labels)
    assert loss.equal(other)
    for one, expected in zip(gradients, torch.autograd.grad(other, leaves), strict=True):
        assert one.equal(expected)


def test_losses_of_single_tokens() -> None:
    """Oracle: F.cross_entropy with reduction none, which gives 0 for ignored labels."""
    hidden, weight, labels = data(300, 4, 9000)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(token_losses(hidden, weight, labels), expected)


@pytest.mark.parametrize("extra", [False, True])
def test_gradients_of_single_tokens(extra: bool) -> None:
    """Oracle: autograd of each token's loss by its own hidden state, float64; with a bias, and rows
    in the place of some of the weight's."""
    hidden, weight, labels = (t.double() if t.is_floating_point() else t for t in data(90, 4, 31))
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64) if extra else None
    new = NewRows(5, torch.randn(3, 4, dtype=torch.float64)) if extra else None
    whole = weight.clone()
    if new is not None:
        whole[new.place] = new.values
    leaf = hidden.clone().requires_grad_()
    expected = F.cross_entropy(F.linear(leaf, whole, bias), labels, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    losses, found = token_gradients(hidden, weight, labels, bias=bias, new_rows=new)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found, slope, atol=1e-12, rtol=0)
    alone = token_losses(hidden, weight, labels, bias=bias, new_rows=new)
    torch.testing.assert_close(alone, losses)


def test_head_gives_logits_or_loss() -> None:
    """Oracle: nn.Linear, and the function itself."""
    hidden, labels = torch.randn(2, 3, 4), torch.randint(0, 7, (2, 3))
    for head in (LanguageHead(4, 7), LanguageHead(4, 7, bias=True)):
        torch.testing.assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))
        expected = linear_cross_entropy(
            hidden.flatten(0, 1), head.weight, labels.flatten(), 5.0, bias=head.bias
        )
        assert torch.equal(head(hidden, labels, 5.0), expected)


@pytest.mark.parametrize("tokens", [0, 11])
def test_an_offset_is_part_of_the_logits(tokens: int) -> None:
    """Oracle: F.cross_entropy on logits with the offset, float64, gradients; none of 0 tokens."""
    hidden, weight, labels = data(tokens, 3, 5)
    bias = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    inputs = (hidden, weight, bias)
    got = linear_cross_entropy(hidden, weight, labels, 7.0, bias=bias, chunk=4)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, labels, reduction="sum") / 7
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad(3 * loss, inputs) for loss in (got, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_importing_the_loss_does_not_load_the_compiler() -> None:
    """Oracle: sys.modules of a fresh interpreter. The compiler takes a second to import."""
    code = "import sys, llmnorm.nn.loss; sys.exit('torch._inductor' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("function", [token_losses, token_gradients])
def test_the_logits_of_one_chunk_are_there_at_a_time(
    function: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the bytes of a chunk's logits, which are nearly all that a call needs."""
    vocabulary, chunk = 512, 64
    monkeypatch.setattr(loss_module, "chunk_size", lambda weight: chunk)
    hidden, weight = torch.randn(4 * chunk, 8), torch.randn(vocabulary, 8)
    labels = torch.zeros(4 * chunk, dtype=torch.int64)
    storages = Storages()
    with storages:
        function(hidden, weight, labels)
    assert 1 <= storages.peak / (4 * chunk * vocabulary) < 1.5
