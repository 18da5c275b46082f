"""The distance between two models' weights; for two checkpoints, what the steps between changed.

||W' - W|| / ||W|| in the Frobenius norm, for every matrix and for a block's matrices together.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import blocks_of, matrices

Weights = Sequence[dict[str, Tensor]]


def block_matrices(model: nn.Module) -> Weights:
    """Copies of each block's matrices by name, on the CPU."""
    return [
        {name: weight.detach().to("cpu", copy=True) for name, weight in matrices(block).items()}
        for block in blocks_of(model)
    ]


def weight_distance(before: Weights, after: Weights) -> dict[str, Any] | None:
    """The distances of `after` from `before`, relative to `before`.

    Returns:
        `{"block": [...], "matrices": {name: [...]}}`, with None for matrices of zeros; None if the
        two models differ in shape.
    """
    if [_shapes(block) for block in before] != [_shapes(block) for block in after]:
        return None
    names = dict.fromkeys(name for block in before for name in block)
    found: dict[str, Any] = {"block": [], "matrices": {name: [] for name in names}}
    for old, new in zip(before, after, strict=True):
        pairs = {
            name: (float((new[name] - weight).double().norm()), float(weight.double().norm()))
            for name, weight in old.items()
        }
        for name in names:
            change, size = pairs.get(name, (0.0, 0.0))
            found["matrices"][name].append(change / size if size else None)
        change, size = (math.hypot(*column) for column in zip(*pairs.values(), strict=True))
        found["block"].append(change / size if size else None)
    return found


def _shapes(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {name: weight.shape for name, weight in weights.items()}
