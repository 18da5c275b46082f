"""Who is slow, by the seconds of steps that are written out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmnorm.machine.phases import Phases
from llmnorm.training.stragglers import STEPS, Stragglers


class Steps:
    """Steps whose own seconds, by process, and whose length the test says."""

    def __init__(self, world: int) -> None:
        self.now, self.step = 0.0, 0
        self.phases = Phases(lambda: self.now)
        self.parallel: Any = SimpleNamespace(
            phases=self.phases, world=world, rank=world - 1, heartbeat=None
        )
        self.stragglers = Stragglers(self.parallel)

    def take(self, own: list[float], length: float, count: int = STEPS) -> list[str]:
        """The notes of so many steps."""
        notes = []
        for _ in range(count):
            self.step += 1
            self.phases.enter("forward")
            self.now += length
            self.stragglers.hear(own, self.step)
            notes += self.stragglers.notes()
        return notes


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ([0.1, 0.2], [1]),
        ([0.1, 0.14], []),
        ([0.1, 0.1, 0.2], [2]),
        ([0.1, 0.2, 0.2], []),  # two of three are the usual
        ([0.1, 0.1, 0.2, 0.2], [2, 3]),
        ([0.0, 0.0], []),
    ],
)
def test_who_works_much_longer_than_the_median_is_slow(own: list[float], slow: list[int]) -> None:
    """Oracle: 1.5 times the lower median, by hand."""
    steps = Steps(len(own))
    notes = steps.take(own, length=0.2, count=STEPS + 1)
    assert [note.split(" is slow")[0] for note in notes] == [f"rank {rank}" for rank in slow]
    assert list(steps.stragglers.counts) == slow


def test_a_host_that_works_little_holds_nobody_up() -> None:
    """Oracle: twice the median, but a tenth of the step, the rest of which is a GPU's."""
    steps = Steps(2)
    assert steps.take([0.01, 0.02], length=0.2, count=2 * STEPS) == []


def test_a_slow_process_is_named_once_and_counted_each_time() -> None:
    """Oracle: the first step is left out, then one count for every fifty."""
    steps = Steps(2)
    assert steps.stragglers.line() == {}
    assert steps.take([0.2, 0.1], length=0.2, count=STEPS) == []
    (note,) = steps.take([0.2, 0.1], length=0.2)
    assert (
        "in the steps 2 to 51 it worked 200.0 ms a step, the median of the processes 100.0" in note
    )
    assert steps.take([0.2, 0.1], length=0.2) == []
    assert steps.stragglers.line() == {"stragglers": {"0": 2}}


def test_each_process_says_its_own_seconds() -> None:
    """Oracle: the moments of the test's clock, without the wait, in the process's own place."""
    steps = Steps(3)
    steps.phases.enter("forward")
    steps.now += 2
    with steps.phases.waiting():
        steps.now += 5
    assert steps.stragglers.slots(torch.zeros(())).tolist() == [0, 0, 2]
    steps.now += 1
    assert steps.stragglers.slots(torch.zeros(())).tolist() == [0, 0, 1]
    assert Steps(1).stragglers.slots(torch.zeros(())).shape == (0,)
