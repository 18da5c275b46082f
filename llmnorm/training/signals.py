"""SIGTERM and SIGINT become a request that the training loop answers at the end of a step.

A handler must not save: it may run in the middle of anything. It only notes the signal; the loop
reduces the note over all processes once a step, so that all of them stop after the same step.
"""

import signal
from types import FrameType


class StopRequest:
    """Context manager that notes SIGTERM and SIGINT instead of dying of them.

    `exit_code` is 0, or 143 after SIGTERM, 130 after SIGINT (128 + the signal's number). Repeated
    signals change nothing: a launcher forwards what the terminal has sent to every process already.
    """

    def __init__(self) -> None:
        """Nothing is requested; the handlers are installed on entry."""
        self.exit_code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.exit_code = self.exit_code or 128 + number
