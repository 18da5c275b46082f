"""A run under a launcher that starts all processes again whenever one has failed.

torchrun and accelerate launch do so with `--max-restarts`. They cannot know which failures are
worth it. A lost process is. A run that was told to stop, has diverged or was refused is not, nor is
one that fails at the same step each time. So the run keeps in its directory what its launcher does
not know, and the next life of the run, which the launcher has started, looks there first:

    in_vain(run)   before torch is loaded: why there is nothing to be gained
    Restarts       in the training loop of process 0: what the next life will ask

What would surprise: a life that is in vain leaves with the exit code of the one before. 0 would say
that the run is finished. So the launcher tries again until its restarts are used up; a try takes
about a second.

`restarts.txt` is one page of a fixed size, rewritten in place, since what matters is written when
the disk is full or the process may be killed. Its first line is the step under way, its second a
JSON object.
"""

import json
import os
from contextlib import suppress
from typing import Any, NamedTuple

from llmnorm.machine.failures import LOST_PROCESS, PREEMPTED
from llmnorm.machine.parent import parent
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory

PAGE = 4096  # bytes: a block of the disk, which is overwritten as a whole
DIGITS = 12  # of the step
FALLS = 3  # at the same step, before the run is given up


class Launcher(NamedTuple):
    """A launcher that restarts.

    Attributes:
        name: the same in all lives of the run under it; another launcher has another.
        restarts: how often it has restarted after a failure. Processes that it has replaced because
            a node came or went do not count.
    """

    name: str
    restarts: int


class Life(NamedTuple):
    """What the last life under a launcher has left.

    Attributes:
        launcher: its name.
        restarts: of the launcher, when that life began.
        step, row: where it began.
        pool: rows that a step reads.
        falls: the steps in which lives of this launcher ended without a word, in their order.
        stopped: the step after which it was told to stop and has saved; 0 if it was not told.
        refusal: exit code and line of an error after which nothing is tried again.
        under_way: the step that it had begun last; 0 before its first, and where it has ended in
            good order.
    """

    launcher: str
    restarts: int
    step: int
    row: int
    pool: int
    falls: list[int]
    stopped: int = 0
    refusal: tuple[int, str] | None = None
    under_way: int = 0

    def all_falls(self) -> list[int]:
        """The falls, that of this life included."""
        return [*self.falls, self.under_way] if self.under_way else self.falls

    def rows_of(self, step: int) -> str:
        """The rows that a step reads, for messages."""
        first = self.row + (step - 1 - self.step) * self.pool
        return f"{first}-{first + self.pool - 1}"


