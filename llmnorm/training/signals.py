"""Signals that ask a run to stop: SIGTERM, SIGINT, SIGHUP, SIGXCPU and SIGUSR1.

A signal handler may run in the middle of anything, so it cannot save. While a run trains, it only
notes the signal. The loop looks at the notes of all processes together, in every step and in every
evaluation, so that all of them save and stop after the same step.

Before the first step there is nothing to save, and the handler ends the process itself: whatever
is written then is written so that a kill leaves the old or the new file.

A file can ask too, where no signal gets through: `Watch`, a thread, looks for it, so that no step
does. The same thread ends a process whose last step and save take longer than its launcher would
wait before it kills.
"""

import math
import os
import signal
import threading
import time
from types import FrameType

from llmnorm.machine.failures import PREEMPTED
from llmnorm.runs import directory
from llmnorm.runs.directory import RunDirectory

# Exit codes: those of a shell, but that of SIGTERM for the two signals that mean the same (the
# terminal is gone, the time is used up). 75 is EX_TEMPFAIL: schedulers start the job again.
EXIT_CODES = {
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 143,
    signal.SIGXCPU: 143,
    signal.SIGUSR1: PREEMPTED,
}
ELSEWHERE = 143  # of a process that was not asked itself, where it cannot be told what another was
HURRIED = (EXIT_CODES[signal.SIGTERM], PREEMPTED)  # a kill follows; Ctrl-C has all the time
TICK = 0.5  # seconds between two looks of a Watch


class StopRequest:
    """Context manager that notes the signals, which then do not end the process.

    A second signal changes nothing: a launcher forwards to its processes what the terminal has sent
    to them already. A SIGHUP that is ignored at entry (nohup) stays ignored.

    Args:
        at_once: what is said of the stopped command. If given, a signal ends the process at once
            with this line, until `at_once` is set to None.

    Attributes:
        exit_code: 0; after a request its exit code.
        name: of the signal, or of what else asked; empty before.
        since: when the first request came, by time.monotonic.
        from_another: whether another process was asked, and this one has only heard of it.
    """

    def __init__(self, at_once: str | None = None) -> None:
        """No request yet; the handlers are installed on entry."""
        self.at_once = at_once
        self.exit_code = 0
        self.name = ""
        self.since = 0.0
        self.from_another = False
        self._before: dict[int, object] = {}
        self._process = 0

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        self._process = os.getpid()
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        code = EXIT_CODES[signal.Signals(number)]
        if self.at_once is not None:
            # A process that this one has forked says nothing of its own.
            if os.getpid() == self._process and os.environ.get("RANK", "0") == "0":
                line = f"llmnorm: stopped by {signal.Signals(number).name} {self.at_once}"
                os.write(2, f"{line}\n".encode(errors="backslashreplace"))
            os._exit(code)
        self.ask(code, signal.Signals(number).name)

    def ask(self, code: int, name: str) -> None:
        """Ask for a stop; the first request counts.

        Args:
            code: what the process is to exit with.
            name: what asks.
        """
        if not self.exit_code:
            self.name, self.since = name, time.monotonic()
            self.exit_code = code  # the last, since another thread goes by it

    def seconds_left(self, grace: float) -> float:
        """Of the seconds that a request leaves, those that are left; infinite before there is one.

        Args:
            grace: seconds from the request on.
        """
        return self.since + grace - time.monotonic() if self.exit_code else math.inf

    def agree(self, total: int) -> int:
        """`agreed` for this process's own code; from then on it is asked itself."""
        code = agreed(self.exit_code, total)
        if code and not self.exit_code:
            self.from_another = True
            self.ask(code, name_of(code))
        return code


class Watch:
    """Context manager of a thread that sees a PREEMPT file and holds `checkpoint.grace`.

    Args:
        stop: is asked where the file is found.
        run: where the file may be dropped.
        grace: seconds from a request to the end of the process, which this thread ends then.
        looks: whether this process looks for the file; one of a run's processes does.
    """

    def __init__(self, stop: StopRequest, run: RunDirectory, grace: float, *, looks: bool) -> None:
        self._stop, self._run, self._grace, self._looks = stop, run, grace, looks
        # The process that looks also says why all end, so the others leave after it.
        self._limit = grace if looks else grace + 2 * TICK
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; one that waits for a file system is left behind."""
        self._ended.set()
        self._thread.join(2 * TICK)

    def _watch(self) -> None:
        stop = self._stop
        while not self._ended.wait(TICK):
            if self._looks and not stop.exit_code and directory.asks_to_stop(self._run):
                stop.ask(PREEMPTED, "a PREEMPT file")
            late = stop.exit_code in HURRIED and time.monotonic() - stop.since > self._limit
            if late and not self._ended.is_set():
                self._leave()

    def _leave(self) -> None:
        if self._looks:
            path = self._run.path
            line = (
                f"llmnorm: stopped by {self._stop.name}; the step under way and its checkpoint "
                f"took longer than checkpoint.grace ({self._grace:g} s) and are lost, those saved "
                f"before are whole; go on with: llmnorm train {path}\n"
            )
            os.write(2, line.encode(errors="backslashreplace"))
        os._exit(self._stop.exit_code)


def agreed(own: int, total: int) -> int:
    """The exit code of a process, given the sum of the codes of all processes; 0: none was asked.

    A process that was not asked itself takes the code of the one that was.
    """
    if not total:
        return 0
    return own or (total if total in EXIT_CODES.values() else ELSEWHERE)


def name_of(exit_code: int) -> str:
    """The name of the signal that most often has this exit code."""
    return next((n.name for n, code in EXIT_CODES.items() if code == exit_code), "a signal")
