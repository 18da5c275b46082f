"""What a run's time was spent on: sums that no kill can falsify, by clocks of the test's own."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmnorm.machine.phases import LOOP, Phases
from llmnorm.runs import account as module
from llmnorm.runs.account import Account, Stamp, Timekeeper, account_of, read_account
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import Entry, append_whole, plan_cut
from llmnorm.runs.metrics import keep_until
from tests.running import ROOT

HOUR = 3600.0


class Clock:
    """One that is moved by hand: `unix` is set by an operator, `monotonic` never."""

    def __init__(self) -> None:
        self.monotonic, self.unix, self.boot = 1000.0, 1.7e9, "a"

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.unix += seconds

    def now(self) -> Stamp:
        return Stamp(self.unix, self.boot, self.monotonic)

    def phases(self) -> Phases:
        return Phases(lambda: self.monotonic)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module.Stamp, "now", clock.now)
    return clock


def entry(number: int, spent: Any, wall: float = 0.0, clock: Any = None) -> Entry:
    value = {"step": number, "spent": spent, "wall": wall, "clock": clock}
    return Entry(number, json.dumps(value).encode(), value)


def test_a_lines_time_is_what_the_phases_took(clock: Clock) -> None:
    """Oracle: the moments of the test's own clock, added up by hand."""
    phases = clock.phases()
    clock.pass_(7)
    keeper = Timekeeper(Account(), phases)
    clock.pass_(1)  # still before the first step
    for phase, seconds in (("data", 2), ("forward", 3), ("backward", 4), ("exchange", 5)):
        phases.enter(phase)
        clock.pass_(seconds)
    phases.enter(LOOP)
    clock.pass_(0.5)
    line = keeper.line()
    assert line["spent"] == {"starting": 8, "data": 2, "training": 12.5}
    assert (line["wall"], line["goodput"]) == (22.5, round(14.5 / 22.5, 6))
    assert line["clock"] == clock.now()._asdict()
    with phases.during("evaluation"):
        clock.pass_(10)
    with phases.during("save"):
        clock.pass_(1.5)
    line = keeper.line()
    assert line["spent"] == {"evaluation": 10, "saving": 1.5} and line["wall"] == 34
    assert line["goodput"] == round(14.5 / 34, 6)


def test_what_is_done_twice_counts_once() -> None:
    """Oracle: by hand; two steps are taken back, with the restart that came before them."""
    kept = [entry(1, {"starting": 5, "training": 1}), entry(2, {"training": 1, "data": 0.5})]
    again = [entry(3, {"restarting": 4, "training": 2}), entry(4, {"training": 1, "saving": 0.25})]
    found = account_of(kept, again)
    assert found.seconds == {
        **{"training": 2, "data": 0.5, "waiting": 0, "evaluation": 0, "saving": 0},
        **{"starting": 5, "restarting": 4},
    }
    assert (found.twice, found.restarts, found.wall) == (3.25, 1, 14.75)
    assert found.goodput == pytest.approx(2.5 / 14.75)
    # Killed between the two files: the lines are in both, and count as taken back.
    assert account_of([*kept, *again], again) == found


@pytest.mark.parametrize(
    "spent",
    [None, 3, [1], {}, {"training": "x"}, {"training": True}, {"training": float("nan")}],
)
def test_a_line_without_times_has_none(spent: Any) -> None:
    """Oracle: an empty account; lines of older versions, and damaged ones."""
    found = account_of([entry(1, spent)], [entry(2, spent)])
    assert found == Account() and found.goodput == 0


@pytest.mark.parametrize(
    ("set_by", "boot", "expected"),
    [(0, "a", 50), (-HOUR, "a", 50), (HOUR, "a", 50), (0, "b", 50), (-HOUR, "b", 0)],
)
def test_a_clock_that_is_set_moves_nothing(
    clock: Clock, set_by: float, boot: str, expected: float
) -> None:
    """Oracle: by hand; 50 s pass. After a boot only the time of day is left to tell it by."""
    before = clock.now()
    clock.pass_(50)
    clock.unix += set_by
    clock.boot = boot
    if boot == "b":
        clock.monotonic = 3.0
    assert clock.now().since(before) == expected
    account = account_of([entry(1, {"training": 9}, 9.0, before._asdict())], [])
    keeper = Timekeeper(account, clock.phases(), resumed=True)
    assert keeper.line()["spent"] == {"restarting": expected}


