"""What happens to a process of a run at a certain point, for campaigns and tests.

When the run has finished a number of steps and enters a phase (machine/phases.py), the moment is
written to a file (seconds of the system's monotonic clock), and then the process is struck:

    dead       SIGKILL
    stopped    SIGSTOP
    looping    a loop in Python
    waiting    a call in C that does not return; other threads run on
    holding    a call in C that does not return and keeps Python's lock
    raising    an exception
    memory     an allocation that no machine can give
    mistake    what a mistake of the user raises
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

KINDS = ("dead", "stopped", "looping", "waiting", "holding", "raising", "memory", "mistake")


def arm(kind: str, step: int, phase: str, file: Path) -> None:
    """Let this process be struck, as the top of the file says."""
    assert kind in KINDS, kind
    from llmnorm.machine.phases import Phases

    switch = Phases._switch

    def switched(phases: Phases, entered: str) -> None:
        switch(phases, entered)
        if (phases.step, entered) == (step, phase) and not file.exists():
            file.with_suffix(".new").write_text(str(time.monotonic()))
            file.with_suffix(".new").rename(file)
            strike(kind)

    Phases._switch = switched  # type: ignore[assignment,method-assign]


def arm_one(stroke: str, rank: int) -> None:
    """Arm the process of one rank.

    Args:
        stroke: `KIND:RANK:STEP:PHASE:FILE`.
        rank: of this process.
    """
    kind, victim, step, phase, file = stroke.split(":", 4)
    if rank == int(victim):
        arm(kind, int(step), phase, Path(file))


def strike(kind: str) -> Any:
    """Let it happen now."""
    match kind:
        case "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "looping":
            while True:
                pass
        case "waiting":
            ctypes.CDLL(None).pause()
        case "holding":
            ctypes.PyDLL(None).pause()
        case "raising":
            raise RuntimeError("planted for a test")
        case "memory":
            import torch

            torch.empty(2**55)
        case "mistake":
            from llmnorm.part import InputError

            raise InputError("data: planted for a test")


def slow(*, twofold: bool, steps: int, base: float = 0.3) -> None:
    """Let this process take longer for its own work.

    Args:
        twofold: sleep as long as each phase of a step has worked.
        steps: over how many a slow process is looked for.
        base: seconds that every process sleeps for its rows, so that the processor's own seconds,
            which depend on what else it does, matter less.
    """
    from llmnorm.machine.phases import OF_A_STEP, Phases
    from llmnorm.training import stragglers

    stragglers.STEPS = steps
    switch, worked = Phases._switch, 0.0

    def switched(phases: Phases, entered: str) -> None:
        nonlocal worked
        if phases.phase == "data":
            time.sleep(base)
        if twofold and phases.phase in OF_A_STEP:
            time.sleep(phases.own() - worked)
        switch(phases, entered)
        worked = phases.own()

    Phases._switch = switched  # type: ignore[assignment,method-assign]
