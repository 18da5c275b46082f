"""The order of rows: a run's row n -> (source, index), a pure function of (seed, stages, n).

Shape legend: every array is (count,). `n` counts the run's rows from 0, through all epochs; `visit`
counts the rows that one source has given so far; `index` numbers a source's rows. Of a visit,
`epoch` = visit // rows and `slot` = visit mod rows. A run has one stage, or several with weights of
their own.

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

A later stage has a tree of its own, whose visits m count from the stage's first row. Its sources
begin with the visits that they have had before, which need no counting: of the m visits of a node,
m A // B went left. So a source goes on with the row that it would have given next, and its epochs
run on over stages. Here the weights are 1 and 4 from row 3 on, before which source 0 has had one
visit and source 1 has had two, all of its rows:

    n = 3 + m   m A mod B   + A >= B   source   before + its visit   index
    3 = 3 + 0   0           1: right   1        2 + 0, epoch 1       1
    4 = 3 + 1   1           2: right   1        2 + 1, epoch 1       0
    7 = 3 + 4   4           5: left    0        1 + 0, epoch 0       1

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
    >>> source, index = Order([3, 2], rows=[3, 2], seed=0, later=[(3, [1, 4])]).locate(0, 8)
    >>> source.tolist(), index.tolist()
    ([1, 0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 1])

    Args:
        weights: whole numbers, one a source; a source's share of all rows. A source of weight 0
            gives none.
        rows: the rows that each source has.
        seed: seed of the permutations.
        later: the stages behind the first, in their order: the run's row that each begins with,
            and its weights.

    Raises:
        InputError: the weights of a stage sum to 2**31 or more.
    """

    def __init__(
        self,
        weights: Sequence[int],
        rows: Sequence[int],
        seed: int,
        later: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        assert len(rows) > 0 and min(rows) >= 1
        self._stages = [(0, list(weights)), *((first, list(found)) for first, found in later)]
        for _, found in self._stages:
            assert len(found) == len(rows) and min(found) >= 0 < sum(found)
            if sum(found) >= 2**31:
                raise InputError(
                    f"data.sources: the weights (or rows) sum to {sum(found)}, which is not below "
                    "2**31; give every source a smaller weight"
                )
        self._rows = np.asarray(rows, np.int64)
        self._grow_trees()
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

    def visits(self, row: int) -> list[int]:
        """How many rows each source has given before the run's row `row`."""
        found = [0] * len(self._rows)
        begins = [first for first, _ in self._stages]
        for (first, weights), end in zip(self._stages, [*begins[1:], row], strict=True):
            given = _visits_in_a_stage(weights, max(0, min(end, row) - first))
            found = [sum(pair) for pair in zip(found, given, strict=True)]
        return found

    def _grow_trees(self) -> None:
        """The stages' trees as arrays of their nodes, one stage's nodes behind the other's.

        The first nodes of a tree are its leaves, one a source. A leaf leads to itself, so that all
        rows can take as many steps as the trees are deep. All trees have one shape.
        """
        nodes: list[tuple[int, int, int, int]] = []  # left, right, A, B

        def grow(weights: list[int], first: int, start: int, stop: int) -> tuple[int, int]:
            """Node over the sources start .. stop - 1, whose leaves begin at `first`; its depth."""
            if stop - start == 1:
                return first + start, 0
            middle = (start + stop) // 2
            left, left_depth = grow(weights, first, start, middle)
            right, right_depth = grow(weights, first, middle, stop)
            nodes.append((left, right, sum(weights[start:middle]), sum(weights[start:stop])))
            return len(nodes) - 1, 1 + max(left_depth, right_depth)

        roots = []
        for _, weights in self._stages:
            leaves = range(len(nodes), len(nodes) + len(weights))
            nodes += [(leaf, leaf, 1, 1) for leaf in leaves]
            root, self._depth = grow(weights, leaves.start, 0, len(weights))
            roots.append(root)
        self._tree = len(nodes) // len(roots)  # nodes of one
        self._left, self._right, self._share, self._total = np.array(nodes, np.int64).T.copy()
        self._roots = np.array(roots, np.int64)
        self._begins = np.array([first for first, _ in self._stages], np.int64)
        # The visits of a leaf's source before the leaf's stage; 0 of inner nodes.
        before = np.zeros((len(roots), self._tree), np.int64)
        for stage, (first, weights) in enumerate(self._stages):
            before[stage, : len(weights)] = self.visits(first)
        self._before = before.reshape(-1)

    def _choose_source(self, row: Integers) -> tuple[Integers, Integers]:
        """The run's rows -> (source, visit of that source)."""
        stage = np.searchsorted(self._begins, row, side="right") - 1
        visit = row - self._begins[stage]
        node = self._roots[stage]
        for _ in range(self._depth):
            share, total = self._share[node], self._total[node]
            # m A itself would overflow, so m is first split into whole cycles of B and a rest.
            cycles, rest = np.divmod(visit, total)
            left_in_cycle, remainder = np.divmod(rest * share, total)
            left_before = cycles * share + left_in_cycle
            goes_left = remainder + share >= total
            visit = np.where(goes_left, left_before, visit - left_before)
            node = np.where(goes_left, self._left[node], self._right[node])
        return node % self._tree, visit + self._before[node]

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


def _visits_in_a_stage(weights: Sequence[int], count: int) -> list[int]:
    """How the first `count` visits of the tree over these weights fall to its leaves."""
    if len(weights) == 1:
        return [count]
    left, right = weights[: len(weights) // 2], weights[len(weights) // 2 :]
    goes_left = count * sum(left) // max(sum(weights), 1)  # of weight 0 there is no visit
    return _visits_in_a_stage(left, goes_left) + _visits_in_a_stage(right, count - goes_left)


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
