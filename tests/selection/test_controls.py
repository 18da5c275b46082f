"""Budgets, kept rows and draws, and the selectors that need no features."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.selection.controls import (
    KeptRows,
    LargestLoss,
    Stratified,
    Uniform,
    allocate,
    draw,
)

NONE = torch.zeros(0)


def pool(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources and ascending numbers of a pool with so many rows of each source."""
    sources = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(10 * len(sources), generator=generator)[: len(sources)].sort().values
    return sources[torch.randperm(len(sources), generator=generator)], numbers


@given(st.lists(st.integers(0, 200), min_size=1, max_size=9), st.data(), st.booleans())
def test_budgets_are_whole_and_near_their_shares(
    counts: list[int], data: st.DataObject, up: bool
) -> None:
    """Oracle: sum, caps, and at most 1 from the exact share, of every budget that fits."""
    budget = data.draw(st.integers(0, sum(counts)))
    shares = allocate(counts, budget, "ceil" if up else "floor")
    assert sum(shares) == budget
    for share, count in zip(shares, counts, strict=True):
        assert 0 <= share <= count and abs(share - budget * count / max(sum(counts), 1)) <= 1


def test_kept_rows_are_all_kept_and_the_rest_is_shared_out() -> None:
    """Oracle: the counts of the picks a source."""
    sources, numbers = pool([40, 20, 5, 3])
    kept = KeptRows({2, 3}, seed=1)
    chosen = kept.select(sources, 38, numbers)
    assert Counter(sources[chosen].tolist()) == {0: 20, 1: 10, 2: 5, 3: 3}
    assert chosen.tolist() == sorted(set(chosen.tolist())) and not kept.full


@pytest.mark.parametrize(("budget", "full"), [(9, True), (8, True), (4, True), (10, False)])
def test_more_kept_rows_than_the_batch_holds(budget: int, full: bool) -> None:
    """Oracle: the kept sources share the batch out by their rows; a step without room for others is
    counted."""
    sources, numbers = pool([30, 6, 3])
    kept = KeptRows({1, 2}, seed=1)
    found = Counter(sources[kept.select(sources, budget, numbers)].tolist())
    assert kept.full == full and kept.figures()["kept_rows_fill_the_batch"] == full
    if full:
        assert [found[1], found[2]] == allocate([6, 3], budget) and not found[0]
    else:
        assert found == {0: 1, 1: 6, 2: 3}


def test_without_kept_sources_every_source_gets_its_share() -> None:
    """Oracle: allocate over all sources."""
    sources, numbers = pool([30, 6, 4])
    found = Counter(sources[KeptRows(set(), 0).select(sources, 10, numbers)].tolist())
    assert [found[q] for q in range(3)] == allocate([30, 6, 4], 10) == [7, 2, 1]


@pytest.mark.parametrize(
    "selector",
    [Uniform(3), Stratified(KeptRows({2}, 3)), LargestLoss()],
    ids=["random", "stratified", "loss"],
)
def test_picks_depend_on_numbers_alone(selector: Uniform | Stratified | LargestLoss) -> None:
    """Oracle: the same row numbers from the pool in another order, and losses that tie."""
    sources, numbers = pool([20, 15, 5])
    losses = torch.arange(40.0) // 7
    here = numbers[selector.select(NONE, losses, sources, 16, numbers)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    there = selector.select(NONE, losses[order], sources[order], 16, numbers[order])
    assert there.tolist() == there.sort().values.tolist()
    assert sorted(numbers[order][there].tolist()) == sorted(here.tolist())


def test_draws_are_uniform_and_change_with_the_seed() -> None:
    """Oracle: each of 10 rows in 2000 draws of 3 is picked 600 +- 20 times; 5 standard errors."""
    counts: Counter[int] = Counter()
    rows = torch.arange(10)
    for step in range(2000):
        counts.update(draw(rows, 3, rows + 10 * step, seed=5).tolist())
    assert all(abs(counts[row] - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for row in range(10))
    assert draw(rows, 5, rows, 1).tolist() != draw(rows, 5, rows, 2).tolist()


def test_the_largest_losses_are_picked_and_ties_go_to_lower_numbers() -> None:
    """Oracle: written out."""
    losses = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    numbers = torch.tensor([5, 6, 7, 8, 9])
    assert LargestLoss().select(NONE, losses, NONE, 3, numbers).tolist() == [1, 2, 3]


@pytest.mark.parametrize("budget", [10, 20, 60])
def test_the_mixture_that_is_trained_on(budget: int) -> None:
    """Oracle: the picks of 400 pools drawn from the mixture, within half a row of the batch, which
    whole budgets may shift."""
    mixture = [0.5, 0.3, 0.15, 0.05]
    kept, generator = KeptRows({2, 3}, 0), torch.Generator().manual_seed(0)
    found = torch.zeros(4)
    for step in range(400):
        sources = torch.multinomial(torch.tensor(mixture), 80, True, generator=generator)
        chosen = kept.select(sources, budget, torch.arange(80) + 80 * step)
        found += sources[chosen].bincount(minlength=4)
    expected = torch.tensor(kept.shares(mixture, 80, budget))
    assert expected.sum() == pytest.approx(1)
    torch.testing.assert_close(found / found.sum(), expected, atol=max(0.5 / budget, 0.02), rtol=0)
