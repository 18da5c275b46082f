"""The order of rows: a run's row n -> (source, index), a pure function of (seed, weights, n).

Shape legend: every array is (count,). `n` counts the run's rows from 0, through all epochs; `visit`
counts the rows that one source has given so far; `index` numbers a source's rows. Of a visit,
`epoch` = visit // rows and `slot` = visit mod rows.

Which source. The sources are the leaves of a binary tree. An inner node shares its visits between
its two sides as Bresenham's line does: with total weight B and weight A on the left, visit m goes
left iff (m A mod B) + A >= B, and m A // B earlier visits went left. So every prefix of the run
holds the sources in proportion, and with the row counts as weights each epoch holds every row once.
(Largest remainder would not do: its counts are not monotone in n.)

Five rows of two sources with the weights 3 and 2, so A = 3 and B = 5:

    n = m   m A mod B   + A >= B   source   its visit   index
    0       0           3: right   1        0 - 0 = 0   1
    1       3           6: left    0        0           0
    2       1           4: right   1        2 - 1 = 1   0
    3       4           7: left    0        1           1
    4       2           5: left    0        2           2

Which row of the source. Each epoch of a source has a permutation of its own, keyed by (seed,
source, epoch); index = permutation(slot). From 1,024 rows on it is a modular Feistel network of 8
rounds on a b >= rows values, a and b near sqrt(rows); a result that is not below `rows` is
permuted again (cycle walking). Below 1,024 rows, where halves of a few values mix badly, it is the
argsort of hashes. Nothing is stored: any row is found by itself.

Why 8 rounds. Luby and Rackoff's four are enough where few values are seen, but an epoch shows all
of them. Measured: of slots b apart, whose right halves are equal, how often do two pairs have equal
differences of their left (or right) halves? With 2 rounds 32 times as often as in random
permutations of 1,024 rows, with 3 rounds 1.94 times, with 4 1.09, with 5 1.004 and with 6 1.0006,
which is 3 standard errors of 4,000 permutations; 7 and 8 stay within 2 of them (1,031 and 4,999
rows: alike). So 8 leave a pair of rounds in reserve, for a quarter more time than 6. The counts of
4 and of 8 rounds are repeated in tests/test_data/test_order.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmnorm.part import InputError

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8  # even: a pair of rounds changes both halves
SMALL = 1024  # rows of a source; below, hashes are sorted
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, splitmix64's step


class Order:
    """The order of a run's rows.

    >>> source, index = Order(weights=[3, 2], rows=[3, 2], seed=0).locate(0, 5)
    >>> source.tolist(), index.tolist()
    ([1, 0, 1, 0, 0], [1, 0, 0, 1, 2])

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
        self._grow_tree(list(weights))
        self._rows = np.asarray(rows, np.int64)
        self._a = np.array([_side(n) for n in rows], np.uint64)
        self._b = np.array([-(-n // _side(n)) for n in rows], np.uint64)
        self._key = mix(np.array((seed + GOLDEN) % 2**64, np.uint64))

    def locate(self, first: int, count: int) -> tuple[Integers, Integers]:
        """Where the run's rows `first`, ..., `first + count - 1` lie.

        Returns:
            (source, index), both (count,) int64.
        """
        return self.find(np.arange(first, first + count, dtype=np.int64))

    def find(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Where the run's rows with these numbers lie, (count,) int64, in any order.

        Returns:
            (source, index), both (count,) int64.
        """
        source, visit = self._choose_source(numbers)
        epoch, slot = np.divmod(visit, self._rows[source])
        index = np.empty_like(slot)
        large = self._rows[source] >= SMALL
        if large.any():
            index[large] = self._feistel(source[large], epoch[large], slot[large])
        for small in np.unique(source[~large]):
            chosen = source == small
            index[chosen] = self._by_sorting(int(small), epoch[chosen], slot[chosen])
        return source, index

    def _grow_tree(self, weights: list[int]) -> None:
        """The tree as arrays of its nodes; the first nodes are the leaves, one a source.

        A leaf leads to itself, so that all rows can take as many steps as the tree is deep.
        """
        sources = len(weights)
        nodes = [(source, source, 1, 1) for source in range(sources)]  # left, right, A, B

        def grow(start: int, stop: int) -> tuple[int, int]:
            """Node over the sources start .. stop - 1, and its depth."""
            if stop - start == 1:
                return start, 0
            middle = (start + stop) // 2
            (left, left_depth), (right, right_depth) = grow(start, middle), grow(middle, stop)
            nodes.append((left, right, sum(weights[start:middle]), sum(weights[start:stop])))
            return len(nodes) - 1, 1 + max(left_depth, right_depth)

        self._root, self._depth = grow(0, sources)
        self._left, self._right, self._share, self._total = np.array(nodes, np.int64).T.copy()

    def _choose_source(self, visit: Integers) -> tuple[Integers, Integers]:
        """The run's rows -> (source, visit of that source)."""
        node = np.full_like(visit, self._root)
        for _ in range(self._depth):
            share, total = self._share[node], self._total[node]
            # m A itself would overflow, so m is first split into whole cycles of B and a rest.
            cycles, rest = np.divmod(visit, total)
            left_in_cycle, remainder = np.divmod(rest * share, total)
            left_before = cycles * share + left_in_cycle
            goes_left = remainder + share >= total
            visit = np.where(goes_left, left_before, visit - left_before)
            node = np.where(goes_left, self._left[node], self._right[node])
        return node, visit

    def _feistel(self, source: Integers, epoch: Integers, slot: Integers) -> Integers:
        """Permutes each slot within its source; all sources and epochs of the window at once."""
        pairs, pair = np.unique(epoch * len(self._rows) + source, return_inverse=True)
        steps = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        keys = mix(
            self._epoch_key(pairs % len(self._rows), pairs // len(self._rows))[:, None] + steps
        )
        key = keys.T[:, pair]  # (round, count)
        a, b = self._a[source], self._b[source]
        rows, index = self._rows[source], slot.copy()
        unfinished = np.arange(len(index))
        while len(unfinished):  # a b >= rows: what lands outside the rows is permuted again
            left, right = np.divmod(index[unfinished].view(np.uint64), b)
            for step in range(0, ROUNDS, 2):
                left = _add(left, right ^ key[step], a)
                right = _add(right, left ^ key[step + 1], b)
            index[unfinished] = (left * b + right).view(np.int64)
            outside = index[unfinished] >= rows[unfinished]
            unfinished = unfinished[outside]
            a, b, key = a[outside], b[outside], key[:, outside]
        return index

    def _by_sorting(self, source: int, epoch: Integers, slot: Integers) -> Integers:
        """Permutes each slot of one small source by the argsort of hashes, epoch by epoch."""
        epochs, epoch_of = np.unique(epoch, return_inverse=True)
        keys = self._epoch_key(np.full_like(epochs, source), epochs)[:, None]
        slots = np.arange(self._rows[source]).astype(np.uint64) * np.uint64(GOLDEN)
        order = np.argsort(mix(keys + slots), axis=1, kind="stable")
        return order[epoch_of, slot]

    def _epoch_key(self, source: Integers, epoch: Integers) -> Words:
        return mix(mix(self._key ^ source.astype(np.uint64)) ^ epoch.astype(np.uint64))


def _side(rows: int) -> int:
    """a = ceil(sqrt(rows)); b is then the smallest number with a b >= rows."""
    return math.isqrt(rows - 1) + 1


def _add(half: Words, word: Words, modulus: Words) -> Words:
    """(half + hash(word)) mod modulus, the hash scaled down to below the modulus (< 2**32)."""
    half = half + ((mix(word) >> np.uint64(32)) * modulus >> np.uint64(32))
    return np.where(half >= modulus, half - modulus, half)


def mix(word: Words) -> Words:
    """splitmix64's output function: a bijection in which every bit depends on every bit.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; the
    constants are Stafford's mix 13.
    """
    with np.errstate(over="ignore"):  # arithmetic mod 2**64 is meant
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
