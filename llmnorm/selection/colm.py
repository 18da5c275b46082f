"""CoLM: the rows of a small batch that stand for a large one.

Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman 2024, "Mini-batch Coresets for Memory-efficient
Language Model Training on Data Mixtures", arXiv 2407.19580, algorithm 1.

    small sources    fewer rows than the mean source: all of their rows are kept (section 4.1)
    budgets          the rest of the batch, shared out over the large sources by their rows
    features         a row's gradient in one matrix, put through Adam's update (section 4.2)
    coordinates      of each source those whose mean is largest (section 4.3)
    picks            facility location in each large source, all with weight 1 (section 4.4)

Shapes: n rows of the pool, k numbers of a feature; raw and features (n, k), sources (n,).

What would surprise:
- One projection is the paper's feature. The official code draws its direction z once for the run,
  so row i's feature is a number s_i times z, and Adam's update of it is a number times sign(z) but
  for eps. A distance of two features is then |h_i - h_j| times k, with h what `AdamNormaliser`
  makes of s as a feature of width 1. So one number a row, and two of state, are all that is needed.
- The moments are the selector's own, not the optimizer's. They move by the picked rows of the large
  sources alone; a step that has no such picks leaves them as they are.
- The kept rows may fill the batch. Then the batch is shared out over the small sources, uniformly
  inside each, and the official code's first rows of the batch are not preferred.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmnorm.selection.contract import Selector
from llmnorm.selection.controls import KeptRows
from llmnorm.selection.facility_location import facility_location, similarity_of

BETAS = 0.9, 0.999  # the paper's, appendix C
EPS = 1e-8


class AdamNormaliser:
    """Adam's update of every row's gradient, from one history that all rows share.

        m_i = b1 m + (1 - b1) g_i,  v_i = b2 v + (1 - b2) g_i^2
        feature_i = (m_i / (1 - b1^t)) / (sqrt(v_i / (1 - b2^t)) + eps),  t = updates + 1

    Args:
        width: numbers of a gradient.
        betas, eps: Adam's.
        dtype: of the history.

    Attributes:
        first, second: (width,), m and v without the correction of their bias.
        updates: () int64, how often they were updated.
    """

    def __init__(
        self,
        width: int,
        *,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._betas, self._eps = betas, eps
        self.first = torch.zeros(width, dtype=dtype)
        self.second = torch.zeros(width, dtype=dtype)
        self.updates = torch.zeros((), dtype=torch.int64)

    def features(self, raw: Tensor) -> Tensor:
        """The updates (n, width) of gradients `raw` (n, width)."""
        first, second = self._moved(raw)
        t = int(self.updates) + 1
        b1, b2 = self._betas
        return (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + self._eps)

    def update(self, raw: Tensor) -> None:
        """Take the mean of the rows' moments for the history; `raw` (n, width), n >= 1."""
        first, second = self._moved(raw)
        self.first.copy_(first.mean(0))
        self.second.copy_(second.mean(0))  # the mean of squares, not the square of the mean
        self.updates += 1

    def _moved(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw = raw.to(self.first.dtype)
        b1, b2 = self._betas
        return b1 * self.first + (1 - b1) * raw, b2 * self.second + (1 - b2) * raw.square()


def small_sources(sizes: Sequence[int]) -> set[int]:
    """The numbers of the sources with fewer rows than the mean source.

    >>> small_sources([40, 30, 20, 6, 4])
    {3, 4}
    """
    return {number for number, size in enumerate(sizes) if size * len(sizes) < sum(sizes)}


def coordinates(features: Tensor, count: int, which: str = "largest") -> Tensor:
    """The coordinates of a source's features that are compared, the most important first.

    A coordinate's importance is |mean of the features|.

    Args:
        features: (n, k), n >= 1, of one source.
        count: how many; all if there are not more.
        which: `largest` is the paper's. The official code also knows the `smallest`, and
            `largest_smallest`: half of them smallest, half largest.

    Returns:
        (min(count, k),) int64.
    """
    order = features.mean(0).abs().argsort(descending=True)
    count = min(count, len(order))
    if which == "largest_smallest":
        half = count // 2
        return torch.cat([order.flip(0)[:half], order[: count - half]])
    return order[:count] if which == "largest" else order.flip(0)[:count]


class Picks(NamedTuple):
    """What facility location has picked of one source.

    Attributes:
        order: (budget,) places in the pool, in the order of their picking.
        covered: what of the objective they reach, F.
        all: F of all of the source's rows.
    """

    order: Tensor
    covered: float
    all: float


def pick(features: Tensor, rows: Tensor, budget: int, metric: str, dimensions: int) -> Picks:
    """Pick `budget` rows of one source.

    Args:
        features: (n, k) of the pool.
        rows: (m,) the source's places in the pool, by ascending row number: the first of equals
            is picked.
        budget: at most m.
        metric: `l1`, `l2` or `cosine`.
        dimensions: coordinates that are compared.
    """
    own = features[rows]
    if own.shape[1] > dimensions and len(own):
        own = own[:, coordinates(own, dimensions)]
    alike = similarity_of(own, metric)
    order, gains = facility_location(alike, budget)
    everything = float(alike.max(1, initial=0.0).astype("float64").sum())
    return Picks(rows[torch.from_numpy(order)], float(gains.sum()), everything)


class CoLM(Selector):
    """The rows of the small sources, and those that stand best for the large ones.

    Args:
        kept: whose rows are kept, and how budgets and draws are made.
        metric: of two features' distance.
        dimensions: coordinates of a source's features that are compared.
        normalise: put features through Adam's update, from a history that a checkpoint keeps. They
            must have the width 1: a projection on one direction for the whole run.
    """

    def __init__(
        self, kept: KeptRows, *, metric: str, dimensions: int, normalise: bool = False
    ) -> None:
        self._kept, self._metric, self._dimensions = kept, metric, dimensions
        self._normaliser = AdamNormaliser(1) if normalise else None
        self._figures: dict[str, float] = {}

    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        """The picks, (budget,) sorted places in the pool; moves the history of features."""
        made = features if self._normaliser is None else self._normaliser.features(features)
        covered, everything = 0.0, 0.0
        picked: list[Tensor] = []

        def inside(rows: Tensor, count: int) -> Tensor:
            nonlocal covered, everything
            found = pick(made, rows, count, self._metric, self._dimensions)
            covered, everything = covered + found.covered, everything + found.all
            picked.append(found.order)
            return found.order

        chosen = self._kept.select(sources, budget, numbers, inside)
        self._figures = self._kept.figures()
        if everything > 0:
            self._figures["covered"] = covered / everything
        if self._normaliser is not None and any(len(found) for found in picked):
            self._normaliser.update(features[torch.cat(picked)])
        return chosen

    def state(self) -> dict[str, Tensor]:
        """The history of features, of a run with one projection."""
        if self._normaliser is None:
            return {}
        own = self._normaliser
        return {"first": own.first, "second": own.second, "updates": own.updates}

    def figures(self) -> dict[str, float]:
        """Of the last selection: `covered`, the share of the objective that the picks reach."""
        return self._figures
