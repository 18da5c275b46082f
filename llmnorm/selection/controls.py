"""The controls beside CoLM: uniform rows, the same mixture with uniform rows, the largest losses.

They tell what a coreset's choice is worth: `stratified` keeps the rows of the same sources and
shares the rest out as CoLM does, but draws inside a source.

What would surprise: a draw is a hash of the seed and the row's number. So it depends neither on the
rows that are read beside it nor on their order.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmnorm.selection.contract import Selector

Inside = Callable[[Tensor, int], Tensor]
"""(places of one source's rows by ascending number, how many) -> the chosen places."""


def draw(rows: Tensor, count: int, numbers: Tensor, seed: int) -> Tensor:
    """`count` of the places `rows`, drawn uniformly without replacement.

    Args:
        rows: (m,) places in the pool.
        count: at most m.
        numbers: (n,) of the pool's rows.
        seed: of the draw.
    """
    hashes = [(_hash(seed, number), number) for number in numbers[rows].tolist()]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return rows[torch.tensor(order[:count], dtype=torch.int64)]


def _hash(seed: int, number: int) -> bytes:
    words = struct.pack("<Qq", seed % 2**64, number)
    return hashlib.blake2b(words, digest_size=8).digest()


def allocate(counts: Sequence[int], budget: int, start: str = "floor") -> list[int]:
    """Share a budget out over sources by their rows, in whole numbers.

    Each gets floor(budget x count / all), and the rest goes one by one to the smallest of these
    (of equals to the first), never more than a source has.

    >>> allocate([50, 30, 15, 4, 1], 37)
    [18, 11, 5, 2, 1]

    Args:
        counts: the rows of each source.
        budget: at most their sum.
        start: `floor`, the paper's, or `ceil`, the official code's other mode: rounded up, and
            taken from the largest.
    """
    total = sum(counts)
    assert 0 <= budget <= total, (budget, counts)
    if start == "ceil":
        shares = [-(-budget * count // max(total, 1)) for count in counts]
        for place in sorted(range(len(counts)), key=lambda q: -shares[q]) * len(counts):
            if sum(shares) > budget and shares[place]:
                shares[place] -= 1
        return shares
    shares = [budget * count // max(total, 1) for count in counts]
    order = sorted(range(len(counts)), key=lambda q: shares[q])
    rest = budget - sum(shares)
    while rest:
        for place in order:
            if rest and shares[place] < counts[place]:
                shares[place] += 1
                rest -= 1
    return shares


class KeptRows:
    """The rows of the sources that are kept whole, and the budgets of the others.

    Where the kept rows are more than the batch, the batch is shared out over their sources alone.

    Args:
        kept: the numbers of the kept sources.
        seed: of the draws inside a source.

    Attributes:
        full: whether the kept rows left no room in the last selection.
    """

    def __init__(self, kept: set[int], seed: int) -> None:
        self._kept, self._seed = kept, seed
        self.full = False

    def select(
        self, sources: Tensor, budget: int, numbers: Tensor, inside: Inside | None = None
    ) -> Tensor:
        """The chosen places, (budget,) in ascending order.

        Args:
            sources, numbers: (n,) of the pool's rows.
            budget: rows that are chosen.
            inside: chooses in a source that is not kept; uniform draws if None.
        """

        def uniform(rows: Tensor, count: int) -> Tensor:
            return draw(rows, count, numbers, self._seed)

        by_number = numbers.argsort()
        rows = {q: by_number[sources[by_number] == q] for q in sources.unique().tolist()}
        small = {q: found for q, found in rows.items() if q in self._kept}
        large = {q: found for q, found in rows.items() if q not in self._kept}
        left = budget - sum(map(len, small.values()))
        self.full = left <= 0 and bool(large)
        chosen, choose = [*small.values()], inside or uniform
        if left <= 0:
            chosen, large, left, choose = [], small, budget, uniform
        shares = allocate([*map(len, large.values())], left)
        chosen += [
            choose(found, share) for found, share in zip(large.values(), shares, strict=True)
        ]
        return torch.cat(chosen).sort().values

    def figures(self) -> dict[str, float]:
        """Of the last selection: 1 where the kept rows left no room for others."""
        return {"kept_rows_fill_the_batch": float(self.full)}

    def shares(self, mixture: Sequence[float], pool: int, budget: int) -> list[float]:
        """Each source's expected share of the rows that are trained on.

        Args:
            mixture: each source's share of the rows that are read.
            pool: rows that are read a step.
            budget: rows that are trained on.
        """
        small = sum(share for q, share in enumerate(mixture) if q in self._kept)
        of_small = min(1.0, small * pool / budget)
        of = {True: (of_small, small), False: (1 - of_small, 1 - small)}
        found = []
        for q, share in enumerate(mixture):
            batch, own = of[q in self._kept]
            found.append(batch * share / own if own else 0.0)
        return found


class Uniform(Selector):
    """Uniform rows of the pool: plain training on other rows."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        """Uniform picks, (budget,) sorted places in the pool."""
        return draw(torch.arange(len(numbers)), budget, numbers, self._seed).sort().values


class Stratified(Selector):
    """The kept sources' rows, and uniform ones of the others by CoLM's budgets."""

    def __init__(self, kept: KeptRows) -> None:
        self._kept = kept

    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        """The picks, (budget,) sorted places in the pool."""
        return self._kept.select(sources, budget, numbers)

    def figures(self) -> dict[str, float]:
        """Those of the kept rows."""
        return self._kept.figures()


class LargestLoss(Selector):
    """The rows with the largest loss; of equals those with the lower number."""

    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        """The picks, (budget,) sorted places in the pool."""
        ordered = zip((-losses).tolist(), numbers.tolist(), range(len(numbers)), strict=True)
        picks = [place for _, _, place in sorted(ordered)[:budget]]
        return torch.tensor(picks, dtype=torch.int64).sort().values
