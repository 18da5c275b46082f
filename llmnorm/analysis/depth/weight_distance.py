"""How far the weights of two models are apart: of two checkpoints, what the steps between did.

||W' - W|| / ||W|| in the Frobenius norm, of every matrix, and of a block's matrices together.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import blocks_of, matrices

Weights = Sequence[dict[str, Tensor]]


def block_matrices(model: nn.Module) -> Weights:
    """Copies of the matrices of every block, by name, on the CPU."""
    return [
        {name: weight.detach().to("cpu", copy=True) for name, weight in matrices(block).items()}
        for block in blocks_of(model)
    ]


def weight_distance(before: Weights, after: Weights) -> dict[str, Any] | None:
    """The distances, or None where the two are not of one shape.

    Returns:
        `{"block": [...], "matrices": {name: [...]}}`, relative to `before`; None for a matrix of
        zeros.
    """
    if [_shapes(one) for one in before] != [_shapes(one) for one in after]:
        return None
    names = dict.fromkeys(name for one in before for name in one)
    found: dict[str, Any] = {"block": [], "matrices": {name: [] for name in names}}
    for one, other in zip(before, after, strict=True):
        pairs = {
            n: (float((other[n] - w).double().norm()), float(w.double().norm()))
            for n, w in one.items()
        }
        for name in names:
            moved, size = pairs.get(name, (0.0, 0.0))
            found["matrices"][name].append(moved / size if size else None)
        moved, size = (math.hypot(*column) for column in zip(*pairs.values(), strict=True))
        found["block"].append(moved / size if size else None)
    return found


def _shapes(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {name: weight.shape for name, weight in weights.items()}
