"""The order of rows against its definition in plain Python, and as a permutation."""

import doctest
import hashlib
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.data import order as order_of_rows
from llmnorm.data.order import Order
from llmnorm.part import InputError

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def visits_one_by_one(weights: list[int], count: int) -> list[int]:
    """The sources of the first rows, by walking the tree with counters instead of formulas."""

    def build(start: int, stop: int):
        if stop - start == 1:
            return start
        middle = (start + stop) // 2
        return {
            "left": build(start, middle),
            "right": build(middle, stop),
            "A": sum(weights[start:middle]),
            "B": sum(weights[start:stop]),
            "error": 0,
        }

    root, found = build(0, len(weights)), []
    for _ in range(count):
        node = root
        while isinstance(node, dict):
            # Bresenham: the error grows by A at every visit and is paid back by a step to the left.
            node["error"] += node["A"]
            if node["error"] >= node["B"]:
                node["error"] -= node["B"]
                node = node["left"]
            else:
                node = node["right"]
        found.append(node)
    return found


@given(weights=WEIGHTS, count=st.integers(1, 400))
def test_sources_follow_the_tree_of_bresenham_lines(weights, count) -> None:
    source, _ = Order(weights, [7] * len(weights), 0).locate(0, count)
    assert source.tolist() == visits_one_by_one(weights, count)


@given(weights=WEIGHTS, count=st.integers(1, 2000))
def test_every_prefix_holds_the_sources_in_proportion(weights, count) -> None:
    # Oracle: a Bresenham line is less than 1 off; errors add up over the tree's depth (<= 3 here).
    source, _ = Order(weights, [9] * len(weights), 1).locate(0, count)
    counts = np.bincount(source, minlength=len(weights))
    share = np.array(weights) / sum(weights) * count
    assert np.abs(counts - share).max() < 4


@settings(max_examples=20)
@given(rows=st.lists(st.integers(1, 3000), min_size=1, max_size=4), seed=st.integers(0, 2**40))
def test_row_counts_as_weights_make_every_epoch_exact(rows, seed) -> None:
    # Oracle: the set of all rows, each once, epoch by epoch.
    order = Order(rows, rows, seed)
    everything = sorted((s, i) for s, n in enumerate(rows) for i in range(n))
    epochs = []
    for epoch in range(2):
        source, index = order.locate(epoch * sum(rows), sum(rows))
        epochs.append(list(zip(source.tolist(), index.tolist(), strict=True)))
        assert sorted(epochs[-1]) == everything
    if max(rows) > 50:
        assert epochs[0] != epochs[1]


@given(first=st.integers(0, 10**12), cut=st.integers(1, 99))
def test_a_row_does_not_depend_on_what_is_asked_with_it(first, cut) -> None:
    order = Order([5, 3, 2], [2000, 40, 1024], 11)
    whole = order.locate(first, 100)
    parts = [order.locate(first, cut), order.locate(first + cut, 100 - cut)]
    for axis in (0, 1):
        assert np.array_equal(whole[axis], np.concatenate([p[axis] for p in parts]))


def test_weights_just_below_the_limit_do_not_overflow() -> None:
    # Oracle: exact integers of Python; the split is at m A mod B + A >= B.
    weights = [2**30, 2**30 - 1]
    total, first = sum(weights), 2**40 + 12345
    source, _ = Order(weights, [10, 10], 0).locate(first, 50)
    for m, got in enumerate(source.tolist(), start=first):
        assert got == (0 if (m * weights[0]) % total + weights[0] >= total else 1)
    with pytest.raises(InputError, match=r"2\*\*31"):
        Order([2**30, 2**30], [1, 1], 0)


def test_seeds_sources_and_epochs_have_orders_of_their_own() -> None:
    # Oracle: two random permutations of 2,000 agree in about one place.
    def indices(seed: int, source: int, epoch: int) -> np.ndarray:
        order = Order([1, 1], [2000, 2000], seed)
        sources, index = order.locate(epoch * 4000, 4000)
        return index[sources == source]

    base = indices(0, 0, 0)
    for other in (indices(1, 0, 0), indices(0, 1, 0), indices(0, 0, 1), np.arange(2000)):
        assert (base == other).sum() < 12


def test_the_worked_example_is_what_the_code_gives() -> None:
    """Oracle: the five lines of the file's table, and the same numbers as a doctest of Order."""
    assert order_of_rows.__doc__
    pattern = r"^ +(\d) +(\d) +\d: (?:left|right) +(\d) .* (\d)$"
    lines = re.findall(pattern, order_of_rows.__doc__, re.M)
    source, index = Order(weights=[3, 2], rows=[3, 2], seed=0).locate(0, 5)
    n, remainder, of_source, of_index = (
        [int(x) for x in column] for column in zip(*lines, strict=True)
    )
    assert n == [0, 1, 2, 3, 4] and remainder == [3 * m % 5 for m in n]
    assert of_source == source.tolist() and of_index == index.tolist()
    results = doctest.testmod(order_of_rows)
    assert results.attempted == 4 and not results.failed