def test_nothing_else_in_a_run_reads_the_time_of_day() -> None:
    """Oracle: the source. The server tells its clients when an answer was made."""
    package = ROOT / "llmnorm"
    reads = re.compile(r"\btime\.time\(|\bdatetime\.(now|today|utcnow)\(")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if reads.search(file.read_text())
    }
    assert found == {"runs/account.py", "serving/answers.py", "serving/loading.py"}


def test_the_time_after_an_end_is_not_the_runs(clock: Clock) -> None:
    """Oracle: by hand; a run that is DONE is made longer a week later."""
    account = account_of([entry(1, {"training": 9}, 9.0, clock.now()._asdict())], [])
    clock.pass_(7 * 24 * HOUR)
    phases = clock.phases()
    clock.pass_(6)
    assert Timekeeper(account, phases).line()["spent"] == {"restarting": 6}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_no_kill_falsifies_the_sums(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every line that was ever finished, kept by the test; and the test's own clock.

    100 lives of a run that saves every third step. Each is killed at a random moment: in the middle
    of a line, between two writes of a resume, or half-way through the file of repeated lines.
    """
    run, chance = RunDirectory(tmp_path), random.Random(3)
    finished: dict[bytes, int] = {}
    began, saved, most = clock.monotonic, 0, 0

    def live() -> None:
        nonlocal saved, most
        phases = clock.phases()
        clock.pass_(chance.uniform(1, 5))
        there = keep_until(run, saved)
        there.apply()
        keeper = Timekeeper(read_account(run), phases, resumed=True)
        clock.pass_(chance.uniform(0, 1))
        for step in range(saved + 1, saved + 100):
            phases.enter("data")
            clock.pass_(chance.uniform(0, 0.1))
            phases.enter("forward")
            clock.pass_(chance.uniform(0.5, 1))
            phases.enter(LOOP)
            raw = json.dumps({"step": step, **keeper.line()}).encode()
            with run.metrics.open("ab") as file:
                if chance.random() < 0.1:
                    file.write(raw[: chance.randrange(len(raw))])
                    raise Killed
                file.write(raw + b"\n")
            finished[raw] = step
            if step % 3 == 0:
                with phases.during("save"):
                    clock.pass_(0.25)
                saved = step
            most = max(most, step)
            if chance.random() < 0.15:
                raise Killed

    def torn(path: Path, lines: list[bytes]) -> None:
        append_whole(path, lines[: len(lines) // 2])
        with path.open("ab") as file:
            file.write(lines[-1][:20] if lines else b"")
        raise Killed

    cut = type(plan_cut(run.metrics, 0))
    for _ in range(100):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            match chance.randrange(8):
                case 0:
                    patch.setattr("llmnorm.runs.metrics.append_whole", torn)
                case 1:
                    patch.setattr(cut, "apply", lambda _: (_ for _ in ()).throw(Killed))
            live()
        clock.pass_(chance.uniform(0, 9))
    keep_until(run, saved).apply()
    found = read_account(run)
    kept = sum(
        json.loads(raw)["spent"]["training"] for raw in run.metrics.read_bytes().splitlines()
    )
    spent = [json.loads(raw)["spent"] for raw in finished]
    everything = sum(seconds for each in spent for seconds in each.values())
    assert most > 50 and len(finished) > saved
    assert found.seconds["training"] == pytest.approx(kept)
    assert found.wall == pytest.approx(everything)
    assert found.restarts == sum("restarting" in each for each in spent)
    # By the clock, from the first line on: what a process did before any line is not known.
    assert found.last is not None
    first = json.loads(next(iter(finished)))
    from_first = found.last.monotonic - first["clock"]["monotonic"]
    assert found.wall - first["wall"] == pytest.approx(from_first)
    assert first["wall"] <= first["clock"]["monotonic"] - began
