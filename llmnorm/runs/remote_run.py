"""A run whose directory is an address: the lease, the way down, the copying up, and the end.

    lease.py     one process at a time trains in the run, from whatever machine
    download.py  before the run is looked at: what the store has more of it
    upload.py    while it trains: everything that it writes, in a thread
    here         the order of these, the wait at the end, and who of several processes does what

The run itself knows of none of this: it works in a directory of this machine. The main process does
all of it; the others only learn of its errors.
"""

import time
from collections.abc import Callable
from types import TracebackType

import torch

from llmnorm.checkpoints.store import Keep
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError
from llmnorm.remote.lease import Lease
from llmnorm.remote.objects import ObjectStore, open_store
from llmnorm.runs.address import MARKER, bind
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.download import bring_down
from llmnorm.runs.upload import Left, There, Upload

PATIENCE = 600.0  # seconds at the end of a run in which nothing goes up, before it gives up
HURRY = 20.0  # that a run which has failed waits
PART = 10.0  # seconds between two lines that say what is still to go up


class RemoteRun:
    """Context manager around a run that is copied up to a store; on every process.

    On entry the lease is taken, and the directory of this machine gets what the store has more.
    `begin` is called when that directory has been found to be this run's. On exit everything that
    is left is copied up, for which a run that has ended well waits.

    Args:
        address: what the run is copied up to.
        run: its directory on this machine, locked by this process.
        keep: which checkpoints are kept, here and there.
        parallel: the processes.
        seconds_left: until a process that was asked to stop must end; infinite before that.

    Raises:
        StoreError: on entry, if the store does not answer, or refuses.
        InputError: on entry, if another process trains in the run, or the directory is that of
            another; on exit, if the run has ended well and something did not get up.
    """

    def __init__(
        self,
        address: str,
        run: RunDirectory,
        keep: Keep,
        parallel: Parallel,
        seconds_left: Callable[[], float],
    ) -> None:
        self._run, self._keep, self._parallel = run, keep, parallel
        self._seconds_left = seconds_left
        self._store: ObjectStore = open_store(address, "run_dir")
        self._lease = Lease(self._store, say=parallel.say)
        self._there = There()
        self._upload: Upload | None = None

    def __enter__(self) -> "RemoteRun":
        """Take the lease, and bring down what is missing."""
        parallel = self._parallel
        parallel.on_main(self._take)
        files = bring_down(self._run, self._store, self._there, parallel.say)
        try:
            _on_main_until(parallel, lambda: next(files, self) is self)
        except BaseException:
            self._give_back()
            raise
        return self

    def begin(self) -> None:
        """Begin to copy up: the directory is known to be this run's. Every process calls it.

        Raises:
            InputError: the directory cannot be written.
        """

        def start() -> None:
            bind(self._run, self._store.address)
            sure = self._lease.is_sure
            self._upload = Upload(self._run, self._store, self._keep, self._there, sure)
            self._upload.start()

        self._parallel.on_main(start)

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        """Wait until everything is up, then give the lease back."""
        try:
            if self._upload is not None:
                self._upload.finish()
            if error is None:
                self._wait_for_all()
            elif self._upload is not None and not self._upload.is_up(self._patience_on_error()):
                self._parallel.say(f"llmnorm: note: {self._what_is_left(self._upload.left())}")
        finally:
            if self._upload is not None:
                self._upload.stop()
                if not self._run.config.exists():  # refused before it has written anything
                    (self._run.path / MARKER).unlink(missing_ok=True)
            self._give_back()

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step must not be removed from this machine yet."""
        return self._upload is not None and self._upload.needs(step)

    def check(self) -> None:
        """Refuse to go on where another process has taken the run over; on every process.

        Raises:
            InputError: it has.
        """

        def held() -> None:
            if self._lease.lost is not None:
                raise InputError(self._lease.lost)

        self._parallel.on_main(held)

    def _take(self) -> None:
        self._lease.__enter__()

    def _give_back(self) -> None:
        if self._parallel.is_main:
            self._lease.__exit__()

    def _patience_on_error(self) -> float:
        return 0.0 if self._lease.lost is not None else HURRY

    def _wait_for_all(self) -> None:
        """Wait on all processes until everything is up, or there is no hope that it will be.

        Raises:
            InputError: it is not, and the run was not stopped either.
        """
        moved_at, moved = time.monotonic(), -1
        stopped = self._run.preempted.exists() and not self._run.done.exists()

        def is_over() -> bool:
            nonlocal moved, moved_at
            assert self._upload is not None
            part = min(PART, max(0.0, self._seconds_left()))
            if self._upload.is_up(part if moved >= 0 else min(1.0, part)):
                address = self._store.address
                self._parallel.say(f"all of it is in {address}: llmnorm train {address}")
                return True
            now, bytes_moved, left = time.monotonic(), self._store.moved.bytes, self._upload.left()
            if bytes_moved > moved:
                moved, moved_at = bytes_moved, now
            hopeless = self._lease.lost is not None or now - moved_at > PATIENCE
            if hopeless or self._seconds_left() <= 0:
                text = self._what_is_left(left)
                if not stopped:
                    raise InputError(text)
                self._parallel.say(f"llmnorm: note: {text}")
                return True
            problem = f" ({self._upload.problem})" if self._upload.problem else ""
            self._parallel.say(f"copying up to {self._store.address}: {left} left{problem}")
            return False

        _on_main_until(self._parallel, is_over)

    def _what_is_left(self, left: Left) -> str:
        assert self._upload is not None
        why = self._lease.lost or self._upload.problem or "it takes too long"
        why = why.removeprefix(f"{self._store.address}: ")
        return (
            f"{self._store.address}: {left} did not get up: {why}; they are whole in "
            f"{self._run.path}, and this copies them up: llmnorm train {self._run.path}"
        )


def _on_main_until(parallel: Parallel, part: Callable[[], bool]) -> None:
    """Call `part` on the main process again and again, until it returns True.

    The others wait for one part at a time. So work of any length makes no process look lost.

    Raises:
        InputError: as `Parallel.on_main`.
    """
    over = torch.zeros((), device=parallel.device)

    def once() -> None:
        over.fill_(float(part()))

    while not parallel.reduce(over):
        parallel.on_main(once)
        parallel.phases.advance()
