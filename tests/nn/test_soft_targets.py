"""The loss against a frozen model's distributions, chunk by chunk, against all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.nn.loss import NewRows, linear_cross_entropy
from llmnorm.nn.soft_targets import SoftTargets, against
from tests.nn.test_loss import data


def teacher(tokens: int, width: int, vocabulary: int) -> SoftTargets:
    """Another model of the same tokens and vocabulary."""
    generator = torch.Generator().manual_seed(tokens + 7 * vocabulary)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    return SoftTargets(
        hidden, torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    )


def full(logits: Tensor, soft: SoftTargets, labels: Tensor, items: float) -> Tensor:
    """F.cross_entropy with probabilities as targets, from all logits."""
    targets = F.softmax(soft.hidden @ soft.weight.t(), -1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses[labels != -100].sum() / items


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 37),
    chunk=st.integers(1, 41),
    items=st.sampled_from([None, 13.0, 0.37]),
    bias=st.booleans(),
)
def test_loss_and_gradients_are_those_of_the_full_logits(
    tokens: int, width: int, vocabulary: int, chunk: int, items: float | None, bias: bool
) -> None:
    """Oracle: F.cross_entropy of full logits and the teacher's probabilities in float64."""
    hidden, weight, labels = data(tokens, width, vocabulary)
    soft = teacher(tokens, 5, vocabulary)
    offset = torch.linspace(-1, 1, vocabulary, dtype=torch.float64).requires_grad_()
    divisor = max(int((labels != -100).sum()), 1) if items is None else items
    got = linear_cross_entropy(
        *(hidden, weight, labels, items),
        chunk=chunk,
        bias=offset if bias else None,
        soft_targets=soft,
    )
    logits = hidden @ weight.t() + (offset if bias else 0.0)
    expected = full(logits, soft, labels, divisor)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = (hidden, weight, *([offset] if bias else []))
    for one, other in zip(
        torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, labels, items, chunk=chunk, soft_targets=soft)
    torch.testing.assert_close(
        again, full(hidden @ weight.t(), soft, labels, divisor), rtol=1e-12, atol=1e-12
    )


def test_rows_in_the_place_of_others_are_held_against_them_too() -> None:
    """Oracle: the weight put together, in float64."""
    hidden, weight, labels = data(11, 4, 9)
    soft, rows = teacher(11, 3, 9), torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    whole = torch.cat([weight[:5], rows, weight[7:]])
    expected = torch.autograd.grad(full(hidden @ whole.t(), soft, labels, 2.0), (hidden, rows))
    got = linear_cross_entropy(
        *(hidden, weight.detach(), labels, 2.0),
        new_rows=NewRows(5, rows),
        chunk=4,
        soft_targets=soft,
    )
    for one, other in zip(torch.autograd.grad(got, (hidden, rows)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_label_is_a_distribution_with_all_on_one_token(narrow: bool) -> None:
    """Oracle: the loss against labels, by the code that every run trains with."""
    hidden, weight, labels = data(20, 6, 12, ignored=0.0)
    # A head of 200 on the diagonal: softmax gives 1 to the label, and exp(-200) to the others.
    sharp = F.one_hot(labels, 12).double()
    soft = SoftTargets(sharp, 200 * torch.eye(12, dtype=torch.float64))
    if narrow:
        hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    got, expected = (
        linear_cross_entropy(hidden, weight, labels, chunk=7, soft_targets=s) for s in (soft, None)
    )
    assert got.dtype == expected.dtype == (torch.float32 if narrow else torch.float64)
    within = {"rtol": 1e-6, "atol": 1e-6} if narrow else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, expected, **within)
    pairs = zip(
        torch.autograd.grad(got, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    )
    for one, other in pairs:
        # bf16: gradients of logits are rounded to 8 bits in both.
        within = {"rtol": 2e-2, "atol": 2e-3} if narrow else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(one, other, **within)


def test_the_least_loss_is_the_teacher_s_entropy() -> None:
    """Oracle: the entropy, from the definition; the gradient there is 0."""
    soft = teacher(9, 4, 13)
    logits = soft.hidden @ soft.weight.t()
    probabilities = F.softmax(logits, -1)
    gradient, losses = against(probabilities, logits.clone())
    torch.testing.assert_close(losses, -(probabilities * probabilities.log()).sum(-1))
    assert gradient.abs().max() < 1e-15
