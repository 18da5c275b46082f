"""The access log: a line of JSON for each request, which never holds text of it.

    log = AccessLog(settings.access_log, lost)
    log.write({"id": ..., "route": ..., "status": 200, "tokens": 31, ...})

A line that cannot be written, for example on a full disk, is counted as lost and costs its request
nothing. Of one that the disk took in part the rest is lost too; the next line begins a new one.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmnorm.part import InputError

STDOUT = 1


class AccessLog:
    """Writes the lines.

    Args:
        where: a file, which is appended to, `stdout` or `none`.
        lost: called for each line that could not be written.

    Raises:
        InputError: the file cannot be opened.
    """

    def __init__(self, where: Path | str, lost: Callable[[], None]) -> None:
        self._lost, self._cut = lost, False  # the last line was written in part
        self._file: int | None = None
        if where == "stdout":
            self._file = STDOUT
        elif where != "none":
            try:
                self._file = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"serving.access_log: {where}: {reason}") from None

    def write(self, line: dict[str, Any]) -> None:
        """Write one request's line, with the time."""
        if self._file is None:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        begin = "\n" if self._cut else ""
        raw = f"{begin}{json.dumps({'time': stamp, **line})}\n".encode()
        try:
            written = os.write(self._file, raw)
        except OSError:
            self._lost()
            return
        self._cut = written < len(raw)
        if self._cut:
            self._lost()
