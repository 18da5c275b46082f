"""Facility location: bounds, order, ties, invariances, cluster sizes, what it costs."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmnorm.selection.facility_location import (
    cluster_sizes,
    facility_location,
    similarity_of,
)

Matrix = NDArray[np.floating]


def points(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def objective(alike: Matrix, picks: object) -> float:
    """F by its definition."""
    return float(np.maximum(alike[:, list(picks)], 0).max(1, initial=0).astype("f8").sum())  # type: ignore[call-overload]


def naive(alike: Matrix, budget: int) -> list[int]:
    """Greedy by its definition: every row's gain is computed anew for every pick."""
    order: list[int] = []
    for _ in range(budget):
        found = {
            row: objective(alike, [*order, row]) for row in range(len(alike)) if row not in order
        }
        order.append(max(found, key=lambda row: (found[row], -row)))
    return order


def test_greedy_reaches_what_is_proven() -> None:
    """Oracle: the best of all subsets; Nemhauser, Wolsey and Fisher's 1 - 1/e, and what greedy
    picks of such pools reach: .994 of the best on average."""
    shares = []
    for seed, budget in itertools.product(range(20), (2, 3, 4)):
        alike = similarity_of(points(12, 4, seed), "l1")
        best = max(objective(alike, s) for s in itertools.combinations(range(12), budget))
        shares.append(objective(alike, facility_location(alike, budget)[0]) / best)
    assert min(shares) > 1 - 1 / np.e and np.mean(shares) > 0.985


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_lazy_picks_are_the_greedy_ones(metric: str) -> None:
    """Oracle: the naive greedy; picks of a smaller budget are a prefix, gains shrink and sum to
    F."""
    alike = similarity_of(points(40, 7, 3), metric)
    order, gains = facility_location(alike, 20)
    assert order.tolist() == naive(alike, 20)
    assert (np.diff(gains) <= 1e-9).all() and gains[-1] > 0
    assert gains.sum() == pytest.approx(objective(alike, order), rel=1e-12)
    assert facility_location(alike, 11)[0].tolist() == order[:11].tolist()


def test_ties_go_to_the_first_row() -> None:
    """Oracle: the naive greedy on small whole numbers, where nearly every gain ties."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        features = torch.randint(0, 3, (14, 2), generator=generator).float()
        alike = similarity_of(features, "l1")
        assert facility_location(alike, 14)[0].tolist() == naive(alike, 14)


def test_rows_may_come_in_any_order() -> None:
    """Oracle: the picks of the same rows in another order; the gains are equal to the bit, and the
    picks up to the 10th, where two rows tie that are nearest to each other."""
    features = points(60, 9, 5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(7))
    here, gains = facility_location(similarity_of(features, "l1"), 12)
    there, same = facility_location(similarity_of(features[order], "l1"), 12)
    assert gains.tolist() == same.tolist()
    assert order[torch.from_numpy(there)].tolist()[:9] == here.tolist()[:9]


def test_the_last_bits_decide_nothing() -> None:
    """Oracle: the picks of the same numbers; among 40 numbers on a line nearly every late pick is
    one of two that are nearest to each other, which tie, and noise of 1e-15 does not part them."""
    numbers = points(40, 1, 11).double()
    picks = facility_location(similarity_of(numbers, "l1"), 25)[0].tolist()
    for seed in range(10):
        noise = 1e-15 * points(40, 1, seed).double()
        assert facility_location(similarity_of(numbers + noise, "l1"), 25)[0].tolist() == picks


def test_what_changes_no_picks() -> None:
    """Oracle: the same picks of scaled features, and with a number added to all similarities."""
    features = points(50, 6, 8)
    alike = similarity_of(features, "l1")
    picks = facility_location(alike, 15)[0].tolist()
    assert facility_location(similarity_of(4 * features, "l1"), 15)[0].tolist() == picks
    assert facility_location(alike.astype("f8") + 100.0, 15)[0].tolist() == picks
    squared = facility_location(similarity_of(features, "l2"), 15)[0].tolist()
    assert facility_location(similarity_of(features / 8, "l2"), 15)[0].tolist() == squared


def test_no_row_and_its_copy_while_another_is_left() -> None:
    """Oracle: in a pool that holds every row twice, half of it is every row once; what the picks
    cover does not depend on the copies."""
    features = points(24, 5, 2)
    twice = similarity_of(torch.cat([features, features]), "l1")
    order, gains = facility_location(twice, 24)
    assert sorted((order % 24).tolist()) == list(range(24))
    once = facility_location(similarity_of(features, "l1"), 10)[1]
    np.testing.assert_allclose(gains[:10], 2 * once, rtol=1e-6)


def test_the_first_and_the_last_budget() -> None:
    """Oracle: one pick is the medoid, whose distances to all others have the lowest sum; all picks
    are all rows."""
    features = points(30, 4, 4)
    distances = torch.cdist(features, features, p=1)
    assert facility_location(similarity_of(features, "l1"), 1)[0][0] == distances.sum(0).argmin()
    order, _ = facility_location(similarity_of(features, "l1"), 30)
    assert sorted(order.tolist()) == list(range(30))
    assert facility_location(similarity_of(features[:1], "l1"), 1)[0].tolist() == [0]
    assert facility_location(similarity_of(features, "l1"), 0)[0].tolist() == []


def test_similarities_are_distances_from_the_farthest_pair() -> None:
    """Oracle: float64 distances by their definition; cosines of the angles."""
    features = points(20, 8, 6)
    wide = features.double()
    apart = (wide[:, None] - wide).abs().sum(-1)
    lengths = (wide[:, None] - wide).square().sum(-1).sqrt()
    for metric, distance in (("l1", apart), ("l2", lengths)):
        found = torch.from_numpy(similarity_of(features, metric)).double()
        torch.testing.assert_close(found, distance.max() - distance, atol=1e-5, rtol=0)
        assert (found == found.t()).all() and (found.diagonal() == found.max()).all()
    found = torch.from_numpy(similarity_of(features, "cosine")).double()
    angles = torch.nn.functional.cosine_similarity(wide[:, None], wide, dim=-1)
    torch.testing.assert_close(found, angles, atol=1e-6, rtol=0)


def test_a_negative_similarity_covers_nothing() -> None:
    """Oracle: F by its definition, which counts from 0."""
    alike = np.array([[1.0, -0.5], [-0.5, 1.0]])
    assert facility_location(alike, 2)[1].tolist() == [1.0, 1.0]


def test_cluster_sizes_count_every_row_once() -> None:
    """Oracle: each row's most similar pick, of equals the earlier one."""
    alike = similarity_of(points(33, 3, 9), "l1")
    order, _ = facility_location(alike, 6)
    sizes = cluster_sizes(alike, order)
    nearest = [max(range(6), key=lambda p: (alike[row, order[p]], -p)) for row in range(33)]
    assert sizes.tolist() == [nearest.count(p) for p in range(6)] and sizes.sum() == 33
    copies = similarity_of(torch.zeros(4, 2), "l1")
    assert cluster_sizes(copies, np.array([2, 0])).tolist() == [3, 1]
