"""The process that has started this one.

A worker whose launcher was killed would go on alone, with its GPU and the run's lock. So a process
can have the kernel send it SIGTERM when its parent ends, at which a run saves and stops.
"""

import ctypes
import os
import signal
import socket
from pathlib import Path

_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def stop_with_parent() -> None:
    """On Linux, have the kernel send SIGTERM to this process when its parent dies."""
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
