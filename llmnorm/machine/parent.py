"""The process that has started this one.

A worker whose launcher was killed would go on alone, with its GPU and the run's lock. So a process
can have the kernel send it SIGTERM when its parent ends, at which a run saves and stops.

A launcher ends all workers as soon as one has failed. Where all are refused for the same reason,
one of them says it, and the others wait a moment for that one.
"""

import ctypes
import os
import signal
import socket
import time
from pathlib import Path

SPEECH = 5.0  # seconds; the launcher cuts them short on the host of the one that speaks

_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def stop_with_parent() -> None:
    """On Linux, have the kernel send SIGTERM to this process when its parent dies."""
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def let_speak() -> None:
    """Before a worker of a launcher fails: wait until another one has said why, in its place."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SPEECH)


def parent() -> str:
    """A name of the parent that no other process has, on any host, before or after it.

    A process number is used again; together with the moment of its start it is not.
    """
    number = os.getppid()
    try:
        # The fields behind the name, which may hold spaces; the 22nd of all is the start.
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return f"{socket.gethostname()} {number}"
    return f"{socket.gethostname()} {boot} {number} {fields[19]}"
