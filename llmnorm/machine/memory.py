"""How much memory this process may have, and the refusal of a model that cannot fit into it.

Linux promises more memory than there is and kills the process when it is used. So what is known to
be too large is refused before it is allocated.
"""

from collections.abc import Iterator
from pathlib import Path

from llmnorm.part import InputError

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limit() -> int | None:
    """Bytes that this process may have at most; None where nothing says so.

    The smallest of the machine's memory, the container's limit and `ulimit -v`.
    """
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        yield int(lines[0].split()[1]) * 1024  # MemTotal: 16384 kB
    except (OSError, ValueError, IndexError):
        pass
    for file in _CGROUPS:
        try:
            yield int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or `max`
            continue
    if (most := address_limit()) is not None:
        yield most


def address_limit() -> int | None:
    """Bytes of addresses that the shell allows (`ulimit -v`); None where it sets no limit."""
    try:
        import resource
    except ImportError:  # no limits on this system
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def available() -> int | None:
    """Bytes of memory that are free now; None where nothing says so."""
    most = limit()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").split("\n")
        free = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return most
    there = int(free.split()[1]) * 1024  # MemAvailable: 8192 kB
    return there if most is None else min(there, most)


def refuse_what_cannot_fit(needed: int, what: str) -> None:
    """Refuse to allocate what is larger than all memory that this process may have.

    Args:
        needed: bytes, of the weights alone: what is refused could not even be made.
        what: the message's beginning, e.g. "model: the weights".

    Raises:
        InputError: `needed` is more than `limit()`.
    """
    there = limit()
    if there is not None and needed > there:
        raise InputError(
            f"{what} need {needed:,} bytes, and this process may have {there:,}; a smaller model, "
            "or more processes with parallel.sharding=fsdp2, need less"
        )
