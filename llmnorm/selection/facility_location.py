"""Facility location: the rows that stand best for all the others, picked greedily.

    F(A) = sum_i max(0, max_{j in A} S_ij)        S: how alike two rows are, (rows, rows), symmetric

Source: Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions". F is
submodular: what a row adds gets smaller as others are picked. So what it would have added earlier
bounds what it adds now, and a row whose bound is not the largest need not be looked at ("lazy").
The greedy F is at least 1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978).

What would surprise:
- Of rows that add equally much the first is picked, so the caller's order decides ties. With
  distances they are common: two rows that are nearest to each other add the same.
- Similarities are rounded to so many bits that their float64 sums are exact, in any order of the
  rows. So a tie is a tie, and not decided by the last bit of a sum.
- The last rows of a pool may add nothing, e.g. copies of picked ones; then the first is picked.
"""

import heapq

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]


def facility_location(similarity: NDArray[np.floating], budget: int) -> tuple[Integers, Reals]:
    """Pick rows by lazy greedy.

    >>> order, gains = facility_location(np.array([[3.0, 2, 0], [2, 3, 2], [0, 2, 3]]), 2)
    >>> order.tolist(), gains.tolist()
    ([1, 0], [7.0, 1.0])

    Args:
        similarity: (rows, rows), symmetric, float32 or float64, without nan.
        budget: how many rows are picked, 0 to all.

    Returns:
        The picked rows in the order of their picking, (budget,) int64, and what each has added to
        F, (budget,) float64.
    """
    rows = len(similarity)
    assert similarity.shape == (rows, rows) and 0 <= budget <= rows, (similarity.shape, budget)
    # Rows of the matrix are read as a whole: columns would cost several times as much.
    matrix, first = _rounded(similarity)
    covered, total = np.zeros(rows), 0.0
    best = np.empty(rows)
    bounds = [(-gain, row) for row, gain in enumerate(first.tolist())]
    heapq.heapify(bounds)
    order, gains = np.empty(budget, np.int64), np.empty(budget)
    for pick in range(budget):
        while True:
            row = bounds[0][1]
            np.maximum(matrix[row], covered, out=best)
            reached = float(np.add.reduce(best))
            # The new bound sinks to its place; the row is picked if that is the top.
            heapq.heapreplace(bounds, (total - reached, row))
            if bounds[0][1] == row:
                break
        heapq.heappop(bounds)
        order[pick], gains[pick] = row, reached - total
        covered, best, total = best, covered, reached
    return order, gains


def _rounded(similarity: NDArray[np.floating]) -> tuple[Reals, Reals]:
    """The similarities in float64, as multiples of a power of two of which sums of a row are exact.

    A float64 has 53 bits; a sum of 2,048 numbers needs 11 of them, so that 42 are left for each. A
    number that is far larger is added and taken away again, which rounds the others off: that takes
    half of the time of `ldexp` and `rint`.

    Returns:
        (rows, rows), and for each row the sum of what is positive, (rows,).
    """
    rows = len(similarity)
    largest = max(similarity.max(initial=0.0), -similarity.min(initial=0.0))
    _, exponent = np.frexp(np.float64(largest))
    spare = max((rows - 1).bit_length(), 1)
    larger = np.ldexp(1.5, spare + int(exponent))
    matrix, sums = np.empty((rows, rows)), np.empty(rows)
    for start in range(0, rows, 64):  # a block of rows stays in the cache
        block = matrix[start : start + 64]
        np.add(similarity[start : start + 64], larger, out=block)
        block -= larger
        np.maximum(block, 0).sum(1, out=sums[start : start + 64])
    return matrix, sums


def cluster_sizes(similarity: NDArray[np.floating], order: Integers) -> Integers:
    """How many rows each picked one stands for, (picks,): they sum to the number of rows.

    A row counts for the pick that it is most alike, of equals for the earlier; a pick for itself.

    Args:
        similarity: (rows, rows).
        order: the picks, in order.
    """
    nearest = similarity[:, order].argmax(1)
    nearest[order] = np.arange(len(order))
    return np.bincount(nearest, minlength=len(order)).astype(np.int64)


def similarity_of(features: Tensor, metric: str) -> NDArray[np.floating]:
    """How alike rows of features (rows, k) are: (rows, rows), in their dtype.

    Args:
        features: float32 or float64, on the CPU.
        metric: `l1` and `l2`: the largest distance minus theirs, so that the farthest two have 0
            and what is added to all distances does not matter; `cosine`: of the angle.
    """
    if metric == "cosine":
        unit = F.normalize(features, dim=1)
        return (unit @ unit.t()).numpy()
    rows = len(features)
    # pdist takes a tenth of the time of cdist, and half of the memory.
    flat = F.pdist(features, p=1.0 if metric == "l1" else 2.0)
    largest = flat.max() if rows > 1 else flat.new_zeros(())
    alike = largest.expand(rows, rows).clone()
    above = torch.triu_indices(rows, rows, 1)
    alike[above[0], above[1]] -= flat
    alike[above[1], above[0]] = alike[above[0], above[1]]
    return alike.numpy()
