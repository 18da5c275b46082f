"""Signals that ask a run to stop: SIGTERM, SIGINT, SIGHUP, SIGXCPU and SIGUSR1.

A signal handler may run in the middle of anything, so it cannot save. While a run trains, it only
notes the signal. The loop looks at the notes of all processes together, in every step and in every
evaluation, so that all of them save and stop after the same step.

Before the first step there is nothing to save, and the handler ends the process itself: whatever
is written then is written so that a kill leaves the old or the new file.
"""

import os
import signal
from types import FrameType

# Exit codes: those of a shell, but that of SIGTERM for the two signals that mean the same (the
# terminal is gone, the time is used up). 75 is EX_TEMPFAIL: schedulers start the job again.
EXIT_CODES = {
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 143,
    signal.SIGXCPU: 143,
    signal.SIGUSR1: 75,
}
ELSEWHERE = 143  # of a process that was not asked itself, where it cannot be told what another was


class StopRequest:
    """Context manager that notes the signals, which then do not end the process.

    A second signal changes nothing: a launcher forwards to its processes what the terminal has sent
    to them already. A SIGHUP that is ignored at entry (nohup) stays ignored.

    Args:
        at_once: what is said of the stopped command. If given, a signal ends the process at once
            with this line, until `at_once` is set to None.

    Attributes:
        exit_code: 0; after a signal its exit code.
        name: the signal's name; empty before one came.
    """

    def __init__(self, at_once: str | None = None) -> None:
        """No request yet; the handlers are installed on entry."""
        self.at_once = at_once
        self.exit_code = 0
        self.name = ""
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
        if not self.exit_code:
            self.exit_code, self.name = code, signal.Signals(number).name


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
