"""Statistics of two arms over paired seeds: the speed-up, its interval, and what can be resolved.

Symbols, over n seeds k that both arms share (equal initial weights and rows):
    h      length of a run in units of the comparison's length, its schedule complete
    L(h)   final loss of such a run, nats a token
    beta   -dL / dln h: the fall in loss, in nats, for e times the length (least squares over h)
    d_k    loss of the baseline minus loss of the arm, seed k, both at h = 1
    F      exp(mean(d) / beta): the baseline needs F times the tokens of the arm for the same loss

From a gap in loss to a factor in length: over a factor of two, loss falls linearly in the logarithm
of the length, so a gap of beta nats is a factor e.

The intervals are percentiles of the bootstrap, widened. Source: Hesterberg, "What Teachers Should
Know about the Bootstrap", arXiv 1411.5279, section 4: such an interval of n values is too narrow by
sqrt((n - 1) / n), and because it uses the normal quantile in place of Student's; with 3 seeds it
covers 75 % at best. Here the deviations from the estimate are multiplied by these two factors
(simulated in tests/analysis/compare/test_statistics.py).

What would surprise: the loss of a run that diverged is infinite, so F is 0 for its arm. Up to 5
seeds all n^n resamples are listed, so no random number enters.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 10_000  # resamples where they are too many to list
NORMAL = 1.959963984540054  # the normal distribution's quantile at (1 + LEVEL) / 2


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval; the ends are nan where there is one seed."""

    value: float
    low: float
    high: float


def slope(horizons: Sequence[float], losses: Array) -> Array:
    """beta in nats, by least squares over ln h.

    Args:
        horizons: (points,) lengths.
        losses: (..., points) final losses.

    Returns:
        (...) slopes; nan where a loss is infinite or there is one length only.
    """
    x = np.log(np.asarray(horizons, dtype=float))
    x = x - x.mean()
    with np.errstate(invalid="ignore"):
        beta = -(np.asarray(losses) @ x) / (x @ x)
    return np.where(np.isfinite(beta), beta, np.nan)


def log_speed_up(gap: Array | float, beta: Array | float) -> Array:
    """ln F for a gap in loss (the baseline's minus the arm's).

    Where longer runs gain nothing (beta <= 0), no length makes up for a gap: the result is plus or
    minus infinity by the gap's sign, and 0 for no gap.
    """
    gap, beta = np.broadcast_arrays(np.asarray(gap, dtype=float), np.asarray(beta, dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(beta > 0, gap / beta, np.where(np.isnan(beta), np.nan, gap * np.inf))
    return np.where(gap == 0, 0.0, np.where(np.isinf(gap), gap, factor))


def gaps(baseline: Array, arm: Array) -> Array:
    """d_k, (n,); 0 for a seed in which both runs diverged."""
    both = np.isinf(baseline) & np.isinf(arm)
    return np.where(both, 0.0, np.where(both, 0.0, baseline) - np.where(both, 0.0, arm))


def gap_interval(baseline: Array, arm: Array) -> Interval:
    """The mean of d in nats, and its interval.

    Args:
        baseline: (n,) final losses of the baseline, seed by seed.
        arm: (n,) those of the arm.
    """
    d = gaps(baseline, arm)
    return _interval(float(d.mean()), d[resamples(len(d))].mean(axis=1), len(d))


def speed_up_interval(
    baseline: Array,
    arm: Array,
    horizons: Sequence[float],
    curve: Array,
    log_ratio: Array | None = None,
) -> Interval:
    """F and its interval; with `log_ratio`, the factor in another cost than tokens (seconds).

    Args:
        baseline: (n,) final losses of the baseline at h = 1.
        arm: (n,) those of the arm.
        horizons: (points,) lengths of the runs of one of the two, from which beta is taken.
        curve: (n, points) final losses of those runs.
        log_ratio: (n,) log of the baseline's cost of a token over the arm's; left out, zero.
    """
    d, n = gaps(baseline, arm), len(baseline)
    extra = np.zeros(n) if log_ratio is None else log_ratio

    def log_factor(index: NDArray[np.int64]) -> Array:
        beta = slope(horizons, curve[index].mean(axis=1))
        return log_speed_up(d[index].mean(axis=1), beta) + extra[index].mean(axis=1)

    value = float(log_factor(np.arange(n)[None])[0])
    ends = _interval(value, log_factor(resamples(n)), n)
    return Interval(*(math.exp(min(end, 700.0)) for end in ends))


def resolvable(baseline: Array, arm: Array, beta: float) -> float:
    """The smallest F above 1 that these seeds could have told from 1.

    That is where the paired t-interval (95 %) around F ends at 1. nan for one seed, or where beta
    is not positive or a run diverged.
    """
    n = len(baseline)
    d = gaps(baseline, arm)
    if n < 2 or not beta > 0 or not np.isfinite(d).all():
        return math.nan
    half_width = t_quantile(n - 1) * d.std(ddof=1) / math.sqrt(n)
    return math.exp(min(half_width / beta, 700.0))


def standard_error(losses: Array) -> float:
    """The standard error of the mean of (n,) losses; nan for one seed or where a run diverged."""
    finite = len(losses) > 1 and bool(np.isfinite(losses).all())
    return float(losses.std(ddof=1) / math.sqrt(len(losses))) if finite else math.nan


def resamples(n: int) -> NDArray[np.int64]:
    """Seeds drawn with replacement: all n^n draws up to n = 5, else 10,000 of them; (draws, n)."""
    if n <= 5:
        return np.asarray(list(itertools.product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def _interval(value: float, draws: Array, n: int) -> Interval:
    if n < 2 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    if math.isinf(value):  # a run diverged: deviations from an infinite mean cannot be stretched
        stretched = draws
    else:
        widening = math.sqrt(n / (n - 1)) * t_quantile(n - 1) / NORMAL
        stretched = value + widening * (draws - value)
    stretched = stretched[~np.isnan(stretched)]
    # Quantiles that are draws themselves: a point between a number and infinity has no value.
    low = np.quantile(stretched, (1 - LEVEL) / 2, method="lower")
    high = np.quantile(stretched, (1 + LEVEL) / 2, method="higher")
    return Interval(value, float(low), float(high))


def t_quantile(dof: int) -> float:
    """Student's quantile at 97.5 % for a whole number of degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4 (the distribution as a finite sum), inverted by
    bisection.
    """
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, dof) < LEVEL else (low, middle)
    return low


def _t_within(t: float, dof: int) -> float:
    """P(|T| < t) for Student's T."""
    angle = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, dof - 1, 2):  # cos^3, cos^5 ... or cos^2, cos^4 ...
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if dof > 1 else 0.0))
