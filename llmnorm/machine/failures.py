"""What is said, and which exit code returned, where something fails that no check foresaw.

Three kinds of failure look alike to a caller: this machine is out of something (memory, threads,
open files, disk), another process of the run was lost, or llmnorm has a defect. Each becomes one
line. A defect's traceback goes to a file beside the run, so that it can be sent to us.
"""

import errno
import locale
import os
import platform
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmnorm.machine.gpus import own_serial
from llmnorm.machine.memory import address_limit
from llmnorm.part import InputError

MISTAKE, DIVERGED, DEFECT, LOST_PROCESS, PREEMPTED = 2, 3, 70, 74, 75  # exit codes
TORCH_BYTES = 1_200_000_000  # of addresses; with less its libraries do not load (measured)
_NO_MEMORY = re.compile(
    r"allocate memory|DefaultCPUAllocator|out of memory|not enough memory|"
    r"failed to map segment|bad_alloc|multiplication overflow|size calculation overflowed",
    re.IGNORECASE,
)
_NO_THREAD = re.compile(
    r"can't start new thread|pthread_create|thread constructor failed|blas_thread_init|"
    r"ThreadPoolBuildError|thread pool has not been initialized|resource temporarily unavailable",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"(?=.*(gloo|nccl|process ?group|TCPStore))"
    r".*(closed by peer|reset by peer|timed? ?out|aborted|broken pipe|connection was)",
    re.IGNORECASE | re.DOTALL,
)


class Failure(NamedTuple):
    """One line for the user, and the exit code."""

    line: str
    exit_code: int


_NO_THREADS = Failure(
    "no more threads can be started; `ulimit -u` shows the limit, OMP_NUM_THREADS=1 and "
    "OPENBLAS_NUM_THREADS=1 need fewer",
    MISTAKE,
)


def too_little_memory() -> Failure | None:
    """What is said where the shell's limit leaves no room for torch; None where there is room.

    Without this some libraries that come with torch wait for ever for memory, instead of failing.
    """
    most = address_limit()
    if most is None or most >= TORCH_BYTES:
        return None
    return Failure(
        f"out of memory: `ulimit -v` leaves this process {most / 1e6:,.0f} MB, and torch alone "
        f"needs {TORCH_BYTES / 1e6:,.0f} MB",
        MISTAKE,
    )


def of_interrupt() -> Failure | None:
    """What a KeyboardInterrupt means that nobody has typed; None for one that somebody has.

    OpenBLAS, which numpy loads, interrupts its own process where it cannot start its threads.
    """
    try:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    except RuntimeError:
        return _NO_THREADS
    return None


def connection_lost(error: BaseException) -> bool:
    """Whether an exception says that the connection to another process of the run broke."""
    return bool(_LOST.search(" ".join(str(error).split())))


def last_line(error: BaseException) -> str:
    """The last line of an exception's traceback; of a mistake of the user its message alone."""
    kind, text = type(error), " ".join(str(error).split())
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return (text if isinstance(error, InputError) else f"{module}{kind.__qualname__}: {text}")[:600]


def failure(error: BaseException, words: Sequence[str], run: Path | None) -> Failure:
    """What an unforeseen exception of a command means.

    Of several processes, the line begins with who this one is and the traceback's last line, and
    ends with how a scheduler leaves its host out.

    Args:
        error: the exception.
        words: what was typed after `llmnorm`.
        run: the run or model directory that the command was given, if there is one.
    """
    found = _failure(error, words, run)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return found
    torch = sys.modules.get("torch")
    serial = own_serial() if torch is not None and torch.cuda.is_initialized() else ""
    host, gpu = socket.gethostname(), f", GPU {serial}" if serial else ""
    who = f"rank {os.environ.get('RANK')} (host {host}, process {os.getpid()}{gpu})"
    line = f"{who}: {last_line(error)}; {found.line}; to leave its host out: --exclude={host}"
    return Failure(line, found.exit_code)


def _failure(error: BaseException, words: Sequence[str], run: Path | None) -> Failure:
    """What the exception means on one process."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        asked = re.search(r"allocate (\d+) bytes|[Tt]ried to allocate ([\d.]+ \w+)", text)
        how_much = f" ({asked[1] + ' bytes' if asked[1] else asked[2]} asked for)" if asked else ""
        return Failure(
            f"out of memory{how_much}; a smaller model, context_length or micro_batch needs less, "
            "and `ulimit -v` shows whether the shell sets a limit",
            MISTAKE,
        )
    if _NO_THREAD.search(text):
        return _NO_THREADS
    if isinstance(error, UnicodeError) and "utf" not in locale.getencoding().lower():
        return Failure(
            f"the locale's encoding is {locale.getencoding()}, with which a library cannot read "
            "its own files; set PYTHONUTF8=1",
            MISTAKE,
        )
    if _LOST.search(text):
        saved = f"; go on from the newest checkpoint: llmnorm train {run}" if run else ""
        return Failure(f"another process of this run was lost ({text[:160]}){saved}", LOST_PROCESS)
    if isinstance(error, OSError) and (line := _of_the_system(error)):
        return Failure(line, MISTAKE)
    report = _written(error, words, run)
    command = f"llmnorm {' '.join(words[:2])}".strip()
    where = f"details in {report}" if report else f"{type(error).__name__}: {text[:200]}"
    return Failure(f"{command}: unexpected; {where}; this is a defect of llmnorm", DEFECT)


def _of_the_system(error: OSError) -> str | None:
    """The line for an error that the system raised about a file; None for any other."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.filename or 'a file'}: too many files are open; raise `ulimit -n`"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "no more processes or memory (`ulimit -u`, `ulimit -v` show the limits)"
    if error.filename is None or error.errno is None:
        return None
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _written(error: BaseException, words: Sequence[str], run: Path | None) -> Path | None:
    """The file that the report was written to; None where no directory can be written."""
    name = f"llmnorm-defect-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    versions = [f"python {platform.python_version()}"]
    versions += [
        f"{module} {sys.modules[module].__version__}"
        for module in ("torch", "transformers", "numpy")
        if module in sys.modules
    ]
    text = (
        f"command: llmnorm {' '.join(words)}\n"
        f"directory: {os.getcwd()}\n"
        f"versions: {', '.join(versions)}, {platform.platform()}\n\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    for directory in (run, Path(), Path(tempfile.gettempdir())):
        if directory is None or not directory.is_dir():
            continue
        try:
            file = directory / name
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
            return file
        except OSError:
            continue
    return None
