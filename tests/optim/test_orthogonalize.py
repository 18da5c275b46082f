"""Newton-Schulz iterations: bounds on singular values, symmetries, padding, the Gram form."""

import pytest
import torch

from llmnorm.machine.processor import Processor
from llmnorm.optim import orthogonalize as module
from llmnorm.optim.muon import Muon
from llmnorm.optim.orthogonalize import (
    ITERATIONS,
    _by_gram,
    multiplies_bf16,
    orthogonalize,
    working_dtype,
)
from tests.optim.rules import draw

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def with_condition(rows: int, columns: int, condition: float) -> torch.Tensor:
    """A matrix of log-spaced singular values from 1 down."""
    k = min(rows, columns)
    left = torch.linalg.qr(draw(rows, k, seed=1)).Q
    right = torch.linalg.qr(draw(columns, k, seed=2)).Q
    return (
        left @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), k).double()) @ right.T
    )


@pytest.mark.parametrize(
    ("coefficients", "highest", "error"),
    [("jordan", 1.25, 0.40), ("quintic", 1.25, 0.04), ("polar_express", 1.15, 0.20)],
)
def test_singular_values_are_near_1(coefficients, highest, error) -> None:
    """Oracle: measured bounds, for Gaussian input (jordan's error falls with the size: .28 at
    256 x 1024) and for ill-conditioned input."""
    for rows, columns in ((96, 384), (384, 96)):
        x = orthogonalize(draw(1, rows, columns), coefficients=coefficients)[0]
        k = min(rows, columns)
        gram = x @ x.T if rows == k else x.T @ x
        assert torch.linalg.norm(gram - torch.eye(k)) / k**0.5 <= error
    for condition in (1e1, 1e3, 1e5):
        matrix = with_condition(48, 96, condition)
        values = torch.linalg.svdvals(matrix)
        after = torch.linalg.svdvals(orthogonalize(matrix[None], coefficients=coefficients)[0])
        assert after.max() <= highest
        if coefficients == "jordan":
            kept = after[: int((values >= 1e-2 * values.norm()).sum())]
            assert kept.min() >= 0.65


@pytest.mark.parametrize(
    ("form", "dtype"), [("standard", d) for d in DTYPES] + [("gram", d) for d in DTYPES[:2]]
)
def test_the_transpose_is_the_transpose(form, dtype) -> None:
    """Oracle: the same bits, in every dtype that the form has."""
    x = draw(3, 12, 40)
    one = orthogonalize(x, form=form, dtype=dtype)
    assert torch.equal(orthogonalize(x.mT, form=form, dtype=dtype), one.mT)


@pytest.mark.parametrize("coefficients", ITERATIONS)
def test_the_gram_form_is_the_same_polynomial(coefficients) -> None:
    """Oracle: the standard form in float64; square matrices do not change at all."""
    for condition, tolerance in ((1e1, 1e-12), (1e5, 1e-7)):
        x = with_condition(24, 60, condition)[None]
        standard = orthogonalize(x, coefficients=coefficients)
        gram = orthogonalize(x, coefficients=coefficients, form="gram")
        assert (gram - standard).norm() <= tolerance * standard.norm()
        single = orthogonalize(x.float(), coefficients=coefficients, form="gram").double()
        # polar_express is twice as steep at 0, where the Gram matrix has lost its digits.
        limit = 2e-3 if coefficients == "polar_express" else 1e-3
        assert (single - standard).norm() <= limit * standard.norm()
    square = draw(1, 20, 20)
    assert torch.equal(orthogonalize(square, form="gram"), orthogonalize(square))


def test_the_gram_form_is_refused_in_bf16_where_it_diverges() -> None:
    """Oracle: singular values of the Gram form in bf16, its guard against that taken away."""
    x = with_condition(64, 256, 1e3)[None].float()
    iteration = ITERATIONS["jordan"]
    narrow = (x / x.norm()).bfloat16()
    assert torch.linalg.svdvals(_by_gram(narrow, iteration).float()).max() > 10
    single = orthogonalize(x, form="gram")
    assert torch.linalg.svdvals(single).max() < 1.25
    for refused in (
        lambda: orthogonalize(x, form="gram", dtype=torch.bfloat16),
        lambda: orthogonalize(x.bfloat16(), form="gram"),
        lambda: working_dtype("bf16", "gram", x),
        lambda: Muon(True, "jordan", "original", "gram", "jordan", "bf16"),
    ):
        with pytest.raises(ValueError, match="the Gram form diverges in bf16"):
            refused()
    assert working_dtype("fp32", "gram", x) == torch.float32


def test_the_guard_is_added_or_the_least_norm() -> None:
    """Oracle: both divisions written out, for norms far above, at and below the guard of 1e-7."""
    (a, b, c), *_ = ITERATIONS["jordan"].steps
    for size in (1.0, 1e-7, 1e-9):
        g = draw(6, 9)
        g *= size / g.norm()
        for guard, norm in (("added", size + 1e-7), ("least", max(size, 1e-7))):
            x = g / norm
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            found = orthogonalize(g[None], guard=guard)[0]
            assert (found - x).abs().max() < 1e-13


def test_zeros_and_null_directions_stay_zero() -> None:
    """Oracle: zero padding changes nothing; a rank-deficient matrix keeps its rank; tiny ones."""
    x = draw(1, 12, 30)
    padded = torch.zeros(2, 15, 33, dtype=torch.float64)
    padded[0, :12, :30] = x[0]
    out = orthogonalize(padded)
    assert (out[0, :12, :30] - orthogonalize(x)[0]).abs().max() < 1e-14
    assert not out[0, 12:].any() and not out[0, :, 30:].any() and not out[1].any()
    low = draw(1, 24, 5) @ draw(1, 5, 40, seed=1)
    values = torch.linalg.svdvals(orthogonalize(low)[0])
    assert values[4] > 0.3 and values[5:].max() < 1e-9
    for size in (1e-8, 1e-30):
        assert orthogonalize((size * x).float()).isfinite().all()


def test_the_dtype_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rule, for a CPU with and without bf16 products."""
    multiplies_bf16.cache_clear()
    large, small = torch.zeros(1, 256, 512), torch.zeros(1, 8, 8)
    for found, expected in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        monkeypatch.setattr(module, "processor", lambda: Processor("AMD", 25, "AVX512"))
        multiplies_bf16.cache_clear()
        assert working_dtype("auto", "standard", large) == expected
        assert working_dtype("auto", "standard", small) == torch.float32
        assert working_dtype("auto", "gram", large) == torch.float32
        assert working_dtype("fp32", "standard", large) == torch.float32
        assert working_dtype("bf16", "standard", small) == torch.bfloat16
        assert working_dtype("auto", "standard", large.double()) == torch.float64
    # A processor with bf16 products that the environment limits to AVX2 does not use them.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(module, "processor", lambda: Processor("AMD", 25, "AVX2"))
    multiplies_bf16.cache_clear()
    assert working_dtype("auto", "standard", large) == torch.float32
    multiplies_bf16.cache_clear()
