"""The named moments at which a process of a run is killed. llmnorm itself holds no hook for them.

    P1   in the middle of a forward pass
    P2   after a backward pass: gradients are reduced, nothing is updated
    P3   between a matrix rule's update and the weights
    P4   the checkpoint's directory is made, no file is in it
    P5   half of a process's file is written
    P6   all files, no manifest (another format has a P7 here; in this one they are one moment)
    P8   the manifest, before the directory gets its name
    P9   the directory has its name, `latest` names the one before
    P10  the new `latest` is written beside the old
    P11  `latest` is moved; the oldest checkpoint is half removed
    P12  while a run resumes
    P13  a background save has copied half of the state
    P14  a background save has written half of a file, and another step is trained

(Here `latest` is written before the directory is renamed: the order is P8, P10, P9, P11.)

`arm` replaces functions of this process by ones that kill. What is killed is the process of a rank,
all of them, or the launcher alone.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmnorm.checkpoints import checkpoints, store
from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.checkpoints.store import Store
from llmnorm.config.manifest import MANIFEST, directory_of
from llmnorm.optim import sharded, stacks
from llmnorm.parallel.processes import Parallel
from llmnorm.training import loop
from tools.campaigns.ranks.launcher import PIDS

STEP = 6  # the step, or the step's save, in which it happens
# Moments that process 0 alone comes to; to the others every process comes.
OF_THE_FIRST = ("P4", "P6", "P8", "P9", "P10", "P11")
POINTS = ("P1", "P2", "P3", "P4", "P5", "P6", "P8", "P9", "P10", "P11", "P12", "P13", "P14")
BEHIND = ("P13", "P14")  # with checkpoint.asynchronous
VICTIMS = ("0", "1", "all", "launcher")
REACHED = Path("reached")  # written in the working directory before the kill


def arm(moment: str, rank: int) -> None:
    """Make this process kill at a moment.

    Args:
        moment: "P5:1" is point P5, the victim is the process of rank 1.
        rank: this process's.
    """
    point, victim = moment.split(":")
    kills = 1 if victim == "1" and point not in OF_THE_FIRST else 0
    if rank == kills:
        _ARM[point](_Once(victim))


class _Once:
    """Kills the victim when it is called first. If this process is no victim, it goes on."""

    def __init__(self, victim: str) -> None:
        self._victim, self._done = victim, False

    def __call__(self) -> None:
        if self._done:
            return
        self._done = True
        REACHED.write_text(self._victim, encoding="utf-8")
        if self._victim == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            return
        names = (
            sorted(p.name for p in PIDS.glob("[0-9]")) if self._victim == "all" else [self._victim]
        )
        numbers = [int((PIDS / name).read_text(encoding="utf-8")) for name in names]
        for number in sorted(numbers, key=lambda number: number == os.getpid()):  # itself last
            os.kill(number, signal.SIGKILL)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of one of a module or a class."""
    setattr(owner, name, function)


def _before_the_step(step: int, do: Callable[[Any], None]) -> None:
    """`do(run)` before the step of this number."""
    real = loop.step

    def stepping(run: Any, *arguments: Any) -> Any:
        if run.progress.step == step - 1:
            do(run)
        return real(run, *arguments)

    _replace(loop, "step", stepping)


def _in_forward(kill: _Once) -> None:
    def hook(run: Any) -> None:
        run.model.model.layers[0].register_forward_hook(lambda *_: kill())

    _before_the_step(STEP, hook)


def _after_backward(kill: _Once) -> None:
    def patch(_: Any) -> None:
        real = Parallel.clip

        def clip(self: Parallel, *arguments: Any) -> Any:
            norm = real(self, *arguments)
            kill()
            return norm

        _replace(Parallel, "clip", clip)

    _before_the_step(STEP, patch)


def _before_apply(kill: _Once) -> None:
    def patch(_: Any) -> None:
        real = stacks.apply

        def apply(*arguments: Any) -> None:
            kill()
            real(*arguments)

        _replace(stacks, "apply", apply)
        _replace(sharded, "apply", apply)

    _before_the_step(STEP, patch)


