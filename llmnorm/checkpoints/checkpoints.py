"""Checkpoints of a run: whole or absent, verified on load, written and read by any processes.

A save, on every process: (1) process 0 makes a directory under a temporary name, (2) each process
writes its own file there and brings it to the disk, (3) process 0 checks that the intervals tile
every tensor, writes the manifest, syncs, renames the directory, syncs its parent, moves `latest`,
(4) and only then removes what need not be kept. Killed before the rename the checkpoint is absent,
after it whole; the one before it stays in either case. An error anywhere is raised everywhere.

`format.py` is what one checkpoint holds, `store.py` the directory of them;
here is what several processes and the background thread make of it.

What would surprise: where there are several processes, all of them make every call (but `steps` and
`wait`), the constructor's too: it makes a gloo group of its own, which the thread can use while
training goes on. `find("latest")` takes the newest whole one, whatever the file `latest` says.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from llmnorm.checkpoints.format import (
    Damaged,
    Interval,
    as_interval,
    check_names,
    copy_into,
    find_fault,
    make_manifest,
    read_manifest,
    write_file,
)
from llmnorm.checkpoints.fragments import begun_rows, fill, touched_rows
from llmnorm.checkpoints.store import LATEST, Keep, Store
from llmnorm.optim.fragments import Fragment
from llmnorm.part import InputError

__all__ = ["Checkpoints", "Interval", "State", "held", "read_meta"]

T = TypeVar("T")
State = Mapping[str, Tensor | Interval]
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: `<run_dir>/checkpoints`; made by the first save.
        keep: how many of the newest whole ones stay (at least 2).
        keep_every: steps that this divides stay for ever.
        keep_best: the one with the lowest validation loss stays too.
        asynchronous: `save` copies the state and returns; a thread writes.
        rank, world: this process and how many there are.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
        asynchronous: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert keep >= 2, "one checkpoint alone is lost when it turns out to be damaged"
        self._store = Store(directory)
        self._keep = Keep(keep, keep_every, keep_best)
        self._rank, self._world, self._group = rank, world, None
        if world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._saving: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(
        self,
        step: int,
        state: State,
        meta: Mapping[str, Any],
        *,
        validation_loss: float | None = None,
    ) -> None:
        """Write the state after `step`; with `asynchronous`, return when it has been copied.

        Args:
            state: what this process writes, by name: whole tensors and intervals of dim 0. Over all
                processes they must tile every tensor once, so of copies one process passes its own.
            meta: anything JSON can say; that of process 0 is kept.
            validation_loss: what `keep_best` and `find("best")` go by.

        Raises:
            InputError: the disk is full, the directory cannot be written, ...; nothing has changed.
            ValueError: the intervals do not tile a tensor.
        """
        self.wait()
        snapshot = json.loads(json.dumps(dict(meta)))  # what JSON cannot say fails here
        fragments = {n: v for n, v in state.items() if isinstance(v, Fragment)}
        parts = {n: as_interval(v) for n, v in state.items() if n not in fragments}
        if self._thread is None:
            parts |= begun_rows(fragments, self._new_buffer, self._exchange)
            self._write(step, parts, snapshot, validation_loss)
        else:
            parts = self._copy_to_buffers(parts)
            parts |= begun_rows(fragments, self._buffer, self._exchange)
            if any(value.is_cuda for value in fragments.values()):
                torch.cuda.synchronize()
            self._saving = self._thread.submit(self._write, step, parts, snapshot, validation_loss)

    def without_copies(self, state: State) -> dict[str, Tensor | Interval]:
        """What this process passes to `save` of a state of which others hold parts too.

        Of copies the process of the lowest rank writes its own.
        """
        fragments = {n: v for n, v in state.items() if isinstance(v, Fragment)}
        intervals = {n: as_interval(v) for n, v in state.items() if n not in fragments}
        mine = {(name, part.start): part for name, part in intervals.items()}
        everyone: list[Any] = [list(mine)]
        if self._world > 1:
            everyone *= self._world
            dist.all_gather_object(everyone, list(mine), group=self._group)
        lower = {key for keys in everyone[: self._rank] for key in keys}
        return {**fragments, **{key[0]: part for key, part in mine.items() if key not in lower}}

    def wait(self) -> None:
        """Until the save under way is on the disk; raises its error, once."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; looks at names only."""
        return self._store.steps()

    def find(self, which: str | int = LATEST, *, verify: bool = True) -> Path:
        """The directory of a whole checkpoint.

        Args:
            which: "latest" (the newest whole one; what is wrong with newer ones is logged), "best"
                (lowest validation loss) or a step.
            verify: compare every byte with its checksum, each file on one process; else sizes only.

        Raises:
            InputError: there is none, or the one that was asked for is not whole.
        """
        self.wait()
        candidates = self._on_rank_0(lambda: self._store.candidates(which))
        faults: list[str] = []
        for step in candidates:
            fault = self._fault(step, verify)
            if fault is None:
                if self._rank == 0:
                    for found in faults:
                        log.warning("%s; going back to step %d", found, step)
                return self._store.path(step)
            faults.append(fault)
        others = [s for s in self._on_rank_0(self.steps) if s not in candidates]
        for step in sorted(others, key=lambda s: abs(s - candidates[0])):
            if self._fault(step, verify) is None:
                raise InputError(f"{faults[0]}; the nearest whole checkpoint is of step {step}")
        raise InputError(f"{'; '.join(faults)}; no checkpoint is whole")

    def load(self, path: Path, into: State, *, strict: bool = True) -> dict[str, Any]:
        """Copy a checkpoint into the given tensors, in place; returns `read_meta(path)`.

        Args:
            path: what `find` returned (that is where checksums are compared).
            into: tensors and intervals of any cut, on any device; each process names its own.
            strict: refuse a checkpoint with tensors that no process asks for.

        Raises:
            InputError: a name, dtype or shape differs; nothing has been copied then.
        """
        self.wait()

        def refuse_unasked() -> None:
            unasked = sorted(set(manifest["tensors"]).difference(*asked))
            if unasked and strict:
                raise InputError(
                    f"{path}: {len(unasked)} tensors have no place here: {', '.join(unasked[:5])}"
                )

        fragments = {n: v for n, v in into.items() if isinstance(v, Fragment)}
        rows = {name: touched_rows(fragment) for name, fragment in fragments.items()}
        into = {**into, **rows}
        manifest = self._on_rank_0(lambda: _manifest(path))
        asked = self._on_every_rank(lambda: check_names(path, manifest, into))
        self._on_rank_0(refuse_unasked)
        self._on_every_rank(lambda: copy_into(path, manifest, into))
        for name, fragment in fragments.items():
            fill(fragment, rows[name])
        return _meta(manifest)

    def clean(self) -> None:
        """Remove what saves and removals of killed processes left; only under the run's lock."""
        self.wait()
        self._on_rank_0(self._store.clean)

    def _write(
        self, step: int, parts: dict[str, Interval], meta: dict[str, Any], loss: float | None
    ) -> None:
        store = self._store
        with _explained(f"{store.directory}: the checkpoint of step {step} was not saved"):
            temporary = self._on_rank_0(lambda: store.begin(step))
            if temporary is None:
                return
            try:
                file = temporary / f"rank_{self._rank:05d}.safetensors"
                written = self._on_every_rank(lambda: write_file(file, parts))
                self._on_rank_0(
                    lambda: store.commit(temporary, step, make_manifest(step, meta, loss, written))
                )
            finally:
                if self._rank == 0:
                    store.abandon(temporary)
        self._on_rank_0(lambda: store.remove_superfluous(step, self._keep))

    def _copy_to_buffers(self, parts: dict[str, Interval]) -> dict[str, Interval]:
        """The parts with their tensors copied to the CPU buffers of the last save."""
        buffers: dict[str, Tensor] = {}
        for name, part in parts.items():
            tensor = part.tensor.detach()
            buffer = self._buffer(name, tensor, tensor.numel()).view(tensor.shape)
            buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(part.tensor.is_cuda for part in parts.values()):
            torch.cuda.synchronize()
        return {name: part._replace(tensor=buffers[name]) for name, part in parts.items()}

    def _buffer(self, name: str, like: Tensor, numel: int) -> Tensor:
        """The last save's memory for `numel` elements under a name."""
        buffer = self._buffers.get(name)
        if buffer is None or (len(buffer), buffer.dtype) != (numel, like.dtype):
            buffer = self._buffers[name] = self._new_buffer(name, like, numel)
        return buffer

    def _new_buffer(self, _: str, like: Tensor, numel: int) -> Tensor:
        return torch.empty(numel, dtype=like.dtype, pin_memory=like.is_cuda)

    def _exchange(self, leaving: list[list[Tensor]], arriving: list[list[Tensor]]) -> None:
        """Fill `arriving` [process] with what is `leaving` [process] there for this one."""
        if self._world == 1:
            return
        send = torch.cat([piece for pieces in leaving for piece in pieces] or [torch.empty(0)])
        counts, expected = ([sum(map(len, pieces)) for pieces in p] for p in (leaving, arriving))
        received = send.new_empty(sum(expected))
        dist.all_to_all_single(received, send, expected, counts, group=self._group)
        wanted = [piece for pieces in arriving for piece in pieces]
        for piece, data in zip(wanted, received.split([*map(len, wanted)]), strict=True):
            piece.copy_(data)

    def _fault(self, step: int, contents: bool) -> str | None:
        """What is wrong with a checkpoint, the same on every process; None if it is whole.

        Each process looks at its share of the files.
        """
        path, share = self._store.path(step), slice(self._rank, None, self._world)
        found = self._on_every_rank(lambda: find_fault(path, contents=contents, share=share))
        fault = self._on_rank_0(lambda: next((f for f in found if f is not None), None))
        if fault is not None:
            self._store.damaged.add(step)
        return fault

    def _on_every_rank(self, work: Callable[[], T]) -> list[T]:
        """`work()` on every process; process 0 gets the results; an error is raised on all."""
        result, error = _attempt(work)
        if self._world == 1:
            return [_result(result, error)]
        outcomes: list[Any] = [(None, None)] * self._world
        mine = (result, _to_send(error))
        dist.gather_object(mine, outcomes if self._rank == 0 else None, group=self._group)
        first = [next((e for _, e in outcomes if e is not None), None)]
        dist.broadcast_object_list(first, src=0, group=self._group)
        _result(None, error or first[0])
        return [result for result, _ in outcomes] if self._rank == 0 else []

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """`work()` on process 0; its result, or its error, on all."""
        result, error = _attempt(work) if self._rank == 0 else (None, None)
        if self._world > 1:
            shared: list[Any] = [result, _to_send(error)]
            dist.broadcast_object_list(shared, src=0, group=self._group)
            result, error = shared[0], error or shared[1]
        return _result(result, error)


