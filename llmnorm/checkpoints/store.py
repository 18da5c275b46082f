"""The directory of a run's checkpoints: names, renames, and which checkpoints are kept.

    <run_dir>/checkpoints/
      step_00001000/    a checkpoint; format.py says what it holds
      latest            the name of the newest one, for people and other tools
      .tmp-*  .trash-*  a save or a removal under way, or what a killed process left of one

A checkpoint appears and disappears in one rename. Where there are several processes, process 0
alone calls the methods here, and `checkpoints.py` shares their answers.

What would surprise: a checkpoint that is already there and whole is not written again, because a
run's state is a function of its step; only its validation loss is. So no whole checkpoint is ever
moved away to make room for another of the same step. And `find` does not follow `latest`: it looks
at the directories.
"""

import errno
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.checkpoints.format import (
    Checkpoint,
    as_text,
    check_file,
    check_files,
    read_checkpoint,
    sync,
    with_loss,
    write_durably,
)
from llmnorm.config.manifest import MANIFEST, Damaged, directory_of, steps_in
from llmnorm.machine import reading
from llmnorm.part import InputError, nearest

LATEST, BEST = "latest", "best"
log = logging.getLogger(__name__)


class Keep(NamedTuple):
    """Which checkpoints are kept: the newest ones, milestones, the best; at least two in all."""

    newest: int
    every: int | None
    best: bool


