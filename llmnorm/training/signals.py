"""SIGTERM and SIGINT ask a run to stop; the training loop does so at the end of a step.

A signal handler may run in the middle of anything, so it cannot save. It only notes the signal. In
every step the loop sums the notes of all processes, so that all of them save and stop after the
same step.
"""

import signal
from types import FrameType


class StopRequest:
    """Context manager that notes SIGTERM and SIGINT, which then do not end the process.

    A second signal changes nothing: a launcher forwards to its processes what the terminal has sent
    to them already.

    Attributes:
        exit_code: 0; after SIGTERM 143, after SIGINT 130 (128 + the signal's number).
    """

    def __init__(self) -> None:
        """No request yet; the handlers are installed on entry."""
        self.exit_code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.exit_code = self.exit_code or 128 + number
