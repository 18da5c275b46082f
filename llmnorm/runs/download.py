"""The way down: a run directory of this machine gets what the store has more of the run.

Where the store's newest checkpoint is of a later step, or there is no run here yet, the run's
files and its newest whole checkpoint come down. The other checkpoints stay in the store. Every file
of a checkpoint is compared with its checksum, and a damaged one is passed over, as on this machine.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmnorm.checkpoints.format import check_file, check_files, read_checkpoint, sync
from llmnorm.checkpoints.store import Store
from llmnorm.config.file import load
from llmnorm.config.manifest import MANIFEST, STEP, Damaged, checksum_of, directory_of, steps_in
from llmnorm.config.saved import changeable, differences, to_tree
from llmnorm.part import InputError
from llmnorm.remote.objects import Absent, ObjectStore
from llmnorm.runs.directory import RunDirectory
from llmnorm.runs.upload import CHECKPOINTS, There, stamp_of

CONFIG, LEASE = "config.yaml", "lease/"
log = logging.getLogger(__name__)


def bring_down(
    run: RunDirectory, store: ObjectStore, there: There, say: Callable[[str], None]
) -> Iterator[None]:
    """Bring the run directory up to the store; yields after each file.

    Args:
        run: the directory.
        store: what it is copied up to.
        there: is filled with what the store has.
        say: prints a line.

    Raises:
        StoreError: the store does not answer, or refuses.
        InputError: the store or the directory has another run; no checkpoint is whole; the disk
            refuses.
    """
    there.names = {n: size for n, size in store.names().items() if not n.startswith(LEASE)}
    if not there.names:
        return
    if CONFIG not in there.names:
        raise InputError(
            f"run_dir: {store.address} holds other files and no {CONFIG}; set another run_dir"
        )
    for step in _steps(there.names):
        yield
        _look_at(step, store, there)
    here = _newest_here(run)
    newest = max(there.manifests, default=0)
    if run.config.exists():
        _check_same_run(run, store)
    if not run.config.exists() or newest > here:
        yield from _files(run, store, there)
        yield from _newest_checkpoint(run, store, there, here, say)
    _compare_manifests(run, there)


def _steps(names: dict[str, int]) -> list[int]:
    """The steps that have a manifest in the store, ascending."""
    paths = [name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}/")]
    found = [STEP.fullmatch(path[1]) for path in paths if path[2:] == [MANIFEST]]
    return sorted(int(match[1]) for match in found if match)


def _look_at(step: int, store: ObjectStore, there: There) -> None:
    name = f"{CHECKPOINTS}/{directory_of(step)}"
    try:
        content = store.read(f"{name}/{MANIFEST}")
    except Absent:  # retention has removed it a moment ago
        return
    try:
        manifest = json.loads(content)
        if manifest["crc32"] != checksum_of(manifest) or manifest["step"] != step:
            raise ValueError("its checksum differs")
        for file, entry in manifest["files"].items():
            if there.names.get(f"{name}/{file}") != entry["bytes"]:
                raise ValueError(f"{file} is missing, or not of its size")
        there.manifests[step] = manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s/%s is damaged (%s)", store.address, name, error)


def _newest_here(run: RunDirectory) -> int:
    """The newest step with a checkpoint on this machine that is whole by its sizes; 0: none."""
    for step in reversed(steps_in(run.checkpoints)):
        with suppress(Damaged):
            check_files(read_checkpoint(run.checkpoints / directory_of(step)), contents=False)
            return step
    return 0


def _check_same_run(run: RunDirectory, store: ObjectStore) -> None:
    """Refuse a directory of this machine that is another run than the store's."""
    content = store.read(CONFIG)
    if content == run.config.read_bytes():
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_bytes(content)
        try:
            there = load(Path(folder)).config
        except InputError as error:
            text = str(error).replace(folder, store.address)
            raise InputError(f"run_dir: {text}") from None
    config = load(run.path).config
    changed = differences(to_tree(there), to_tree(config))
    keys = [key for key in changed if not changeable(key, config)]
    if keys:
        old, new = changed[keys[0]]
        raise InputError(
            f"run_dir: {store.address} has another run than {run.path} ({keys[0]}: {old} there, "
            f"{new} here); set another run_dir, or another checkpoint.local"
        )


def _files(run: RunDirectory, store: ObjectStore, there: There) -> Iterator[None]:
    """All files beside the checkpoints; config.yaml, by which a directory is a run, is the last."""
    names = [name for name in there.names if not name.startswith(f"{CHECKPOINTS}/")]
    for sign in (run.done, run.preempted, run.diverged):
        if sign.name not in names:  # the run was trained on elsewhere since
            sign.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == CONFIG, name)):
        path = run.path / name
        if ".." in path.parts:
            continue
        with _explained(path):
            store.fetch(name, path)
        if (stamp := stamp_of(path)) is not None:
            there.known[name] = stamp
        yield


def _newest_checkpoint(
    run: RunDirectory, store: ObjectStore, there: There, here: int, say: Callable[[str], None]
) -> Iterator[None]:
    """The newest checkpoint that is whole; those that are not are no longer among `there`."""
    faults = []
    for step in sorted((step for step in there.manifests if step > here), reverse=True):
        size = sum(entry["bytes"] for entry in there.manifests[step]["files"].values())
        say(f"fetching step {step} ({size / 1e6:.1f} MB) from {store.address}")
        try:
            yield from _checkpoint(run, store, step)
            return
        except Damaged as fault:
            faults.append(str(fault))
            log.warning("%s: %s; going back to an older one", store.address, fault)
            del there.manifests[step]
    if faults and not here:
        raise InputError(f"{store.address}: no checkpoint is whole: {'; '.join(faults)}")


def _checkpoint(run: RunDirectory, store: ObjectStore, step: int) -> Iterator[None]:
    """One checkpoint, which appears whole or not at all.

    Raises:
        Damaged: its manifest or a file is.
    """
    name = f"{CHECKPOINTS}/{directory_of(step)}"
    local = Store(run.checkpoints)
    temporary = run.checkpoints / f".tmp-{directory_of(step)}-fetched"
    try:
        with _explained(temporary):
            store.fetch(f"{name}/{MANIFEST}", temporary / MANIFEST)
            manifest = read_checkpoint(temporary).manifest
            for file, recorded in manifest["files"].items():
                store.fetch(f"{name}/{file}", temporary / file)
                check_file(temporary / file, recorded, contents=True)
                yield
            for file in [*manifest["files"]]:
                sync(temporary / file)
            local.commit(temporary, step, manifest)
    finally:
        local.abandon(temporary)


def _compare_manifests(run: RunDirectory, there: There) -> None:
    """Find out which checkpoints of both are the same, and which have got another loss since."""
    for step, manifest in [*there.manifests.items()]:
        path = run.checkpoints / directory_of(step)
        stamp = stamp_of(path / MANIFEST)
        try:
            own = read_checkpoint(path).manifest
        except Damaged:
            continue  # it is not here, or will not be copied up
        if own["files"] != manifest["files"]:
            del there.manifests[step]  # of another history: the store gets this machine's
        elif stamp is not None:
            same = own == manifest
            there.known[f"{CHECKPOINTS}/{path.name}/{MANIFEST}"] = stamp if same else (-1, -1)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a line."""
    try:
        yield
    except OSError as error:
        text = f"{path}: cannot be written: {error.strerror or error}"
        raise InputError(text) from error