def held(tensor: Tensor) -> Tensor | Interval:
    """What this process holds of a tensor: itself (or a fragment), or the rows of a sharded one."""
    if not isinstance(tensor, DTensor):
        return tensor
    axis = tensor.placements.index(Shard(0))
    rows, index = tensor.shape[0], tensor.device_mesh.get_local_rank(axis)
    start = min(-(-rows // tensor.device_mesh.size(axis)) * index, rows)  # as torch.chunk cuts
    return Interval(tensor.to_local(), start, tuple(tensor.shape))


def read_meta(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors: `meta`, with "step" and "validation_loss".

    Raises:
        InputError: the manifest is missing or damaged.
    """
    return _meta(_manifest(path))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except Damaged as fault:
        raise InputError(str(fault)) from None


def _meta(manifest: dict[str, Any]) -> dict[str, Any]:
    own = {key: manifest[key] for key in ("step", "validation_loss")}
    return {**manifest["meta"], **own}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one line for the user of what a disk refuses."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or error}; the ones before it are as they were"
        raise InputError(text) from error


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # of any kind: the other processes must not wait for ever
        return None, error


def _to_send(error: Exception | None) -> Exception | None:
    """The error as the other processes raise it: of a kind that survives the journey."""
    expected = error is None or isinstance(error, InputError | OSError)
    return error if expected else RuntimeError(f"another process failed: {error!r}")


def _result(result: T | None, error: Exception | None) -> T:
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