def launcher() -> Launcher | None:
    """The launcher that has started this process; None where none would restart it."""
    found = os.environ
    if not int(found.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return None
    name = found.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":  # a launcher without an id of its own: its process is the name
        several = found.get("GROUP_WORLD_SIZE", "1") != "1"
        address = f"{found.get('MASTER_ADDR')}:{found.get('MASTER_PORT')}"
        name = address if several else parent()
    return Launcher(name, int(found.get("TORCHELASTIC_RESTART_COUNT", "0")))


def in_vain(run: RunDirectory) -> tuple[int, str] | None:
    """Why this process's launcher has started the run again in vain; None if it has not.

    Every process of the run asks this before it does anything, and all get the same answer.

    Returns:
        The exit code, and a line for the user.
    """
    me, life = launcher(), _read(run)
    if me is None or life is None or life.launcher != me.name:
        return None
    path = run.path
    if me.restarts > life.restarts:
        if life.refusal is not None:
            code, why = life.refusal
            return code, f"{path}: not started again, since it was refused: {why}"
        if life.stopped:
            return PREEMPTED, (
                f"{path}: not started again, since it was stopped at step {life.stopped} and is "
                f"saved; go on with: llmnorm train {path}"
            )
    falls = life.all_falls()
    if os.environ.get("RANK", "0") == "0" and life.under_way:
        # From now on it counts as one of the falls, also if this life has none of its own.
        _write(run, life._replace(falls=falls, under_way=0))
    if len(falls) >= FALLS and len(set(falls[-FALLS:])) == 1:
        return LOST_PROCESS, (
            f"{path}: not started again, since it ended {FALLS} times in step {falls[-1]} (rows "
            f"{life.rows_of(falls[-1])}) or in what follows that step; the log above says how; "
            f"to try again: llmnorm train {path}"
        )
    return None


class Restarts:
    """Context manager around a run's steps, on process 0: keeps what its next life will ask.

    It writes nothing where no launcher would restart the run.

    Args:
        enabled: whether this is process 0.
    """

    def __init__(self, run: RunDirectory, *, enabled: bool) -> None:
        self._run = run
        self._me = launcher() if enabled else None
        self._life: Life | None = None
        self._file = -1
        self._parent = os.getppid()

    def begin(self, step: int, row: int, pool: int) -> str | None:
        """A life begins.

        Args:
            step, row: where it begins.
            pool: rows that a step reads.

        Returns:
            Where the life before has ended, if it did so without a word; a sentence.

        Raises:
            InputError: the directory cannot be written.
        """
        if self._me is None:
            return None
        before = _read(self._run)
        same = before is not None and before.launcher == self._me.name
        falls = before.all_falls() if same and before else []
        self._life = Life(self._me.name, self._me.restarts, step, row, pool, falls)
        try:
            _write(self._run, self._life)
            self._file = os.open(_path(self._run), os.O_WRONLY)
        except OSError as error:
            raise InputError(f"{_path(self._run)}: cannot be written: {error.strerror}") from None
        if not falls or before is None:
            return None
        times = f", {falls.count(falls[-1])} times now" if falls.count(falls[-1]) > 1 else ""
        rows = before.rows_of(falls[-1])
        return f"the process before ended in step {falls[-1]} (rows {rows}), or after it{times}"

    def at(self, step: int) -> None:
        """A step begins."""
        if self._file >= 0:
            os.pwrite(self._file, _digits(step), 0)

    def stopped(self, step: int) -> None:
        """The run was told to stop, and is saved: this launcher is not to start it again.

        Not to be called where a process of another node alone was told. Its launcher ends then, and
        the launchers that are left go on without that node. Nor is anything kept where this
        process's own launcher is gone, whose end is what has told it.
        """
        if self._file >= 0 and self._life is not None and os.getppid() == self._parent:
            os.pwrite(self._file, _page(self._life._replace(stopped=step)), 0)

    def __enter__(self) -> "Restarts":
        """Nothing yet; `begin` opens the file."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Keep whether it ended in good order, or by an error after which no life is to train."""
        if self._file < 0:
            return
        if error is None:
            os.pwrite(self._file, _digits(0), 0)
        lost = getattr(error, "exit_code", LOST_PROCESS) == LOST_PROCESS
        if isinstance(error, InputError) and not lost and self._life is not None:
            refusal = (error.exit_code, str(error))
            with suppress(OSError):  # the run's own error is what counts
                os.pwrite(self._file, _page(self._life._replace(refusal=refusal)), 0)
        os.close(self._file)


def _path(run: RunDirectory) -> str:
    return str(run.restarts)


def _digits(step: int) -> bytes:
    return f"{step:0{DIGITS}d}\n".encode()


def _page(life: Life) -> bytes:
    """The file of a life: its text is cut where it would not fit into the page."""
    refusal = life.refusal
    if refusal is not None:
        refusal = (refusal[0], refusal[1][: PAGE // 8])  # a character is 6 bytes at most, in JSON
    falls = life.falls[-FALLS:]
    values: dict[str, Any] = life._replace(refusal=refusal, falls=falls)._asdict()
    del values["under_way"]
    return (_digits(life.under_way) + json.dumps(values).encode() + b"\n").ljust(PAGE)


def _write(run: RunDirectory, life: Life) -> None:
    """In place, so that no moment has half of it, and a full disk takes it once it is there."""
    file = os.open(_path(run), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, _page(life), 0)
    finally:
        os.close(file)


def _read(run: RunDirectory) -> Life | None:
    """What the last life has left; None where there is nothing, or nothing that can be read."""
    try:
        with open(_path(run), "rb") as file:
            step, _, text = file.read(PAGE).partition(b"\n")
        values = json.loads(text)
        refusal = values.pop("refusal")
        return Life(**values, refusal=refusal and tuple(refusal), under_way=int(step))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
