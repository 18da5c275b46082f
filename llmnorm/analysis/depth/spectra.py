"""Weight spectra without the bias of their shape: FARMS.

Source: Hu et al. 2025, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias"
(FARMS); code HUST-AI-HYZ/FARMS, LLM_Pruning/lib/sampling.py (`fixed_sampling`) and
esd_utils_farms.py. The tail exponent of a weight's spectrum moves with its aspect ratio, even for
pure noise; so the spectra of square windows of one size are pooled and fitted together.

Shapes: weight (rows, columns); eigenvalues = squared singular values, ascending.

Hill's estimate from the i-th of N eigenvalues on, n = N - i (counting from 0, i = N // 2):
alpha = 1 + n / (sum_{j >= i} log e_j - n log e_i). Low alpha: a heavy tail.

What would surprise: a window's side is at most the matrix's shorter side. Windows overlap where
`ops` of them would not fit along an axis otherwise. Eigenvalues come from the Gram matrix in
float64, which halves the digits of the small ones (relative to the largest); Hill's fit reads the
upper half alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmnorm.analysis.depth.anatomy import Block, matrices

WINDOW, OPS = 512, 5


class Spectrum(NamedTuple):
    """Figures of a matrix's spectrum.

    Attributes:
        alpha: tail exponent of the pooled windows; nan for a matrix of zeros.
        spectral_norm: largest singular value of the whole matrix.
        stable_rank: |W|_F^2 / |W|_2^2 of the whole matrix.
    """

    alpha: float
    spectral_norm: float
    stable_rank: float


def spectrum(weight: Tensor, *, window: int = WINDOW, ops: int = OPS) -> Spectrum:
    """The spectrum of a weight (rows, columns).

    Args:
        window: side of the windows; the matrix's shorter side if that is less.
        ops: windows along each axis at most.
    """
    values = eigenvalues(weight)
    largest, total = float(values[-1]), float(values.sum())
    if largest == 0:
        return Spectrum(float("nan"), 0.0, 0.0)
    pooled = window_eigenvalues(weight, window=window, ops=ops)
    return Spectrum(hill(pooled), largest**0.5, total / largest)


def window_eigenvalues(
    weight: Tensor, *, window: int = WINDOW, ops: int = OPS, ratio: float = 1.0
) -> Tensor:
    """The eigenvalues of all windows (ascending), float64.

    Args:
        weight: (rows, columns).
        window: rows of a window; the matrix's shorter side if that is less.
        ops: windows along each axis at most.
        ratio: columns of a window over its rows (`Q_ratio` of the official code). A window that is
            wider than the matrix by n columns has the matrix's last n columns (all of them if n is
            larger), because the official slice then begins at -n.
    """
    rows, columns = weight.shape
    height = min(window, rows, columns)
    width = max(1, int(height * ratio))
    found = [
        eigenvalues(weight[top : top + height, left : left + width])
        for top in _starts(rows, height, ops)
        for left in _starts(columns, width, ops)
    ]
    return torch.cat(found).sort().values


def eigenvalues(weight: Tensor) -> Tensor:
    """The min(rows, columns) squared singular values, ascending, float64."""
    wide = weight.detach().double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0)


def hill(eigenvalues: Tensor, first: int | None = None) -> float:
    """Hill's tail exponent of ascending eigenvalues.

    Args:
        eigenvalues: (N,) ascending.
        first: number of the first eigenvalue of the tail, from 0; None: N // 2.

    Returns:
        alpha; nan where the tail is constant or begins with 0.
    """
    first = len(eigenvalues) // 2 if first is None else first
    tail = eigenvalues[first:].double()
    spread = tail.log().sum() - len(tail) * tail[0].log()
    return float(1 + len(tail) / spread) if tail[0] > 0 and spread > 0 else float("nan")


def block_spectra(blocks: list[Block], tick: Any) -> dict[str, Any]:
    """The figures of every matrix of every block, and the mean alpha of each block.

    None where a block has no such matrix, or alpha is not defined.

    Args:
        blocks: the model's blocks.
        tick: called after every block.

    Returns:
        `{"alpha": [...], "matrices": {name: {"alpha": [...], "spectral_norm": [...],
        "stable_rank": [...]}}}`.
    """
    found: list[Mapping[str, Spectrum]] = []
    for block in blocks:
        found.append({name: spectrum(weight) for name, weight in matrices(block.module).items()})
        tick()
    names = dict.fromkeys(name for of_block in found for name in of_block)
    return {
        "window": WINDOW,
        "alpha": [_mean([s.alpha for s in of_block.values()]) for of_block in found],
        "matrices": {
            name: {
                key: [_finite(getattr(b[name], key)) if name in b else None for b in found]
                for key in Spectrum._fields
            }
            for name in names
        },
    }


def _starts(length: int, side: int, ops: int) -> list[int]:
    """Where the windows begin: at most `ops`, in equal steps of (length - side) // (ops - 1).

    One window begins at length - side, which is negative, where it is longer than the axis.
    """
    room = length - side
    step = max(1, room // max(1, ops - 1))
    return [min(i * step, room) for i in range(min(ops, max(1, room // step + 1)))]


def _finite(value: float) -> float | None:
    return value if value == value else None


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else None
