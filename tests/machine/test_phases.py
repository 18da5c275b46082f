"""Phases hold what a process does and for how long, told by a clock of the test's own."""

from collections.abc import Iterator

import pytest

from llmnorm.machine.phases import LOOP, START, Phases


@pytest.fixture
def clock() -> Iterator[list[float]]:
    """The present moment, to be moved on by hand."""
    return [100.0]


@pytest.fixture
def phases(clock) -> Phases:
    return Phases(lambda: clock[0])


def test_seconds_count_for_one_phase_at_a_time(phases, clock) -> None:
    """Oracle: the moments of the test's own clock, added up by hand."""
    clock[0] += 7
    phases.enter("data")
    clock[0] += 1
    phases.enter("forward")
    clock[0] += 2
    phases.enter(LOOP)
    clock[0] += 0.5
    with phases.during("evaluation"):
        clock[0] += 3
        with phases.during("save"):
            clock[0] += 4
        clock[0] += 5
    clock[0] += 0.25
    expected = {START: 7, "data": 1, "forward": 2, LOOP: 0.75, "evaluation": 8, "save": 4}
    assert phases.seconds() == expected
    assert sum(phases.seconds().values()) == clock[0] - 100


def test_the_last_finished_phase_is_named(phases) -> None:
    """Oracle: the order in which the phases end, an inner one before the outer."""
    seen = [(phases.phase, phases.finished)]
    for phase in ("data", "forward", LOOP):
        phases.enter(phase)
        seen.append((phase, phases.finished))
    assert seen == [(START, ""), ("data", START), ("forward", "data"), (LOOP, "forward")]
    with phases.during("evaluation"):
        with phases.during("save"):
            assert (phases.phase, phases.finished) == ("save", "forward")
        assert (phases.phase, phases.finished) == ("evaluation", "save")
    assert (phases.phase, phases.finished) == (LOOP, "evaluation")


def test_an_exception_leaves_the_phase_that_it_came_from(phases) -> None:
    """Oracle: the phase inside which it is raised."""
    phases.enter(LOOP)
    with pytest.raises(ValueError, match="broken"), phases.during("save"):
        raise ValueError("broken")
    assert phases.phase == "save"


def test_all_that_happens_is_progress(phases) -> None:
    """Oracle: a number that differs after every call."""
    seen = [phases.progress]
    for call in (
        lambda: phases.enter("data"),
        phases.advance,
        lambda: phases.end_step(12),
        lambda: phases.during("save").__enter__(),
    ):
        call()
        seen.append(phases.progress)
    assert seen == sorted(set(seen)) and len(seen) == 5
    assert (phases.step, phases.own_steps) == (12, 1)