def test_the_worked_example_of_a_later_stage_is_what_the_code_gives() -> None:
    """Oracle: the three lines of the file's second table, whose row, source and index are read."""
    pattern = r"^ +(\d) = 3 \+ \d +\d +\d: (?:left|right) +(\d) .* (\d)$"
    lines = re.findall(pattern, str(order_of_rows.__doc__), re.M)
    source, index = Order([3, 2], [3, 2], 0, later=[(3, [1, 4])]).locate(0, 8)
    found = [(n, source[n], index[n]) for n in (3, 4, 7)]
    assert [tuple(map(int, line)) for line in lines] == found


STAGES = st.lists(
    st.tuples(
        st.integers(1, 150),
        st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40)
@given(stages=STAGES, rows=st.lists(st.integers(1, 1500), min_size=3, max_size=3))
def test_a_stage_goes_on_with_the_visits_that_each_source_has_had(stages, rows) -> None:
    """Oracle: in each stage a tree walked with counters from 0; of each source the rows that a run
    of it alone would give, one after the other through all stages."""
    first, later, begins = stages[0][1], [], 0
    for (length, _), (_, weights) in zip(stages, stages[1:], strict=False):
        begins += length
        later.append((begins, weights))
    order, count = Order(first, rows, 3, later), begins + stages[-1][0]
    sources = [s for length, weights in stages for s in visits_one_by_one(weights, length)]
    alone = []
    for number in range(3):
        only = [int(number == other) for other in range(3)]
        alone.append(iter(Order(only, rows, 3).locate(0, count)[1].tolist()))
    source, index = order.locate(0, count)
    assert source.tolist() == sources
    assert index.tolist() == [next(alone[s]) for s in sources]
    for row in {0, 1, begins, count // 2, count}:
        assert order.visits(row) == [sources[:row].count(number) for number in range(3)]


def test_a_run_without_later_stages_has_the_order_that_it_always_had() -> None:
    """Oracle: a hash of rows that was taken before there were stages."""
    order = Order([5, 3, 2, 7, 1, 1], [2000, 40, 1024, 5000, 3, 10**6], 11)
    found = hashlib.sha256()
    for first in (0, 10**12):
        found.update(np.stack(order.locate(first, 5000)).tobytes())
    assert found.hexdigest().startswith("88264859fbf7afa7")


def test_a_stage_that_begins_far_away_is_found_at_once() -> None:
    """Oracle: exact integers of Python: of m rows with the weights A and B - A, m A // B are the
    first source's."""
    begins, a, b = 10**14 + 7, 2**30, 2**31 - 1
    order = Order([a, b - a], [2000, 3000], 0, [(begins, [0, 1])])
    given = begins * a // b
    assert order.visits(begins) == [given, begins - given]
    source, index = order.locate(begins, 3)
    alone = Order([0, 1], [2000, 3000], 0).locate(begins - given, 3)
    assert source.tolist() == [1, 1, 1] and index.tolist() == alone[1].tolist()


@pytest.mark.parametrize("rows", [1024, 1031, 1999])
def test_eight_rounds_cannot_be_told_from_random_and_four_can(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 200 random permutations of numpy, by how often two pairs of slots that are b apart
    have equal differences of their halves; four rounds show that the count sees a weak network.
    The standard error of the compared means is about 0.1 %."""
    a = math.ceil(math.sqrt(rows))
    b = math.ceil(rows / a)

    def equal_differences(permutation: np.ndarray) -> list[float]:
        counts = []
        for half, modulus in ((permutation // b, a), (permutation % b, b)):
            _, times = np.unique((half[b:] - half[:-b]) % modulus, return_counts=True)
            counts.append(float((times * (times - 1)).sum()))
        return counts

    def excess(rounds: int) -> np.ndarray:
        monkeypatch.setattr(order_of_rows, "ROUNDS", rounds)
        found = [equal_differences(Order([1], [rows], s).locate(0, rows)[1]) for s in range(200)]
        return np.mean(found, axis=0) / expected - 1

    generator = np.random.default_rng(0)
    expected = np.mean([equal_differences(generator.permutation(rows)) for _ in range(200)], axis=0)
    assert order_of_rows.ROUNDS == 8
    assert np.abs(excess(8)).max() < 0.005
    assert excess(4)[0] > 0.04
