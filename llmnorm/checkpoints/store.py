"""The directory of a run's checkpoints, as one process sees it: names, moves, rules of keeping.

    <run_dir>/checkpoints/
      step_00001000/    what one holds: format.py
      latest            the name of the newest one, for people and other tools
      .tmp-*  .trash-*  a save, a removal under way, or what a killed process left of one

A checkpoint appears and disappears in one rename. Where there are several processes only process 0
calls what changes the directory, and `checkpoints.py` tells the others.

What would surprise: a step that is there and whole is not written again, since a run is a function
of its step (and so nothing whole is ever moved away to make room); `latest` is never relied on.
"""

import errno
import logging
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.checkpoints.format import (
    MANIFEST,
    Damaged,
    as_text,
    check_file,
    find_fault,
    read_manifest,
    sync,
    write_durably,
)
from llmnorm.part import InputError, nearest

LATEST, BEST = "latest", "best"
log = logging.getLogger(__name__)


class Keep(NamedTuple):
    """Which checkpoints stay: the newest ones, milestones, the best; never fewer than two."""

    newest: int
    every: int | None
    best: bool


class Store:
    """The checkpoints in one directory, which the first `begin` makes.

    Attributes:
        damaged: steps that were found not to be whole; they do not count when others are removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damaged: set[int] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; looks at names only."""
        if not self.directory.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d{8,})", name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in names if match)

    def candidates(self, which: str | int) -> list[int]:
        """The steps to try, in this order, for "latest", "best" or a step.

        Raises:
            InputError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.directory}: there is no checkpoint yet")
        if which == LATEST:
            self._check_latest(steps)
            return steps[::-1]
        if which == BEST:
            best = self._best(steps)
            if best is None:
                raise InputError(
                    f"{self.directory}: no checkpoint has a validation loss; "
                    f"valid: {LATEST}, {', '.join(map(str, steps))}"
                )
            return [best]
        if isinstance(which, str) and not which.isdecimal():
            raise InputError(f"checkpoint '{which}': {nearest(which, [LATEST, BEST, 'a step'])}")
        step = int(which)
        if step not in steps:
            near = sorted(sorted(steps, key=lambda s: abs(s - step))[:3])
            raise InputError(
                f"{self.directory}: there is no checkpoint of step {step}; "
                f"nearest: {', '.join(map(str, near))}"
            )
        return [step]

    def begin(self, step: int) -> Path | None:
        """A new temporary directory to write in; None where the step is there and whole."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        if self.path(step).exists() and find_fault(self.path(step), contents=True) is None:
            self._move(step)
            return None
        temporary = self.directory / f".tmp-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, step: int, manifest: dict[str, Any]) -> None:
        """Make the finished files in `temporary` the checkpoint of `step`, and `latest` name it."""
        for name, recorded in manifest["files"].items():
            try:  # a file that is not seen from here was written to another machine's disk
                check_file(temporary / name, recorded, contents=False)
            except Damaged as fault:
                text = f"{fault}; do all nodes share this file system?"
                raise OSError(errno.ENOENT, text) from None
        write_durably(temporary / MANIFEST, as_text(manifest))
        sync(temporary)
        if self.path(step).exists():  # damaged, or `begin` would have left it as it is
            self._discard(step)
        self._move(step, temporary)
        self.damaged.discard(step)

    def abandon(self, temporary: Path) -> None:
        """Remove what is left of a save; after a commit that is nothing."""
        _remove(temporary)

    def remove_superfluous(self, step: int, keep: Keep) -> None:
        """Apply the rules of keeping after `step` was saved; a failure is only logged.

        Later steps can only be damaged ones (the run went on from an earlier one): they do not
        count, and stay until their step is written again.
        """
        steps = [s for s in self.steps() if s <= step]
        sound = (s for s in steps if s not in self.damaged)
        whole = [s for s in sound if find_fault(self.path(s), contents=False) is None]
        if len(whole) < 2:
            return
        kept = {*whole[-keep.newest :]}
        if keep.every:
            kept |= {s for s in whole if s % keep.every == 0}
        if keep.best and (best := self._best(whole)) is not None:
            kept.add(best)
        for old in steps:
            if old not in kept:
                try:
                    self._discard(old)
                except OSError as error:
                    log.warning("%s: cannot be removed (%s)", self.path(old), error.strerror)

    def clean(self) -> None:
        """Remove what saves and removals of killed processes left; only under the run's lock."""
        if self.directory.is_dir():
            for name in os.listdir(self.directory):
                if name.startswith((".tmp-", ".trash-")):
                    _remove(self.directory / name)

    def _move(self, step: int, temporary: Path | None = None) -> None:
        """Rename the finished directory, then `latest`.

        The new `latest` is written before the first rename: a full disk cannot part the two.
        """
        pending = self.directory / f".tmp-{LATEST}"
        try:
            write_durably(pending, self.path(step).name + "\n")
            if temporary is not None:
                os.rename(temporary, self.path(step))
                sync(self.directory)
            os.replace(pending, self.directory / LATEST)
            sync(self.directory)
        finally:
            pending.unlink(missing_ok=True)

    def _discard(self, step: int) -> None:
        """Remove a checkpoint: gone in one moment, its bytes a little later."""
        trash = self.directory / f".trash-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
        os.rename(self.path(step), trash)
        _remove(trash)

    def _best(self, steps: list[int]) -> int | None:
        losses = {}
        for step in steps:
            try:
                loss = read_manifest(self.path(step))["validation_loss"]
            except Damaged:
                continue
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def _check_latest(self, steps: list[int]) -> None:
        file = self.directory / LATEST
        named = file.read_text(errors="replace").strip() if file.is_file() else None
        if named is not None and named not in [self.path(step).name for step in steps]:
            log.warning("%s names %r, which is not there", file, named)


def _remove(path: Path) -> None:
    """Remove a file or a tree, or what can be removed of it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
