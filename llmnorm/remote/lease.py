"""The lease below an address: at most one process at a time writes there, from whatever machine.

    <address>/lease/00000003.json   who holds it (process, host), how often it was renewed, and
                                    whether it was given back

A lease is taken by creating the object of the next number, which only one of several can do
(`ObjectStore.create`). So a number is never used twice: a holder that was away for long sees a
higher one, and knows that it has lost the lease (a fencing token: Kleppmann, "How to do distributed
locking", 2016). The holder renews its object by writing it again.

What would surprise:
- No two clocks are compared. Who finds a lease that was not given back watches it for `seconds` on
  his own clock, and takes it if it was not renewed meanwhile.
- A holder on this machine whose process is gone is not waited for.
- While the store does not answer nobody can renew. The holder works on, and holds the lease as long
  as nobody else has taken it.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmnorm.part import InputError
from llmnorm.remote.objects import Absent, ObjectStore, StoreError

SECONDS = 60.0  # without a renewal after which another may take it
_RENEWALS = 4  # in that time
_DIRECTORY = "lease"


class Lease:
    """Context manager that takes the lease, renews it in a thread, and gives it back.

    Args:
        store: the address that it is of.
        seconds: without a renewal after which another may take it.
        say: prints a line.

    Attributes:
        lost: why it is no longer held; None while it is.

    Raises:
        InputError: on entry, if another process holds it, which the message names.
        StoreError: on entry, if the store does not answer, or refuses.
    """

    def __init__(
        self, store: ObjectStore, *, seconds: float = SECONDS, say: Callable[[str], None] = print
    ) -> None:
        self._store, self._seconds, self._say = store, seconds, say
        self._me: dict[str, Any] = {**_this_process(), "renewed": 0, "released": False}
        self._number = 0
        self._renewed = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)
        self.lost: str | None = None

    def __enter__(self) -> "Lease":
        """Take it."""
        newest = self._newest()
        if newest is not None and not _is_free(newest[1]):
            newest = self._watch(newest)
        self._number = newest[0] + 1 if newest else 1
        if not self._store.create(_name(self._number), self._content()):
            raise InputError(
                f"{self._store.address}: another process has taken this run a moment ago"
            )
        self._renewed = time.monotonic()
        with suppress(StoreError):
            older = [_name(number) for number in self._numbers() if number < self._number]
            self._store.remove(older)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop renewing it, and give it back; where the store does not answer, it runs out."""
        self._stop.set()
        self._thread.join(timeout=1)
        self._me["released"] = True
        if self.lost is None:
            with suppress(StoreError):
                self._store.write(_name(self._number), self._content())

    def is_sure(self) -> bool:
        """Whether nobody else can have taken it yet: it was renewed not long ago, and not lost."""
        return self.lost is None and time.monotonic() - self._renewed < self._seconds

    def renew(self) -> None:
        """Look whether it is still held, and write it again.

        Raises:
            StoreError: the store does not answer, or refuses.
        """
        start = time.monotonic()
        if (highest := max(self._numbers(), default=0)) > self._number:
            with suppress(StoreError):
                self._lose(_owner(json.loads(self._store.read(_name(highest)))))
            self._lose("another process")
            return
        self._me["renewed"] += 1
        self._store.write(_name(self._number), self._content())
        self._renewed = start

    def _renew_for_ever(self) -> None:
        while not self._stop.wait(self._seconds / _RENEWALS) and self.lost is None:
            with suppress(StoreError):  # the next time, then; `is_sure` tells
                self.renew()

    def _lose(self, owner: str) -> None:
        self.lost = self.lost or (
            f"{self._store.address}: {owner} has taken this run over, since this process could not "
            f"renew its lease for {self._seconds:.0f} s; what is trained from here on is not "
            "copied up"
        )

    def _watch(self, found: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        """Wait for a lease to run out.

        Returns:
            The lease as it is then.

        Raises:
            InputError: it was renewed.
        """
        owner = _owner(found[1])
        self._say(
            f"{self._store.address}: {owner} was training here and has not ended it; waiting "
            f"{self._seconds:.0f} s to see whether it still does"
        )
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(self._seconds / 20)
            newest = self._newest() or found
            if newest != found and not _is_free(newest[1]):
                raise InputError(
                    f"{self._store.address}: {_owner(newest[1])} is training in this run; wait for "
                    "it, stop it, or set another run_dir"
                )
            if newest != found:
                return newest
        return found

    def _numbers(self) -> list[int]:
        names = [Path(name).stem for name in self._store.names(_DIRECTORY)]
        return [int(name) for name in names if name.isdecimal()]

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        number = max(self._numbers(), default=0)
        if not number:
            return None
        try:
            content = self._store.read(_name(number))
        except Absent:  # removed a moment ago, since there is a newer one
            return number, {"released": False}
        try:
            return number, dict(json.loads(content))
        except (ValueError, TypeError):  # nobody of ours has written it
            return number, {"released": False}

    def _content(self) -> bytes:
        return json.dumps(self._me).encode()


def _name(number: int) -> str:
    return f"{_DIRECTORY}/{number:08d}.json"


def _owner(lease: dict[str, Any]) -> str:
    if "pid" not in lease:
        return "another process"
    return f"process {lease['pid']} on {lease['host']}"


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, on this machine and elsewhere."""
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """This boot of this machine, and the space in which its process numbers count."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # macOS has none
        return None


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


def _is_free(lease: dict[str, Any]) -> bool:
    """Whether it was given back, or its process was on this machine and is gone."""
    if lease.get("released"):
        return True
    machine, pid, started = lease.get("machine"), lease.get("pid"), lease.get("started")
    here = machine is not None and machine == _machine()
    return here and isinstance(pid, int) and _started(pid) != started
