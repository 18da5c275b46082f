"""The order of rows: a run's row n -> (source, index), a pure function of (seed, weights, n).

Shape legend: every array is (count,); `n` counts the run's rows from 0 and never wraps, `visit`
counts the rows of one source, `index` is a row's place in its source.

Sources: a binary tree over the sources whose inner nodes share their visits as Bresenham's line
does: of total weight B with A on the left, visit m goes left iff (m A mod B) + A >= B, and the left
has had m A // B visits before. So every prefix of the run holds the sources in proportion, and with
the row counts as weights each epoch holds every row once. (Largest remainder would not do: its
counts are not monotone in n.)

Index: each epoch of a source is a permutation keyed by (seed, source, epoch): a modular Feistel
network of 8 rounds on a b >= rows with cycle walking; below 1,024 rows, where halves of a few
values mix badly, the argsort of hashes. Nothing is stored: any row is found by itself.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmnorm.part import InputError

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8
SMALL = 1024
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, splitmix64's step


class Order:
    """The order of a run's rows.

    Args:
        weights: whole numbers >= 1, one a source; a source's share of all rows.
        rows: the rows that each source has.
        seed: seed of the permutations.

    Raises:
        InputError: the weights sum to 2**31 or more.
    """

    def __init__(self, weights: Sequence[int], rows: Sequence[int], seed: int) -> None:
        assert len(weights) == len(rows) > 0 and min(weights) >= 1 and min(rows) >= 1
        if sum(weights) >= 2**31:
            raise InputError(
                f"data.sources: the weights (or rows) sum to {sum(weights)}, which is not below "
                "2**31; give every source a smaller weight"
            )
        self._tree(list(weights))
        self._rows = np.asarray(rows, np.int64)
        self._a = np.array([_side(n) for n in rows], np.uint64)
        self._b = np.array([-(-n // _side(n)) for n in rows], np.uint64)
        self._key = mix(np.array((seed + GOLDEN) % 2**64, np.uint64))

    def locate(self, first: int, count: int) -> tuple[Integers, Integers]:
        """Where the run's rows from `first` on lie: (source, index), both (count,) int64."""
        source, visit = self._split(np.arange(first, first + count, dtype=np.int64))
        epoch, place = np.divmod(visit, self._rows[source])
        index = np.empty_like(place)
        large = self._rows[source] >= SMALL
        if large.any():
            index[large] = self._feistel(source[large], epoch[large], place[large])
        for one in np.unique(source[~large]):
            mine = source == one
            index[mine] = self._sorted(int(one), epoch[mine], place[mine])
        return source, index

    def _tree(self, weights: list[int]) -> None:
        """Nodes as arrays; the first are the leaves, one a source, which lead to themselves."""
        sources = len(weights)
        nodes = [(source, source, 1, 1) for source in range(sources)]  # left, right, A, B

        def grow(start: int, stop: int) -> tuple[int, int]:
            """Node over the sources start .. stop - 1, and its depth."""
            if stop - start == 1:
                return start, 0
            middle = (start + stop) // 2
            (left, deep), (right, deeper) = grow(start, middle), grow(middle, stop)
            nodes.append((left, right, sum(weights[start:middle]), sum(weights[start:stop])))
            return len(nodes) - 1, 1 + max(deep, deeper)

        self._root, self._depth = grow(0, sources)
        self._left, self._right, self._share, self._total = np.array(nodes, np.int64).T.copy()

    def _split(self, visit: Integers) -> tuple[Integers, Integers]:
        """Run's rows -> (source, visit of that source)."""
        node = np.full_like(visit, self._root)
        for _ in range(self._depth):
            share, total = self._share[node], self._total[node]
            rounds, rest = np.divmod(visit, total)  # first the remainder: m A would overflow
            product = rest * share
            before, place = np.divmod(product, total)
            left_before = rounds * share + before
            goes_left = place + share >= total
            visit = np.where(goes_left, left_before, visit - left_before)
            node = np.where(goes_left, self._left[node], self._right[node])
        return node, visit

    def _feistel(self, source: Integers, epoch: Integers, place: Integers) -> Integers:
        """Permutes each place within its source; all sources and epochs of the window at once."""
        pairs, which = np.unique(epoch * len(self._rows) + source, return_inverse=True)
        rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        keys = mix(
            self._epoch_key(pairs % len(self._rows), pairs // len(self._rows))[:, None] + rounds
        )
        key = keys.T[:, which]  # (round, count)
        a, b = self._a[source], self._b[source]
        rows, index = self._rows[source], place.copy()
        walking = np.arange(len(index))
        while len(walking):  # a b >= rows: a place outside the rows is permuted again
            left, right = np.divmod(index[walking].view(np.uint64), b)
            for one in range(0, ROUNDS, 2):
                left = _add(left, right ^ key[one], a)
                right = _add(right, left ^ key[one + 1], b)
            index[walking] = (left * b + right).view(np.int64)
            outside = index[walking] >= rows[walking]
            walking = walking[outside]
            a, b, key = a[outside], b[outside], key[:, outside]
        return index

    def _sorted(self, source: int, epoch: Integers, place: Integers) -> Integers:
        """Permutes each place of one small source by the argsort of hashes, epoch by epoch."""
        epochs, which = np.unique(epoch, return_inverse=True)
        keys = self._epoch_key(np.full_like(epochs, source), epochs)[:, None]
        places = np.arange(self._rows[source]).astype(np.uint64) * np.uint64(GOLDEN)
        order = np.argsort(mix(keys + places), axis=1, kind="stable")
        return order[which, place]

    def _epoch_key(self, source: Integers, epoch: Integers) -> Words:
        return mix(mix(self._key ^ source.astype(np.uint64)) ^ epoch.astype(np.uint64))


def _side(rows: int) -> int:
    """a of the smallest a b >= rows with a = ceil(sqrt(rows))."""
    return math.isqrt(rows - 1) + 1


def _add(half: Words, word: Words, modulus: Words) -> Words:
    """(half + hash(word)) mod modulus, the hash scaled down to below the modulus (< 2**32)."""
    half = half + ((mix(word) >> np.uint64(32)) * modulus >> np.uint64(32))
    return np.where(half >= modulus, half - modulus, half)


def mix(word: Words) -> Words:
    """The output function of splitmix64: a bijection whose every bit depends on every bit."""
    with np.errstate(over="ignore"):  # arithmetic mod 2**64 is meant
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
