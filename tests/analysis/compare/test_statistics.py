"""Paired statistics: closed forms, simulated seeds, properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.analysis.compare.statistics import (
    gap_interval,
    log_speed_up,
    resamples,
    resolvable,
    slope,
    speed_up_interval,
    standard_error,
    t_quantile,
)

HORIZONS = (1.0, 1.25, 1.5)


def curve(losses: np.ndarray, beta: float) -> np.ndarray:
    """(n, 3) final losses that fall by beta for e times the length."""
    return losses[:, None] - beta * np.log(HORIZONS)


def test_t_quantiles_are_the_tables() -> None:
    """Oracle: the printed table of Student's distribution at 97.5 %."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}
    for dof, quantile in table.items():
        assert t_quantile(dof) == pytest.approx(quantile, abs=1e-5)
    assert t_quantile(5000) == pytest.approx(1.96044, abs=1e-4)


def test_a_line_in_the_logarithm_has_its_slope() -> None:
    """Oracle: losses made from the line."""
    losses = 3.0 - 0.12 * np.log([0.6, 0.7, 0.8, 0.9, 1.0])
    assert slope((0.6, 0.7, 0.8, 0.9, 1.0), losses) == pytest.approx(0.12)
    assert math.isnan(slope(HORIZONS, np.array([3.0, math.inf, 2.9])))


@given(
    st.floats(0.25, 4.0), st.floats(0.02, 0.5), st.floats(1.0, 8.0), st.sampled_from([1, 2, 3, 6])
)
def test_a_known_speed_up_comes_out(factor: float, beta: float, loss: float, n: int) -> None:
    """Oracle: an arm whose loss is that of a baseline trained `factor` times as long."""
    base = loss + np.arange(n) * 0.01
    found = speed_up_interval(base, base - beta * math.log(factor), HORIZONS, curve(base, beta))
    assert found.value == pytest.approx(factor, rel=1e-6)
    if n == 1:
        assert math.isnan(found.low) and math.isnan(found.high)
    else:  # the seeds agree on the gap, so nothing is uncertain
        assert found.low == pytest.approx(factor, rel=1e-6) == found.high


@given(
    st.lists(st.tuples(st.floats(2, 4), st.floats(2, 4)), min_size=2, max_size=4),
    st.floats(-1, 1),
)
def test_exchange_inverts_and_a_shift_of_all_losses_changes_nothing(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    """Oracle: symmetries of exp(mean(d) / beta) with beta held."""
    base, arm = np.array(pairs).T
    fixed = np.tile(-0.1 * np.log(HORIZONS), (len(base), 1))  # the same slope in every resample
    there = speed_up_interval(base, arm, HORIZONS, fixed)
    back = speed_up_interval(arm, base, HORIZONS, fixed)
    moved = speed_up_interval(base + shift, arm + shift, HORIZONS, fixed + shift)
    assert there.value == pytest.approx(1 / back.value, rel=1e-5)
    assert there.low == pytest.approx(1 / back.high, rel=1e-5)
    assert moved == pytest.approx(there, rel=1e-5)
    assert there.low <= there.value <= there.high


def test_equal_arms_give_exactly_one_whatever_the_slope() -> None:
    """Oracle: no gap is no factor, even where longer runs lose."""
    base = np.array([3.0, 3.1, 2.9])
    for beta in (0.1, 0.0, -0.1):
        assert speed_up_interval(base, base, HORIZONS, curve(base, beta)) == (1, 1, 1)


@pytest.mark.parametrize(("n", "trials"), [(3, 600), (4, 400), (6, 150)])
def test_the_interval_holds_what_it_promises(n: int, trials: int) -> None:
    """Oracle: simulated comparisons of a known factor; a plain percentile holds 75 % at n = 3."""
    random = np.random.default_rng(n)
    true, beta, holds, plain = 0.02, 0.12, 0, 0
    for _ in range(trials):
        shared = 3 + random.normal(0, 0.02, n)  # of a seed, whatever the arm
        base = curve(shared, beta) + random.normal(0, 0.004, (n, 3))
        arm = shared - true + random.normal(0, 0.004, n)
        found = speed_up_interval(base[:, 0], arm, HORIZONS, base)
        holds += found.low <= math.exp(true / beta) <= found.high
        means = (base[:, 0] - arm)[resamples(n)].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        plain += low <= true <= high
    assert 0.91 < holds / trials < 0.99
    assert n > 3 or plain / trials < 0.8


def test_the_smallest_resolvable_factor_is_where_the_t_test_turns() -> None:
    """Oracle: the paired t statistic, written out, is the table's at this factor."""
    base, arm, beta = np.array([3.0, 3.1, 2.9]), np.array([2.99, 3.11, 2.88]), 0.12
    gap = beta * math.log(resolvable(base, arm, beta))
    d = base - arm
    deviation = math.sqrt(sum((d - d.mean()) ** 2) / 2)
    assert gap / (deviation / math.sqrt(3)) == pytest.approx(4.30265, abs=1e-4)
    assert math.isnan(resolvable(base[:1], arm[:1], beta))
    assert math.isnan(resolvable(base, arm, -0.1))


def test_four_times_the_seeds_halve_what_can_be_resolved() -> None:
    """Oracle: the standard error's square root; normal quantiles at many seeds."""
    random = np.random.default_rng(0)
    base, arm = random.normal(3, 0.01, (2, 400))
    few = math.log(resolvable(base[:100], arm[:100], 0.1))
    many = math.log(resolvable(base, arm, 0.1))
    assert few / many == pytest.approx(2, rel=0.15)


def test_divergence_is_an_infinite_loss() -> None:
    """Oracle: by hand: an arm that diverged once is worth nothing, a tie of divergences nothing
    either way."""
    base = np.array([3.0, 3.1, 2.9])
    arm = np.array([2.5, math.inf, 2.5])
    found = speed_up_interval(base, arm, HORIZONS, curve(base, 0.1))
    assert found.value == found.low == 0.0
    assert gap_interval(base, arm).value == -math.inf
    assert math.isnan(resolvable(base, arm, 0.1)) and math.isnan(standard_error(arm))
    both = np.array([3.0, math.inf, 2.9])
    assert gap_interval(both, both) == (0, 0, 0)
    assert speed_up_interval(arm, base, HORIZONS, curve(base, 0.1)).value > 1e100


def test_where_longer_runs_gain_nothing_a_gap_has_no_length() -> None:
    """Oracle: the sign of the gap."""
    assert log_speed_up(0.1, 0.0) == math.inf and log_speed_up(-0.1, -0.2) == -math.inf
    assert log_speed_up(0.0, -0.2) == 0 and math.isnan(log_speed_up(0.1, math.nan))


def test_resamples_are_all_of_few_and_many_of_more() -> None:
    """Oracle: n^n draws; each value is drawn equally often."""
    assert len(resamples(3)) == 27 and len({tuple(r) for r in resamples(3)}) == 27
    assert np.bincount(resamples(4).ravel()).tolist() == [4**4] * 4
    counts = np.bincount(resamples(7).ravel())
    assert resamples(7).shape == (10_000, 7) and counts.min() > 9_500


def test_costs_of_a_token_enter_seed_by_seed() -> None:
    """Oracle: an arm twice as slow a token needs twice the factor for the same seconds."""
    base = np.array([3.0, 3.1, 2.9])
    arm = base - 0.1 * math.log(2)
    ratio = np.full(3, math.log(0.5))
    assert speed_up_interval(base, arm, HORIZONS, curve(base, 0.1), ratio).value == pytest.approx(1)
