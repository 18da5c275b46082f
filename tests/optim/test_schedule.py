"""Schedules against their closed forms, and the properties that every schedule has."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.optim.schedule import (
    ConstantSettings,
    CosineSettings,
    HyperparameterSchedule,
    LinearSettings,
    MomentumWarmup,
    WSDSettings,
)

EVERY = [CosineSettings, LinearSettings, WSDSettings, ConstantSettings]


@pytest.mark.parametrize("schedule", EVERY)
@given(warmup=st.integers(0, 20), more=st.integers(1, 300))
def test_warms_up_from_one_share_and_stays_between_0_and_1(schedule, warmup, more) -> None:
    steps = warmup + more
    factor = schedule(warmup=warmup).build(steps)
    values = [factor(s) for s in range(steps)]
    assert values[:warmup] == [(s + 1) / warmup for s in range(warmup)]
    assert all(0 <= v <= 1 for v in values)
    after = values[warmup:]
    assert all(later <= earlier + 1e-15 for earlier, later in zip(after, after[1:], strict=False))


@pytest.mark.parametrize("schedule", [CosineSettings, LinearSettings, WSDSettings])
@given(final=st.floats(0, 1), warmup=st.integers(0, 10), more=st.integers(3, 200))
def test_the_last_step_has_the_final_factor(schedule, final, warmup, more) -> None:
    steps = warmup + more
    last = schedule(warmup=warmup, final=final).build(steps)(steps - 1)
    assert last == pytest.approx(final, abs=1e-12)


def test_cosine_is_the_formula() -> None:
    factor = CosineSettings(warmup=4, final=0.1).build(24)
    for s in range(4, 24):
        assert factor(s) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (s - 4) / 19)))


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_wsd_is_stable_then_decays_over_its_share(shape) -> None:
    factor = WSDSettings(warmup=5, decay=0.25, shape=shape, final=0.2).build(100)
    assert [factor(s) for s in range(5, 75)] == [1.0] * 70
    for s in range(75, 100):
        u = (s - 74) / 25
        expected = 1 - 0.8 * u if shape == "linear" else 0.2 + 0.8 * (1 - math.sqrt(u))
        assert factor(s) == pytest.approx(expected)


def test_a_decay_of_two_or_more_is_a_number_of_steps() -> None:
    """Oracle: the same decay as a share; where the rate is at its peak for the last time."""
    for steps in (100, 260):
        factor = WSDSettings(warmup=5, decay=25).build(steps)
        assert [factor(steps - 27), factor(steps - 26)] == [1, 1] and factor(steps - 25) < 1
        assert factor(steps - 1) == 0
    one, other = (WSDSettings(warmup=5, decay=decay).build(100) for decay in (25, 0.25))
    assert [one(s) for s in range(100)] == [other(s) for s in range(100)]
    assert [WSDSettings(decay=d).decay_steps(40) for d in (1, 1.0, 2.0, 3e1)] == [40, 40, 2, 30]
    for wrong in (0, -3, 1.5, 2.5, True, "x"):
        with pytest.raises(ValueError, match="share of all steps, above 0|least 2 steps"):
            WSDSettings(decay=wrong)


def test_warmup_below_one_is_a_share() -> None:
    assert CosineSettings(warmup=0.1).warmup_steps(200) == 20
    assert CosineSettings(warmup=7).warmup_steps(200) == 7
    assert CosineSettings(warmup=0.1).build(200)(9) == 0.5


@pytest.mark.parametrize("schedule", EVERY)
def test_a_run_of_one_step(schedule) -> None:
    assert 0 <= schedule(warmup=0).build(1)(0) <= 1


def test_momentum_warms_up_in_a_straight_line() -> None:
    """Oracle: modded-nanogpt's line, written out; exact at both ends."""
    warmup = MomentumWarmup(**{"from": 0.85, "to": 0.95, "steps": 300})
    for step in (0, 1, 150, 299, 300, 10_000):
        frac = min(step / 300, 1)
        assert warmup.at(step) == (1 - frac) * 0.85 + frac * 0.95
    assert (warmup.at(0), warmup.at(300), warmup.at(301)) == (0.85, 0.95, 0.95)


def test_a_step_sets_every_groups_hyperparameters() -> None:
    """Oracle: the products written out; a group without a momentum gets none."""
    lr = {"matrices": lambda step: step / 10, "auxiliary": lambda step: 1.0}
    groups = [
        {"kind": "matrices", "peak_lr": 2.0, "lr": 2.0, "momentum": 0.0, "weight_decay": 0.1},
        {"kind": "auxiliary", "peak_lr": 3.0, "lr": 0.0, "weight_decay": 0.0},
    ]
    HyperparameterSchedule(lr, momentum=lambda step: 0.5 + step / 100).set(groups, 5)
    assert groups == [
        {"kind": "matrices", "peak_lr": 2.0, "lr": 1.0, "momentum": 0.55, "weight_decay": 0.1},
        {"kind": "auxiliary", "peak_lr": 3.0, "lr": 3.0, "weight_decay": 0.0},
    ]
