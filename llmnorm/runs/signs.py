"""The files DONE, PREEMPT and DIVERGED: how the last process ended, for scripts to judge by.

Launchers turn every exit code into 1. A sign holds the number of the step that the process ended
after; DONE has a second line where the run ended before its last step. A PREEMPT file without a
number is no sign of ours: with it somebody else asks the run to stop.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llmnorm.machine.reading import read_text
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.runs.directory import RunDirectory

PATIENCE = "evaluation.patience"


def step_in(sign: Path) -> int | None:
    """The step in DONE, PREEMPT or DIVERGED; None where there is no number in the first line."""
    try:
        text = read_text(sign, limit=1000).partition("\n")[0].strip()
    except InputError:
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def has_ended(run: "RunDirectory") -> bool:
    """Whether the last process of the run has ended it, and was not stopped or killed."""
    return run.done.exists() or run.diverged.exists()


def ended_early(run: "RunDirectory") -> bool:
    """Whether the run is DONE because `evaluation.patience` has ended it before its last step."""
    try:
        return read_text(run.done, limit=1000).split()[1:] == [PATIENCE]
    except InputError:
        return False


def asks_to_stop(run: "RunDirectory") -> bool:
    """Whether somebody else has put a file PREEMPT into the run directory.

    A run's own has the number of a step in it. Any other, an empty one too, asks the run to save
    and stop, and keeps it from its first step until it is removed.
    """
    return run.preempted.exists() and step_in(run.preempted) is None


def end(sign: Path, step: int, *, early: bool = False) -> None:
    """Write the file that says how this process ended.

    Args:
        sign: `run.done`, `run.preempted` or `run.diverged`.
        step: the step that it ended after.
        early: `evaluation.patience` has ended it before its last step.

    Raises:
        InputError: the directory cannot be written.
    """
    temporary = sign.with_suffix(".tmp")
    try:
        temporary.write_text(
            f"{step}\n{PATIENCE if early else ''}".strip() + "\n", encoding="utf-8"
        )
        temporary.replace(sign)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{sign}: cannot be written: {error.strerror}") from None
