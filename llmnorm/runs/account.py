"""What a run's wall clock was spent on, and its goodput: the share of it in steps that counted.

    metrics.jsonl            the lines of steps that counted
    metrics.repeated.jsonl   the lines that resumed runs took back, whose steps were done twice

A line of either file has `spent`, the seconds since the line before it by what they were spent on:

    training     steps: forward, backward, update, and the writing of lines
    data         a step's wait for its rows
    waiting      a step's wait for the other processes; on GPUs, where the device waits and not
                 the host, it is part of `training`
    evaluation   evaluations, and the mixers' health
    saving       the wait for checkpoints; what is written in the background costs only its copy
    starting     from the beginning of the run's first process to its first step
    restarting   from the last line of a process to the first step of the next

It also has `wall`, the sum of all this over every line so far; `goodput`; and `clock`, its moment.
Nothing else is saved. So a kill at any moment leaves sums that are exact to one line
(tests/runs/test_account.py): what a process did after its last line is counted as `restarting`.

What would surprise: of two processes only a clock that both know tells the time between them. On
one boot of one machine that is the monotonic clock, and setting the time of day changes nothing.
After a boot, or on another machine, it is the time of day; where that has gone back, the time
between counts as 0. Time after a run has ended by itself (DONE, DIVERGED) is not counted.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeGuard

from llmnorm.machine.phases import START, WAIT, Phases
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.lines import Entry, whole_lines

STEPS = ("training", "data", "waiting")
BETWEEN = ("starting", "restarting")  # time in which no step could be done
PARTS = (*STEPS, "evaluation", "saving", *BETWEEN)
# What the seconds of a phase of the main process (machine/phases.py) are; any other is training.
_OF_PHASE = {
    "data": "data",
    WAIT: "waiting",
    "health": "evaluation",
    "evaluation": "evaluation",
    "save": "saving",
}
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Stamp(NamedTuple):
    """A moment, as `clock` of a line has it.

    Attributes:
        unix: seconds since 1970, by the time of day.
        boot: names the boot that `monotonic` belongs to; empty where the system does not tell.
        monotonic: seconds of a clock that is never set.
    """

    unix: float
    boot: str
    monotonic: float

    @classmethod
    def now(cls) -> Self:
        """The present moment."""
        return cls(round(time.time(), 3), _boot(), round(time.monotonic(), 6))

    @classmethod
    def read(cls, value: Any) -> Self | None:
        """What a line holds; None where it is no moment."""
        if not isinstance(value, Mapping):
            return None
        unix, boot, monotonic = (value.get(name) for name in cls._fields)
        if _is_number(unix) and isinstance(boot, str) and _is_number(monotonic):
            return cls(unix, boot, monotonic)
        return None

    def since(self, earlier: "Stamp") -> float:
        """Seconds from an earlier moment to this one, at least 0."""
        if self.boot and self.boot == earlier.boot:
            return max(0.0, self.monotonic - earlier.monotonic)
        return max(0.0, self.unix - earlier.unix)


@dataclass
class Account:
    """Sums over the lines of a run.

    Attributes:
        seconds: by part (PARTS), of what counted; `starting` and `restarting` of every line.
        twice: seconds in steps that were done twice, with their evaluations and saves.
        restarts: processes that went on with the run and wrote a line.
        last: the moment of the newest line; None where no line has one.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    twice: float = 0.0
    restarts: int = 0
    last: Stamp | None = None

    @property
    def wall(self) -> float:
        """Seconds since the run first began."""
        return sum(self.seconds.values()) + self.twice

    @property
    def goodput(self) -> float:
        """Share of `wall` in steps that counted; 0 where there was no time yet."""
        return sum(self.seconds[part] for part in STEPS) / self.wall if self.wall else 0.0

    def add(self, spent: Mapping[str, Any], *, counted: bool = True) -> None:
        """Add the seconds of a line; what is no number of a known part is left out."""
        for part in PARTS:
            seconds = spent.get(part)
            if _is_number(seconds):
                if counted or part in BETWEEN:
                    self.seconds[part] += seconds
                else:
                    self.twice += seconds
        self.restarts += "restarting" in spent


def read_account(run: RunDirectory) -> Account:
    """The sums over a run's lines so far, which are not held in memory; older versions' have none.

    Raises:
        InputError: a file cannot be read.
    """
    return account_of(whole_lines(run.metrics), whole_lines(run.repeated))


def account_of(counted: Iterable[Entry], repeated: Iterable[Entry]) -> Account:
    """The sums over lines.

    A line that is in both files is of a step that is done twice: the run was killed between the
    writing of the two, or is just writing them.
    """
    account, newest = Account(), -1.0
    again = {entry.raw: entry for entry in repeated}
    kept = (entry for entry in counted if entry.raw not in again)
    for entries, counts in ((kept, True), (again.values(), False)):
        for entry in entries:
            if not isinstance(spent := entry.value.get("spent"), Mapping):
                continue
            account.add(spent, counted=counts)
            wall, stamp = entry.value.get("wall"), Stamp.read(entry.value.get("clock"))
            if stamp is not None and _is_number(wall) and wall > newest:
                newest, account.last = wall, stamp
    return account


class Timekeeper:
    """Gives each new line of a run its times. It is made when a process is about to train.

    Args:
        account: of the run's lines so far.
        phases: what this process does; its seconds until its first step are its start.
        resumed: whether the time since the newest line is the run's: it did not end by itself.
    """

    def __init__(self, account: Account, phases: Phases, *, resumed: bool = False) -> None:
        self._account, self._phases = account, phases
        self._before = phases.seconds()
        gap = sum(self._before.values())
        if account.last is not None and resumed:
            gap = max(gap, Stamp.now().since(account.last))
        self._of_start = "restarting" if account.wall else "starting"
        self._between = {self._of_start: gap}

    def line(self) -> dict[str, Any]:
        """`spent`, `wall`, `goodput` and `clock` of a line that is written now."""
        now, spent = self._phases.seconds(), self._between
        self._between = {}
        for phase, seconds in now.items():
            part = self._of_start if phase == START else _OF_PHASE.get(phase, "training")
            more = seconds - self._before.get(phase, 0.0)
            if more > 0:
                spent[part] = spent.get(part, 0.0) + more
        self._before = now
        spent = {part: round(seconds, 6) for part, seconds in spent.items()}
        self._account.add(spent)
        return {
            "spent": spent,
            "wall": round(self._account.wall, 6),
            "goodput": round(self._account.goodput, 6),
            "clock": Stamp.now()._asdict(),
        }


@cache
def _boot() -> str:
    """The first digits of this boot's name."""
    try:
        return _BOOT.read_text(encoding="ascii")[:8]
    except OSError:
        return ""


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)
