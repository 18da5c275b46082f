"""What a process of a run is doing, and since when: one small object, written by the main thread.

    phases.enter("forward")             a step's phases follow each other; this one ends the last
    with phases.during("save"): ...     a phase inside another, whose clock stands still meanwhile
    phases.advance()                    something was finished: a micro-batch, a file, a token

A phase costs two readings of a clock, about a microsecond. Another thread may read every attribute
at any moment: a heartbeat tells the other processes by them how far this one is, and where nothing
advances it ends the run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Until the first step; between the phases of a step; after the last one.
START, LOOP, END = "start", "loop", "end"
# Of a step's seconds: those in which the process waits for others, and for its own GPU.
WAIT, DEVICE = "wait", "device"
OF_A_STEP = ("data", "forward", "backward", "exchange", LOOP)


class Phases:
    """How far a process is.

    Args:
        clock: seconds of a clock that is never set back.

    Attributes:
        phase: what the main thread does now: `start`, `loop`, `end`, "data", "forward", "backward",
            "exchange" (gradients, loss and updates), "health", "evaluation" or "save".
        finished: the phase that ended last, `loop` left out; empty before one has.
        step: the steps that the run has finished.
        own_steps: those that this process has finished.
        progress: changes with everything that begins, ends or grows.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase, self.finished = START, ""
        self.step = self.own_steps = 0
        self._count = 0
        self._file: Path | None = None
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the present phase and begin another."""
        if self.phase != LOOP:
            self.finished = self.phase
        self._switch(phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Context manager around a phase that lies inside the present one.

        After an exception the phase stays what it was, so that the message can say where it arose.
        """
        around = self.phase
        self._switch(phase)
        yield
        self._switch(around)
        self.finished = phase

    def advance(self) -> None:
        """Count something that was finished inside a phase; any thread may call it."""
        self._count += 1

    @contextmanager
    def writing(self, file: Path) -> Iterator[None]:
        """Context manager while one thread writes a file, whose growth counts as progress."""
        self._file = file
        try:
            yield
        finally:
            self._file = None

    @property
    def progress(self) -> int:
        """See above."""
        file = self._file
        try:
            return self._count + (file.stat().st_size if file is not None else 0)
        except OSError:  # it is not there yet, or no longer
            return self._count

    @property
    def is_new(self) -> bool:
        """Whether this process is in the present phase for the first time."""
        return self.phase not in self._seconds

    @contextmanager
    def waiting(self, reason: str = WAIT) -> Iterator[None]:
        """Context manager around a wait; the phase stays the same."""
        began = self._clock()
        yield
        self.waited(self._clock() - began, reason)

    def waited(self, seconds: float, reason: str = WAIT) -> None:
        """Count the last `seconds` for a wait, if the present phase is one of a step.

        In any other phase (a save, an evaluation) a wait is a part of it.
        """
        if self.phase in OF_A_STEP:
            self._seconds[reason] = self._seconds.get(reason, 0.0) + seconds
            self._since += seconds

    def own(self) -> float:
        """Seconds of all steps so far in which this process worked, and did not wait."""
        seconds = self.seconds()
        return sum(seconds.get(phase, 0.0) for phase in OF_A_STEP)

    def of_steps(self) -> float:
        """Seconds of all steps so far, waits included."""
        seconds = self.seconds()
        return sum(seconds.get(phase, 0.0) for phase in (*OF_A_STEP, WAIT, DEVICE))

    def end_step(self, step: int) -> None:
        """Count a step; `step` are those that the run has finished."""
        self.step = step
        self.own_steps += 1
        self._count += 1

    def seconds(self) -> dict[str, float]:
        """Seconds that the main thread has spent in each phase, and waiting in steps, up to now."""
        found = dict(self._seconds)
        found[self.phase] = found.get(self.phase, 0.0) + self._clock() - self._since
        return found

    def _switch(self, phase: str) -> None:
        now = self._clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self._since, self.phase = now, phase
        self._count += 1