class Store:
    """The checkpoints in one directory, which the first `begin` makes.

    Args:
        directory: where they are.
        needed: tells whether the checkpoint of a step must stay for now, whatever `Keep` says.

    Attributes:
        damaged: what is wrong with checkpoints whose contents were found damaged, by their paths.
            `find` passes them over, and they do not count among those to keep.
    """

    def __init__(self, directory: Path, needed: Callable[[int], bool] | None = None) -> None:
        self.directory = directory
        self._needed = needed or (lambda step: False)
        self.damaged: dict[Path, str] = {}

    def path(self, step: int) -> Path:
        """The directory for the checkpoint of a step, whether or not it exists."""
        return self.directory / directory_of(step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; errors as in `steps_in`."""
        return steps_in(self.directory)

    def find(self, name: str | int) -> tuple[Checkpoint, list[str]] | None:
        """The newest whole checkpoint, the best or one of a step, with its manifest.

        Manifests are read and the files' sizes compared; contents are not. Where the checkpoint
        that was asked for is damaged, the answer is another: for "latest" the newest that is whole,
        else the nearest in steps.

        Args:
            name: "latest", "best" (the lowest validation loss, of equal ones the newest) or a step.

        Returns:
            The checkpoint, and what is wrong with those that were to be preferred to it; None
            where the directory holds no checkpoint.

        Raises:
            InputError: no checkpoint is of this name, or none is whole.
        """
        steps = self.steps()
        if not steps:
            return None
        faults: list[str] = []
        for step in self._by_preference(name, steps):
            try:
                return self._open(step), faults
            except Damaged as fault:
                faults.append(str(fault))
        raise InputError(
            f"{'; '.join(faults)}; no checkpoint is whole: restore one, or begin anew in another "
            "run_dir"
        )

    def begin(self, step: int, validation_loss: float | None) -> Path | None:
        """A new temporary directory for the files of `step`, to be passed to `commit`.

        None where a whole checkpoint of this step is there: it stays, and takes over the validation
        loss unless that is None.
        """
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        if os.path.lexists(self.path(step)):
            with suppress(Damaged):
                there = read_checkpoint(self.path(step))
                check_files(there, contents=True)
                if validation_loss is not None:
                    self._replace_loss(there, validation_loss)
                self.damaged.pop(there.path, None)
                self._move(step)
                return None
        temporary = self.directory / f".tmp-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, step: int, manifest: dict[str, Any]) -> None:
        """Make the finished files in `temporary` the checkpoint of `step`, and `latest` name it."""
        for name, recorded in manifest["files"].items():
            try:  # a node whose disk is not shared writes files that process 0 cannot see
                check_file(temporary / name, recorded, contents=False)
            except Damaged as fault:
                text = f"{fault}; do all nodes share this file system?"
                raise OSError(errno.ENOENT, text) from None
        write_durably(temporary / MANIFEST, as_text(manifest))
        sync(temporary)
        if os.path.lexists(self.path(step)):  # damaged, or `begin` would have kept it
            self._discard(step)
        self._move(step, temporary)
        self.damaged.pop(self.path(step), None)

    def add_loss(self, step: int, validation_loss: float) -> None:
        """Record the validation loss of a checkpoint that was whole a moment ago, if it still is.

        Unlike `begin`, this reads the manifest alone.
        """
        with suppress(Damaged):
            checkpoint = self._open(step)
            if checkpoint.manifest["validation_loss"] != validation_loss:
                self._replace_loss(checkpoint, validation_loss)

    def abandon(self, temporary: Path) -> None:
        """Remove what a failed save has left; nothing after a `commit`."""
        _remove(temporary)

    def remove_superfluous(self, step: int, keep: Keep) -> None:
        """Remove what `keep` does not keep, after `step` was saved; a failure is only logged."""
        for old in self._superfluous(step, keep):
            try:
                self._discard(old)
            except OSError as error:
                log.warning("%s: cannot be removed (%s)", self.path(old), error.strerror)

    def clean(self) -> None:
        """Remove what killed processes left of saves and removals.

        Call it only under the run's lock: it would remove another process's save under way.
        """
        if self.directory.is_dir():
            for name in os.listdir(self.directory):
                if name.startswith((".tmp-", ".trash-")):
                    _remove(self.directory / name)

    def _by_preference(self, name: str | int, steps: list[int]) -> list[int]:
        """All steps, in the order in which they answer "latest", "best" or a step."""
        if name == LATEST:
            self._check_latest(steps)
            return steps[::-1]
        if name == BEST:
            losses = {}
            for step in steps:
                with suppress(Damaged):
                    losses[step] = read_checkpoint(self.path(step)).manifest["validation_loss"]
            best = _best(losses)
            if best is None:
                raise InputError(
                    f"{self.directory}: no checkpoint has a validation loss; "
                    f"valid: {LATEST}, {', '.join(map(str, steps))}"
                )
            wanted = best
        elif isinstance(name, str) and not name.isdecimal():
            raise InputError(f"checkpoint '{name}': {nearest(name, [LATEST, BEST, 'a step'])}")
        else:
            wanted = int(name)
        by_distance = sorted(steps, key=lambda step: abs(step - wanted))
        if wanted not in steps:
            raise InputError(
                f"{self.directory}: there is no checkpoint of step {wanted}; "
                f"nearest: {', '.join(map(str, sorted(by_distance[:3])))}"
            )
        return by_distance

    def _superfluous(self, step: int, keep: Keep) -> list[int]:
        """The steps that need not be kept after `step`; none before there are two whole ones.

        Checkpoints of later steps are damaged ones, since the run resumed from an earlier one. They
        are not counted, and stay until their step is saved again.
        """
        steps = [s for s in self.steps() if s <= step]
        whole = {}
        for found in steps:
            with suppress(Damaged):
                whole[found] = self._open(found).manifest["validation_loss"]
        if len(whole) < 2:
            return []
        left = [s for s in steps if s not in whole]
        return sorted(s for s in [*left, *superfluous(whole, keep)] if not self._needed(s))

    def _open(self, step: int) -> Checkpoint:
        """The checkpoint of a step, its files' sizes compared.

        Raises:
            Damaged: it is not whole, or was found damaged before.
        """
        path = self.path(step)
        if path in self.damaged:
            raise Damaged(self.damaged[path])
        checkpoint = read_checkpoint(path)
        check_files(checkpoint, contents=False)
        return checkpoint

    def _replace_loss(self, checkpoint: Checkpoint, validation_loss: float) -> None:
        """Write the manifest again with this loss; a killed process leaves the old or the new."""
        pending = self.directory / f".tmp-{checkpoint.path.name}-{MANIFEST}"
        try:
            write_durably(pending, as_text(with_loss(checkpoint.manifest, validation_loss)))
            os.replace(pending, checkpoint.path / MANIFEST)
            sync(checkpoint.path)
        finally:
            pending.unlink(missing_ok=True)

    def _move(self, step: int, temporary: Path | None = None) -> None:
        """Rename the finished directory, if one is given, and make `latest` name the step.

        The new `latest` is written before the first rename. So a full disk fails before either of
        them, and not between the two.
        """
        pending = self.directory / f".tmp-{LATEST}"
        try:
            write_durably(pending, self.path(step).name + "\n")
            if temporary is not None:
                os.rename(temporary, self.path(step))
                sync(self.directory)
            try:
                os.replace(pending, self.directory / LATEST)
            except IsADirectoryError:  # somebody else's; nothing of ours reads `latest`
                log.warning(
                    "%s is a directory, so it does not name %s", self.directory / LATEST, step
                )
            sync(self.directory)
        finally:
            pending.unlink(missing_ok=True)

    def _discard(self, step: int) -> None:
        """Remove a checkpoint: one rename hides it, then its files are deleted."""
        trash = self.directory / f".trash-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
        os.rename(self.path(step), trash)
        _remove(trash)

    def _check_latest(self, steps: list[int]) -> None:
        file = self.directory / LATEST
        if not os.path.lexists(file):
            return
        try:
            named = reading.read_text(file, limit=1000).strip()
        except InputError as error:
            log.warning("%s", error)
            return
        if named not in [self.path(step).name for step in steps]:
            log.warning("%s names %r, which is not there", file, named)


def superfluous(losses: Mapping[int, float | None], keep: Keep) -> list[int]:
    """The steps of whole checkpoints that `keep` does not keep.

    Args:
        losses: of each step that has a whole checkpoint the validation loss, None where it was not
            evaluated; in ascending order.
    """
    kept: set[int | None] = {*list(losses)[-keep.newest :]}
    if keep.every:
        kept |= {step for step in losses if step % keep.every == 0}
    if keep.best:
        kept.add(_best(losses))
    return [step for step in losses if step not in kept]


def _best(losses: Mapping[int, float | None]) -> int | None:
    """The step of the lowest finite validation loss, of equal ones the newest."""
    finite = {s: loss for s, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], -step), default=None)


def _remove(path: Path) -> None:
    """Remove a file or a tree, or what can be removed of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
