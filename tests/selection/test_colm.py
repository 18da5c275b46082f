"""CoLM: Adam's update of features, coordinates, and the selector made of them.

The recorded runs of the official code (tests/nn/test_golden.py runs the files) hold the numbers.
"""

import pytest
import torch
from torch import Tensor

from llmnorm.selection.colm import AdamNormaliser, CoLM, coordinates, small_sources
from llmnorm.selection.controls import KeptRows, Stratified

NONE = torch.zeros(0)


def test_a_source_is_small_below_the_mean() -> None:
    """Oracle: section 4.1's |V_q| < |V| / c; a source of the mean size is not."""
    assert small_sources([10, 20, 30]) == {0}
    assert small_sources([7]) == small_sources([5, 5]) == set()


def test_the_normaliser_is_adam() -> None:
    """Oracle: torch.optim.Adam at learning rate 1 on one row, whose update is minus the feature."""
    normaliser = AdamNormaliser(6)
    parameter = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        row = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        before = parameter.detach().clone()
        parameter.grad = row[0]
        adam.step()
        features = normaliser.features(row)
        torch.testing.assert_close(features[0], before - parameter.detach(), atol=1e-12, rtol=0)
        normaliser.update(row)


def test_one_direction_needs_one_number_a_row() -> None:
    """Oracle: the update of whole gradients s_i z, float64: every feature is the scalar's times
    sign(z), their matrix has rank one, and l1 distances are the scalars' times the width."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, generator=generator, dtype=torch.float64)
    whole, scalar = AdamNormaliser(30, eps=0.0), AdamNormaliser(1, eps=0.0)
    for _ in range(4):
        s = torch.randn(12, 1, generator=generator, dtype=torch.float64)
        features, own = whole.features(s * z), scalar.features(s)
        torch.testing.assert_close(features, own * z.sign(), atol=1e-9, rtol=0)
        values = torch.linalg.svdvals(features)
        assert values[1] < 1e-9 * values[0]
        apart = torch.cdist(features, features, p=1)
        torch.testing.assert_close(apart, 30 * (own - own.t()).abs(), atol=1e-8, rtol=0)
        whole.update((s * z)[:5])
        scalar.update(s[:5])
        torch.testing.assert_close(whole.first, scalar.first * z, atol=1e-12, rtol=0)
        torch.testing.assert_close(whole.second, scalar.second * z**2, atol=1e-12, rtol=0)


def test_coordinates_are_those_of_the_largest_mean() -> None:
    """Oracle: written out; the official code's other choices, and more than there are."""
    features = torch.tensor([[1.0, -4.0, 0.5, 3.0], [1.0, -4.0, 0.1, -3.0]])
    assert coordinates(features, 3).tolist() == [1, 0, 2]  # of the last the mean is 0
    assert coordinates(features[:1], 3).tolist() == [1, 3, 0]
    assert coordinates(features[:1], 2, "smallest").tolist() == [2, 0]
    assert coordinates(features[:1], 3, "largest_smallest").tolist() == [2, 1, 3]
    assert sorted(coordinates(features, 9).tolist()) == [0, 1, 2, 3]


def pool(seed: int, width: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sources and numbers of 40 rows, of which 8 are of the source 2."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.tensor([0] * 20 + [1] * 12 + [2] * 8)[torch.randperm(40, generator=generator)]
    return torch.randn(40, width, generator=generator), sources, torch.arange(40) + 40 * seed


def colm(metric: str = "l1", normalise: bool = True) -> CoLM:
    return CoLM(KeptRows({2}, 0), metric=metric, dimensions=2560, normalise=normalise)


def test_the_history_moves_by_picks_of_large_sources_alone() -> None:
    """Oracle: the normaliser updated by hand with the picked rows that are not kept; a step whose
    batch the kept rows fill leaves it as it is."""
    selector, own = colm(), AdamNormaliser(1)
    for step in range(3):
        features, sources, numbers = pool(step)
        chosen = selector.select(features, NONE, sources, 20, numbers)
        assert len(chosen) == 20 and set((sources == 2).nonzero()[:, 0].tolist()) <= set(
            chosen.tolist()
        )
        own.update(features[chosen[sources[chosen] != 2]])
        for name, value in selector.state().items():
            torch.testing.assert_close(value, getattr(own, name), atol=1e-15, rtol=1e-12)
    before = {name: value.clone() for name, value in selector.state().items()}
    features, sources, numbers = pool(3)
    assert (sources[selector.select(features, NONE, sources, 6, numbers)] == 2).all()
    assert all((value == before[name]).all() for name, value in selector.state().items())


def test_a_filled_state_goes_on_as_if_it_had_never_stopped() -> None:
    """Oracle: the picks of a selector that was not stopped."""
    first, second = colm(), colm()
    for step in range(3):
        features, sources, numbers = pool(step)
        first.select(features, NONE, sources, 20, numbers)
    for name, value in second.state().items():
        value.copy_(first.state()[name])
    features, sources, numbers = pool(3)
    picks = [s.select(features, NONE, sources, 20, numbers).tolist() for s in (first, second)]
    assert picks[0] == picks[1] != colm().select(features, NONE, sources, 20, numbers).tolist()


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_picks_do_not_depend_on_the_order_of_the_pool(metric: str) -> None:
    """Oracle: the numbers that are picked of the same rows in another order; at the first step of
    one projection features are 1 or -1, and all else is a tie."""
    for width in (1, 8):
        if metric == "cosine" and width == 1:
            continue
        features, sources, numbers = pool(1, width)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
        here = colm(metric, width == 1).select(features, NONE, sources, 20, numbers)
        there = colm(metric, width == 1).select(
            features[order], NONE, sources[order], 20, numbers[order]
        )
        assert sorted(numbers[order][there].tolist()) == numbers[here].tolist()


def test_coresets_hold_fewer_copies_than_uniform_picks() -> None:
    """Oracle: in pools of which 30 % are copies of other rows, the picks that repeat another pick;
    of the coreset none while a new row is left, of uniform picks many."""
    repeats = []
    for step in range(5):
        features, sources, numbers = pool(step, 16)
        large = (sources != 2).nonzero()[:, 0]
        of = torch.arange(40)
        for q in (0, 1):
            rows = large[sources[large] == q]
            copies = len(rows) * 3 // 10
            of[rows[:copies]] = rows[copies : 2 * copies]
        found = []
        for selector in (colm("l2", normalise=False), Stratified(KeptRows({2}, 0))):
            chosen = selector.select(features[of], NONE, sources, 26, numbers)
            found.append(len(chosen) - len(of[chosen].unique()))
        repeats.append(found)
    assert all(ours == 0 for ours, _ in repeats)
    assert sum(theirs for _, theirs in repeats) >= 5


def test_what_the_picks_cover_is_a_share() -> None:
    """Oracle: all rows cover everything, and half of them less; without room for picks there is no
    such figure."""
    features, sources, numbers = pool(0, 8)
    selector = colm("l2", normalise=False)
    selector.select(features, NONE, sources, 20, numbers)
    assert 0.3 < selector.figures()["covered"] < 1
    selector.select(features, NONE, sources, 40, numbers)
    assert selector.figures()["covered"] == pytest.approx(1)
    selector.select(features, NONE, sources, 5, numbers)
    assert "covered" not in selector.figures()
