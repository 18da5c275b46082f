"""Large files go up from a process of their own: `python -m llmnorm.remote.sender ADDRESS`.

A client of a store holds the interpreter for about as long as the bytes take to be copied in
memory, in pieces of milliseconds. A loop of small calls in the same interpreter would wait for each
of them (tools/bench/upload.py measures it). The process is started with the first large file. It
ends with the run, also with one that is killed: its standard input ends then.

It reads a JSON list `[path, name]` a line, and answers with lines: `{"moved": bytes}` as a file
goes, then `{"done": true}`, `{"gone": true}` (no such file here) or `{"error": text}`.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmnorm.remote.objects import Moved, ObjectStore, StoreError, open_store

LARGE = 8 << 20  # bytes of a file from which on the process is worth its start


class Sender:
    """Sends files, the large ones by the process. Used by one thread.

    Args:
        store: where to; its `moved` counts what the process moves too.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._process: subprocess.Popen[str] | None = None

    def send(self, path: Path, name: str) -> None:
        """Copy a file up.

        Raises:
            StoreError: the store does not answer, or refuses.
            FileNotFoundError: there is no such file on this machine.
        """
        if path.stat().st_size < LARGE:
            self._store.send(path, name)
            return
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([str(path.absolute()), name]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                self._store.moved.relative_update(answer.get("moved", 0))
                if "done" in answer:
                    return
                if "gone" in answer:
                    raise FileNotFoundError(path)
                if "error" in answer:
                    raise StoreError(answer["error"])
        except BrokenPipeError:
            pass
        self.close()
        raise StoreError(f"{self._store.address}: the process that sends files has ended")

    def close(self) -> None:
        """End the process, also in the middle of a file. May be called by another thread."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            with suppress(OSError, ValueError):  # what was written to it and not read
                process.communicate()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmnorm.remote.sender", self._store.address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which lets it end its file
            )
        return self._process


class _Told(Moved):
    """Tells the run of each part that has gone."""

    def relative_update(self, inc: int = 1) -> None:
        _tell({"moved": inc})


def _tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(address: str) -> None:
    """Send what standard input asks for, until it ends."""
    os.nice(5)  # the run comes first
    store = open_store(address, "run_dir")
    store.moved = _Told()
    asked: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(0)  # the run has ended, perhaps in the middle of a file

    threading.Thread(target=read, daemon=True).start()
    while True:
        path, name = json.loads(asked.get())
        try:
            store.send(Path(path), name)
            _tell({"done": True})
        except FileNotFoundError:
            _tell({"gone": True})
        except StoreError as error:
            _tell({"error": str(error)})


if __name__ == "__main__":
    main(sys.argv[1])
