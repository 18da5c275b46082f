"""The lock that lets one process at a time train in a run directory.

What would surprise: the lock is the kernel's (flock), so it is free as soon as its owner has ended,
even by kill -9. The file stays; its text names the owner, for the message to others.
"""

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from llmnorm.part import InputError

log = logging.getLogger(__name__)


class RunLock:
    """Context manager that locks `<run_dir>/run.lock`; it makes the directory if there is none.

    On a file system without locks it only warns.

    Raises:
        InputError: on entry, if another process has the lock; it names that process and its host.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "run.lock"
        self._descriptor = -1
        self._made: list[Path] = []  # directories that were not there, the innermost first

    def __enter__(self) -> "RunLock":
        directory = self._path.parent
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"run_dir: {directory} cannot be made: {error.strerror}") from None
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _me().encode(), 0)
        except BlockingIOError:
            owner = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise InputError(
                f"{directory}: {owner or 'another process'} is training in this directory; "
                "wait for it, stop it, or set another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise InputError(f"{self._path}: cannot be locked ({error.strerror})") from None
            log.warning("%s: this file system has no locks; let no other run use it", self._path)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a refused run leaves no empty directory, nor those above it
            if os.listdir(self._path.parent) == [self._path.name]:
                self._path.unlink()
                for directory in self._made or [self._path.parent]:
                    directory.rmdir()
        os.close(self._descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether a process is training in this directory. Writes nothing."""
    try:
        descriptor = os.open(run_dir / "run.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}\n"
