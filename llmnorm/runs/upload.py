"""Copying a run directory up to a store while the run trains.

    checkpoints   the newest first; of each its files, then its manifest, without which there is no
                  checkpoint; before it the lines of metrics.jsonl that the run had written by then
    other files   config, metrics, samples, tokenizer, plots, ...: those that have changed, every
                  few seconds
    signs         DONE, PREEMPT, DIVERGED: when everything else is up

One thread does all of it; large files go through a process (remote/sender.py). It looks at the
directory, so nothing has to be told to it, and no step waits for it. Where the store does not
answer it tries again, less and less often, for as long as the run trains.

What would surprise:
- A checkpoint that retention has removed here before it was copied is never copied: it would be
  removed there too. The newest one is kept here until it, or a newer one, is up (`needs`).
- What the store keeps is decided by the manifests that are there, not by what is on this machine:
  a run that goes on elsewhere has the newest checkpoint alone.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.checkpoints.format import check_files, read_checkpoint
from llmnorm.checkpoints.store import LATEST, Keep, superfluous
from llmnorm.config.manifest import MANIFEST, Damaged, directory_of, steps_in
from llmnorm.remote.objects import ObjectStore, StoreError
from llmnorm.remote.sender import Sender
from llmnorm.runs.address import MARKER
from llmnorm.runs.directory import RunDirectory

EVERY = 15.0  # seconds between two copies of a file that grows
LOOK = 1.0  # seconds between two looks at the directory
LONGEST = 30.0  # seconds between two tries where the store does not answer
CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)
Stamp = tuple[int, int]  # size and time of a file, by which it is known without reading it


@dataclass
class There:
    """What the store has of a run.

    Attributes:
        names: of all objects, with their sizes.
        manifests: of the checkpoints that have one that is not damaged, by step.
        known: stamps of the files of this machine that are there as they are here, by name.
    """

    names: dict[str, int] = field(default_factory=dict)
    manifests: dict[int, dict[str, Any]] = field(default_factory=dict)
    known: dict[str, Stamp] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float | None]:
        """The validation loss of each checkpoint, by step."""
        return {step: found["validation_loss"] for step, found in self.manifests.items()}


class Left(NamedTuple):
    """What is not up yet."""

    files: int
    bytes: int

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{files} ({self.bytes / 1e6:.1f} MB)"


class Upload:
    """The thread that copies a run directory up. Used by the main process alone.

    Args:
        run: the directory.
        store: where it is copied to.
        keep: which checkpoints are kept there.
        there: what is there already.
        may_write: whether the lease is held for sure.

    Attributes:
        problem: why the last try has failed; None while the store answers.
    """

    def __init__(
        self,
        run: RunDirectory,
        store: ObjectStore,
        keep: Keep,
        there: There,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run, self._store, self._keep, self._may_write = run, store, keep, may_write
        self._sender = Sender(store)
        self._losses = there.losses
        self._newest = max(self._losses, default=-1)  # another thread asks for it
        self._left_out: dict[int, Stamp | None] = {}  # manifests of what need not go up
        self._sent = dict(there.known)
        self._signs = {sign.name for sign in self._all_signs() if sign.name in there.names}
        self._copying: int | None = None
        self._due = 0.0
        self._ending = self._ended = False
        self._wake, self._up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self.problem: str | None = None

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step must not be removed on this machine yet."""
        return step == self._copying or (step not in self._losses and step > self._newest)

    def finish(self) -> None:
        """Ask for all that is left, now: nothing of the directory will change any more."""
        self._ending = True
        self._wake.set()

    def is_up(self, seconds: float) -> bool:
        """Whether everything is up, after `finish`; waits so long for it."""
        return self._up.wait(seconds)

    def stop(self) -> None:
        """End the thread after the file that is under way; does not wait for a slow store."""
        self._ended = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=1)
        self._sender.close()

    def left(self) -> Left:
        """What is not up yet."""
        files = [f for f in self._files() if self._sent.get(f[0]) != f[1]]
        for step in self._pending():
            path = self._run.checkpoints / directory_of(step)
            for file in path.glob("*"):
                name, stamp = f"{CHECKPOINTS}/{path.name}/{file.name}", stamp_of(file)
                if stamp is not None and self._sent.get(name) != stamp:
                    files.append((name, stamp))
        return Left(len(files), sum(stamp[0] for _, stamp in files))

    def _work(self) -> None:
        failures = 0
        while not self._ended:
            try:
                self._round()
                if self.problem is not None:
                    log.warning("%s: answers again", self._store.address)
                failures, self.problem = 0, None
            except StoreError as error:
                failures += 1
                if self.problem is None:
                    log.warning("%s; the run goes on, and the copying is tried again", error)
                self.problem = str(error)
            except FileNotFoundError:
                pass  # retention, or the run, was faster: the directory is looked at again
            except Exception as error:  # a defect of ours must not be silent, nor end the run
                failures += 1
                if self.problem is None:
                    log.exception("%s: copying failed; it is tried again", self._store.address)
                self.problem = f"{self._store.address}: {type(error).__name__}: {error}"
            self._wake.clear()
            if self._ended or self._up.is_set():
                return
            self._wake.wait(min(LONGEST, 2.0 ** (failures - 1)) if failures else LOOK)

    def _round(self) -> None:
        """Copy what has changed."""
        ending = self._ending  # before the directory is looked at
        self._remove_signs()
        while pending := self._pending():
            self._send_files()
            self._send_checkpoint(pending[-1])
            self._store_retention()
        self._send_new_losses()
        if ending or time.monotonic() >= self._due:
            self._send_files()
            self._due = time.monotonic() + EVERY
        self._send_signs()
        if ending:
            self._up.set()

    def _pending(self) -> list[int]:
        """Steps of checkpoints that are to go up; ascending."""
        found = []
        for step in steps_in(self._run.checkpoints):
            stamp = stamp_of(self._run.checkpoints / directory_of(step) / MANIFEST)
            if step not in self._losses and self._left_out.get(step, ()) != stamp:
                found.append(step)
        return found

    def _send_checkpoint(self, step: int) -> None:
        path = self._run.checkpoints / directory_of(step)
        name = f"{CHECKPOINTS}/{path.name}"
        self._copying = step
        try:
            stamp = stamp_of(path / MANIFEST)
            content = (path / MANIFEST).read_bytes()
            try:
                checkpoint = read_checkpoint(path)
                check_files(checkpoint, contents=False)
            except Damaged as damage:
                if not path.is_dir():
                    raise FileNotFoundError(path) from None
                log.warning("%s; it is not copied up", damage)
                self._left_out[step] = stamp
                return
            with_it = {**self._losses, step: checkpoint.manifest["validation_loss"]}
            if step in superfluous(dict(sorted(with_it.items())), self._keep):
                self._left_out[step] = stamp  # it would be removed there at once
                return
            self._store.remove([f"{name}/{MANIFEST}"])  # of one that was found damaged there
            entries = checkpoint.manifest["files"]
            for file in sorted(entries):
                self._send(path / file, f"{name}/{file}")
            there = self._store.names(name)
            for file, entry in entries.items():
                if there.get(f"{name}/{file}") != entry["bytes"]:
                    self._sent.pop(f"{name}/{file}", None)
                    raise StoreError(f"{self._store.address}: {name}/{file} did not arrive whole")
            self._write(f"{name}/{MANIFEST}", content)
            if stamp is not None:
                self._sent[f"{name}/{MANIFEST}"] = stamp
            self._losses[step] = checkpoint.manifest["validation_loss"]
            self._newest = max(self._newest, step)
            self._write(f"{CHECKPOINTS}/{LATEST}", f"{directory_of(self._newest)}\n".encode())
        finally:
            self._copying = None

    def _send_new_losses(self) -> None:
        """Send the manifests again that have got a validation loss since they were sent."""
        for step in steps_in(self._run.checkpoints):
            path = self._run.checkpoints / directory_of(step)
            name, stamp = f"{CHECKPOINTS}/{path.name}/{MANIFEST}", stamp_of(path / MANIFEST)
            if stamp is None or self._sent.get(name) in (None, stamp):
                continue
            content = (path / MANIFEST).read_bytes()
            self._write(name, content)
            self._sent[name] = stamp
            self._losses[step] = json.loads(content)["validation_loss"]
            self._store_retention()  # another one may be the best now

    def _store_retention(self) -> None:
        """Remove the checkpoints that need not be kept from the store, their manifests first."""
        for step in superfluous(dict(sorted(self._losses.items())), self._keep):
            name = f"{CHECKPOINTS}/{directory_of(step)}"
            names = self._store.names(name)
            self._store.remove([f"{name}/{MANIFEST}", *(n for n in names if MANIFEST not in n)])
            del self._losses[step]
            self._sent = {n: s for n, s in self._sent.items() if not n.startswith(f"{name}/")}

    def _send_files(self) -> None:
        """Send the files beside the checkpoints and signs that have changed."""
        for name, stamp in self._files():
            if self._sent.get(name) == stamp or self._ended:
                continue
            with (self._run.path / name).open("rb") as file:
                content = file.read(stamp[0])  # no more than was there a moment ago
            self._write(name, content)
            self._sent[name] = stamp

    def _send_signs(self) -> None:
        for sign in self._all_signs():
            stamp = stamp_of(sign)
            if stamp is None or not stamp[0] or self._sent.get(sign.name) == stamp:
                continue  # an empty PREEMPT is a request to this process alone
            self._send_files()  # what the run wrote before it
            self._write(sign.name, sign.read_bytes())
            self._signs.add(sign.name)
            self._sent[sign.name] = stamp

    def _remove_signs(self) -> None:
        """Remove those from the store with which an earlier process of the run has ended."""
        for sign in self._all_signs():
            if sign.name in self._signs and not sign.exists() and self._run.config.exists():
                self._store.remove([sign.name])
                self._signs.discard(sign.name)
                self._sent.pop(sign.name, None)

    def _send(self, path: Path, name: str) -> None:
        """Send a file of a checkpoint, unless an earlier try has."""
        stamp = stamp_of(path)
        if stamp is not None and self._sent.get(name) == stamp:
            return
        self._sender.send(path, name)
        if stamp is not None:
            self._sent[name] = stamp

    def _write(self, name: str, content: bytes) -> None:
        if not self._may_write():
            raise StoreError(f"{self._store.address}: this run's lease there is not renewed")
        self._store.write(name, content)

    def _all_signs(self) -> tuple[Path, ...]:
        return self._run.done, self._run.preempted, self._run.diverged

    def _files(self) -> Iterator[tuple[str, Stamp]]:
        """The files beside checkpoints and signs that are not half written, with their stamps."""
        signs = (sign.name for sign in self._all_signs())
        left_out = {"run.lock", MARKER, self._run.restarts.name, *signs}
        for folder, folders, names in os.walk(self._run.path):
            top = Path(folder) == self._run.path
            folders[:] = sorted(
                n for n in folders if n[0] != "." and not (top and n == CHECKPOINTS)
            )
            for name in sorted(names):
                if name[0] == "." or name.endswith(".tmp") or (top and name in left_out):
                    continue
                path = Path(folder) / name
                if (stamp := stamp_of(path)) is not None:
                    yield str(path.relative_to(self._run.path)), stamp


def stamp_of(path: Path) -> Stamp | None:
    """Size and time of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