def _no_file(kill: _Once) -> None:
    real = Store.begin

    def begin(self: Store, step: int, loss: float | None) -> Path | None:
        temporary = real(self, step, loss)
        if step == STEP:
            kill()
        return temporary

    _replace(Store, "begin", begin)


def _half_a_file(kill: _Once, ready: Callable[[], object] = int) -> None:
    real = checkpoints.write_file

    def write(path: Path, parts: Any) -> Any:
        if not path.parent.name.startswith(f".tmp-{directory_of(STEP)}"):
            return real(path, parts)
        written = real(path, parts)
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 2)
        ready()
        kill()
        path.write_bytes(whole)  # of a process that is no victim
        return written

    _replace(checkpoints, "write_file", write)


def _no_manifest(kill: _Once) -> None:
    real = Store.commit

    def commit(self: Store, temporary: Path, step: int, manifest: dict[str, Any]) -> None:
        if step == STEP:
            kill()
        real(self, temporary, step, manifest)

    _replace(Store, "commit", commit)


def _manifest(kill: _Once) -> None:
    _after_writing(lambda path, _: path.name == MANIFEST and directory_of(STEP) in str(path), kill)


def _new_latest(kill: _Once) -> None:
    _after_writing(
        lambda path, text: path.name == ".tmp-latest" and text.strip() == directory_of(STEP), kill
    )


def _after_writing(is_it: Callable[[Path, str], bool], kill: _Once) -> None:
    real = store.write_durably

    def write(path: Path, text: str) -> None:
        real(path, text)
        if is_it(path, text):
            kill()

    _replace(store, "write_durably", write)


def _renamed(kill: _Once) -> None:
    real = os.rename

    def rename(old: Any, new: Any, **settings: Any) -> None:
        real(old, new, **settings)
        if Path(new).name == directory_of(STEP):
            kill()

    _replace(os, "rename", rename)


def _half_removed(kill: _Once) -> None:
    real = store._remove

    def remove(path: Path) -> None:
        if path.name.startswith(".trash-"):
            next(path.iterdir()).unlink()
            kill()
        real(path)

    _replace(store, "_remove", remove)


def _resuming(kill: _Once) -> None:
    real = checkpoints.copy_into

    def copy(*arguments: Any) -> None:
        real(*arguments)
        kill()

    _replace(checkpoints, "copy_into", copy)


def _half_copied(kill: _Once) -> None:
    real, save = Checkpoints._copy_to_buffers, Checkpoints.save
    saving = [0]

    def saved(self: Checkpoints, step: int, *arguments: Any, **settings: Any) -> None:
        saving[0] = step
        save(self, step, *arguments, **settings)

    def copy(self: Checkpoints, parts: dict[str, Any]) -> dict[str, Any]:
        if saving[0] == STEP:
            real(self, dict(list(parts.items())[: len(parts) // 2]))
            kill()
        return real(self, parts)

    _replace(Checkpoints, "save", saved)
    _replace(Checkpoints, "_copy_to_buffers", copy)


def _writing_behind(kill: _Once) -> None:
    trained = threading.Event()
    _half_a_file(kill, trained.wait)
    real = loop.step

    def stepping(run: Any, *arguments: Any) -> Any:
        outcome = real(run, *arguments)
        if run.progress.step > STEP:
            trained.set()
        return outcome

    _replace(loop, "step", stepping)


_ARM: dict[str, Callable[[_Once], None]] = {
    "P1": _in_forward,
    "P2": _after_backward,
    "P3": _before_apply,
    "P4": _no_file,
    "P5": _half_a_file,
    "P6": _no_manifest,
    "P8": _manifest,
    "P9": _renamed,
    "P10": _new_latest,
    "P11": _half_removed,
    "P12": _resuming,
    "P13": _half_copied,
    "P14": _writing_behind,
}
