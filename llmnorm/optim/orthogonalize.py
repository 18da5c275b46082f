"""Orthogonalisation of matrices by Newton-Schulz iterations: every singular value near 1.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the iteration and `jordan`; the
five-step tuned `quintic` as in microsoft/dion; Amsel et al. 2025, arXiv 2505.16932, for
`polar_express`; Gram form: the same polynomials applied to X X^T alone.

Shapes: matrices (n, rows, columns); X (n, short, long); A = X X^T and P (n, short, short).

    X <- G / (|G|_F margin + guard);  five times: A = X X^T;  P = a + b A + c A^2;  X <- P X

What would surprise:
- No variant converges to the polar factor U V^T. Singular values end within about 0.7 to 1.2 (those
  below 1 % of the norm lower), and the rules were tuned with such values.
- The guard (1e-7) shrinks the result of a matrix whose norm is not far above it.
- bf16 results of two correct orders of operations differ by some percent. Compare in float32.
- The Gram form needs float32. In bf16 it diverges: a 64 x 256 matrix of condition 1e3 came out with
  singular values of 49 (`jordan`) to 3e4 (`polar_express`) instead of 1.2
  (tests/optim/test_orthogonalize.py).
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmnorm.machine.processor import processor
from llmnorm.nn.linear import products

Form = Literal["standard", "gram"]
Coefficients = Literal["jordan", "quintic", "polar_express"]
Precision = Literal["auto", "fp32", "bf16"]
Guard = Literal["added", "least"]
GRAM_IN_BF16 = "the Gram form diverges in bf16; use float32 or the form 'standard'"


class Iteration(NamedTuple):
    """(a, b, c) of every step, and how the matrix is scaled before the first."""

    steps: Sequence[tuple[float, float, float]]
    margin: float
    guard: float


ITERATIONS: dict[str, Iteration] = {
    "jordan": Iteration([(3.4445, -4.7750, 2.0315)] * 5, 1.0, 1e-7),
    "quintic": Iteration(
        [
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ],
        1.0,
        1e-7,
    ),
    "polar_express": Iteration(
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
        1.02,
        1e-6,
    ),
}


def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: Coefficients = "jordan",
    form: Form = "standard",
    guard: Guard = "added",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrices with singular values near 1 in the place of their own.

    Args:
        matrices: (n, rows, columns); the result has their shape and dtype.
        coefficients: the polynomials.
        form: `gram` iterates on X X^T where that is less work (longer side > 1.5 shorter ones):
            4 k^2 L + 34 k^3 operations instead of 20 k^2 L + 10 k^3; in float32 its error grows
            with the condition number, to 2e-4 at 1e5.
        guard: how the first division is kept finite: a small number is `added` to the norm (Jordan,
            Moonlight), or the norm is taken for at `least` that number (torch.optim.Muon).
        dtype: of the products; that of the matrices if None.

    Raises:
        ValueError: the Gram form in bf16.
    """
    iteration = ITERATIONS[coefficients]
    x = matrices.to(dtype or matrices.dtype)
    if form == "gram" and x.dtype == torch.bfloat16:
        raise ValueError(GRAM_IN_BF16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm = x.norm(dim=(-2, -1), keepdim=True) * iteration.margin
    x = x / (norm + iteration.guard if guard == "added" else norm.clamp(min=iteration.guard))
    if form == "gram" and x.shape[-1] > 1.5 * x.shape[-2]:
        x = _by_gram(x, iteration)
    else:
        for a, b, c in iteration.steps:
            gram = products(x, x)
            if x.dtype == torch.bfloat16:  # sums inside the products, which add in float32
                p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                x = torch.baddbmm(x, p, x, beta=a)
            else:
                x = products(_polynomial(gram, a, b, c), x.mT)
    return (x.mT if tall else x).to(matrices.dtype)


def working_dtype(precision: Precision, form: Form, matrices: Tensor) -> torch.dtype:
    """The dtype of the products: `auto` is bf16 where the hardware multiplies in it.

    On a CPU the shorter side must be at least 256 too: below that bf16 products are slower. For the
    Gram form `auto` is float32. Float64 matrices stay float64.

    Raises:
        ValueError: `bf16` for the Gram form, which diverges in it.
    """
    if form == "gram" and precision == "bf16":
        raise ValueError(GRAM_IN_BF16)
    if matrices.dtype == torch.float64:
        return torch.float64
    if precision == "auto" and form == "standard":
        large = matrices.is_cuda or min(matrices.shape[-2:]) >= 256
        precision = "bf16" if large and multiplies_bf16(matrices.device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


@cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 products; a CPU without is 26 to 54 times slower in bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or processor().instructions != "AVX512":
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b A + c A^2."""
    p = products(gram, gram.mT).mul_(c).add_(gram, alpha=b)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p


def _by_gram(x: Tensor, iteration: Iteration) -> Tensor:
    """All steps on A = X X^T: X_i = Q_i X, and A, P, Q are polynomials of it, so they commute."""
    gram, q = products(x, x), None
    for number, (a, b, c) in enumerate(iteration.steps):
        p = _polynomial(gram, a, b, c)
        q = p if q is None else products(p, q.mT)
        if number + 1 < len(iteration.steps):
            gram = products(products(p, gram.mT), p)
    assert q is not None
    return products(q, x.mT)
