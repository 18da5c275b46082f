"""The simulation of EXSPEC's groups on a tiny scale."""

import importlib
import re
from typing import Any

import pytest

from llmnorm.generation.exspec import Schedule
from tests.running import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("exspec_groups")


def test_rates_are_printed(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a rate and rows a round for each order and kind of group."""
    assert bench.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"\d+\.\d% \(\d\.\d\)", printed)) == 9


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_rows_that_gain_alike_stay_together(bench: Any, acceptance: float) -> None:
    """Oracle: rows of one length that all gain 1, or K + 1, tokens a round are always a group."""
    lengths, schedule = [7] * 8, Schedule(batch=4, window=8, patience=99)
    assert bench.simulated(lengths, schedule, acceptance, 3, 16) == (1.0, 4.0)


def test_rows_of_different_lengths_never_are(bench: Any) -> None:
    """Oracle: without drafts all lengths grow by one, and stay apart."""
    lengths, schedule = [1, 30, 60, 90], Schedule(batch=2, window=4)
    assert bench.simulated(lengths, schedule, 0.0, 0, 10).grouped == 0
    assert bench.simulated(lengths, Schedule(batch=2, window=4, page=200), 0.0, 0, 10).grouped > 0.9
