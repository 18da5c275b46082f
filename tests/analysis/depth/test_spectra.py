"""Tail exponents, against reference values, invariances and (test_golden) the paper's code."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.analysis.depth.anatomy import anatomy
from llmnorm.analysis.depth.spectra import (
    _starts,
    block_spectra,
    eigenvalues,
    hill,
    spectrum,
    window_eigenvalues,
)
from tests.analysis.depth.tiny import VOCABULARY, ours


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "whole", "pooled"),
    [
        ((256, 256), 2.12, 2.12),
        ((256, 512), 2.75, 2.11),
        ((256, 1024), 3.43, 2.11),
        ((128, 1024), 4.50, 2.12),
        ((683, 256), 2.99, 2.12),
    ],
)
def test_noise_of_any_shape_has_one_exponent(
    shape: tuple[int, int], whole: float, pooled: float
) -> None:
    """Oracle: values of the paper's procedure on Gaussian matrices, windows of 64.

    Of whole matrices the mean of 12: one alone varies by 0.02 to 0.1 (standard deviation).
    """
    whole_alphas = [hill(eigenvalues(gaussian(*shape, seed))) for seed in range(12)]
    assert sum(whole_alphas) / 12 == pytest.approx(whole, abs=0.05)
    assert spectrum(gaussian(*shape), window=64).alpha == pytest.approx(pooled, abs=0.05)


@pytest.mark.parametrize(("freedom", "alpha"), [(2, 1.86), (3, 2.05), (5, 2.11)])
def test_heavy_tails_lower_it(freedom: int, alpha: float) -> None:
    """Oracle: values of the paper's procedure on Student's t of 2, 3 and 5 degrees."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(float(freedom)).sample((256, 256))
    assert spectrum(weight).alpha == pytest.approx(alpha, abs=0.05)


def test_hill_is_the_formula() -> None:
    """Oracle: 1 + n / sum log(e_j / e_i), term by term."""
    values = [0.1, 0.5, 2.0, 3.0, 7.0]
    terms = [math.log(value / 2.0) for value in values[2:]]
    assert hill(torch.tensor(values)) == pytest.approx(1 + 3 / sum(terms), rel=1e-6)
    assert math.isnan(hill(torch.zeros(4))) and math.isnan(hill(torch.ones(4)))


@pytest.mark.parametrize(
    ("length", "side", "ops", "starts"),
    [
        (10, 10, 5, [0]),
        (12, 10, 5, [0, 1, 2]),
        (18, 10, 5, [0, 2, 4, 6, 8]),
        (21, 10, 5, [0, 2, 4, 6, 8]),
        (30, 10, 1, [0]),
        (40, 64, 5, [-24]),
    ],
)
def test_windows_begin_where_the_paper_puts_them(
    length: int, side: int, ops: int, starts: list[int]
) -> None:
    """Oracle: start = i step, step = max(1, (length - side) // (ops - 1)), by hand."""
    assert _starts(length, side, ops) == starts


@pytest.mark.parametrize(
    ("ratio", "columns"), [(0.5, [(0, 5), (7, 12), (14, 19)]), (3.0, [(10, 20)]), (9.0, [(0, 20)])]
)
def test_windows_of_another_ratio(ratio: float, columns: list[tuple[int, int]]) -> None:
    """Oracle: singular values of the slices written out, windows of 10 rows in a matrix of 12."""
    weight = gaussian(12, 20).double()
    found = window_eigenvalues(weight, window=10, ops=3, ratio=ratio)
    slices = [weight[top : top + 10, a:b] for top in (0, 1, 2) for a, b in columns]
    expected = torch.cat([torch.linalg.svdvals(piece).square() for piece in slices]).sort().values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(st.integers(8, 40), st.integers(8, 40), st.floats(1e-3, 1e3))
def test_scale_and_transposition_change_nothing(rows: int, columns: int, scale: float) -> None:
    """Oracle: alpha(c W^T) = alpha(W); norms scale, stable ranks do not."""
    weight = gaussian(rows, columns).double()
    one, other = spectrum(weight, window=16), spectrum(scale * weight.t(), window=16)
    assert other.alpha == pytest.approx(one.alpha, rel=1e-6)
    assert other.spectral_norm == pytest.approx(scale * one.spectral_norm, rel=1e-9)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-9)


def test_the_whole_matrix_is_measured_by_its_singular_values() -> None:
    """Oracle: torch's svdvals."""
    weight = gaussian(20, 33)
    singular = torch.linalg.svdvals(weight.double())
    found = spectrum(weight)
    assert found.spectral_norm == pytest.approx(float(singular[0]))
    assert found.stable_rank == pytest.approx(float(singular.square().sum() / singular[0] ** 2))
    windows = [weight[:20, left : left + 20] for left in (0, 3, 6, 9, 12)]
    pooled = torch.cat([torch.linalg.svdvals(w.double()) ** 2 for w in windows]).sort().values
    torch.testing.assert_close(window_eigenvalues(weight), pooled)


def test_blocks_are_read_matrix_by_matrix() -> None:
    """Oracle: `spectrum` of each; a matrix of zeros has no exponent and is left out of the mean."""
    model = ours(layers=2)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    found = block_spectra(anatomy(model, torch.arange(9)[None] % VOCABULARY), lambda: None)
    matrices = found["matrices"]
    assert len(matrices) == 7 and matrices["mlp.down_proj.weight"]["alpha"][1] is None
    assert matrices["mlp.down_proj.weight"]["spectral_norm"][1] == 0
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert matrices["self_attn.q_proj.weight"]["alpha"][0] == spectrum(weight).alpha
    alphas = [one["alpha"][1] for one in matrices.values() if one["alpha"][1] is not None]
    assert found["alpha"][1] == pytest.approx(sum(alphas) / 6)
