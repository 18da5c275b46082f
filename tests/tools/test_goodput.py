"""The sum by which goodput follows from what a kill and a checkpoint cost."""

import importlib
from types import ModuleType

import pytest

from tests.running import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools" / "bench")
        return importlib.import_module("goodput")


@pytest.mark.parametrize(
    ("interval", "noticed", "expected"),
    [
        # 60 s done twice, 4 while the checkpoint was written, 20 to restart, 30 saves of 0.5 s
        (120.0, 0.0, 1 - (60 + 4 + 20 + 15) / 3600),
        (300.0, 0.0, 1 - (150 + 4 + 20 + 6) / 3600),
        (120.0, 105.0, 1 - (60 + 4 + 20 + 105 + 15) / 3600),
    ],
)
def test_one_kill_an_hour(
    bench: ModuleType, interval: float, noticed: float, expected: float
) -> None:
    """Oracle: by hand."""
    costs = {"hold": 0.5, "whole": 4.0, "restart": 20.0}
    found = bench.goodput(interval, costs, found=noticed, every=3600.0)
    assert found == pytest.approx(expected)
    kind = "hung" if noticed else "killed"
    assert bench.hourly(costs)[f"{kind}, {interval:g} s"] == pytest.approx(expected)


def test_a_new_life_is_known_by_its_first_line(bench: ModuleType) -> None:
    """Oracle: by hand; the survivor of two processes writes one more line after the kill."""
    lines = [
        {"step": 7, "wall": 9.0, "spent": {"restarting": 2.0}, "clock": {"monotonic": 90.0}},
        {"step": 8, "wall": 10.0, "spent": {}, "clock": {"monotonic": 101.0}},
        {"step": 6, "wall": 15.0, "spent": {"restarting": 4.0}, "clock": {"monotonic": 106.0}},
        {"step": 9, "wall": 16.0, "spent": {}, "clock": {"monotonic": 107.0}},
    ]
    first = bench._first_of_a_life(lines, 100.0)
    assert first == lines[2] and bench._first_of_a_life(lines[:2], 100.0) is None
    assert [bench._is_new(line, first, lines[1]) for line in lines] == [False] * 3 + [True]
