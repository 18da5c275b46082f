"""The checkpoints of a run: whole or absent, verified, written and read by any number of processes.

What a save does, over all processes:
1. Process 0 makes a directory under a temporary name.
2. Each process writes its own file there and fsyncs it.
3. Process 0 checks that the intervals tile every tensor, writes the manifest, renames the
   directory and moves `latest`, with an fsync after each.
4. Process 0 removes the checkpoints that need not be kept.
Before the rename the new checkpoint is absent, after it whole. The previous one is kept either way.

`format.py` holds the files of one checkpoint, `store.py` the directory of them, `fragments.py`
ZeRO's pieces, `agreement.py` the talk between processes. This file puts them together and adds the
background thread.

What would surprise: with several processes all of them must make every call together, the
constructor's too, which makes a gloo group; only `steps` and `wait` are calls of one process. The
background thread uses this group while training goes on. Whatever fails in one process is raised in
all of them, so that none waits for one that has given up.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from llmnorm.checkpoints.agreement import Processes
from llmnorm.checkpoints.format import (
    Checkpoint,
    Interval,
    as_interval,
    check_files,
    check_names,
    copy_into,
    make_manifest,
    sync,
    write_file,
)
from llmnorm.checkpoints.fragments import Ends, begun_rows, fill, touched_rows
from llmnorm.checkpoints.store import LATEST, Keep, Store
from llmnorm.config.manifest import Damaged
from llmnorm.machine.phases import Phases
from llmnorm.optim.fragments import Fragment, Rows
from llmnorm.part import InputError

__all__ = ["Checkpoint", "Checkpoints", "Interval", "State", "own_rows"]

State = Mapping[str, Tensor | Interval]
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: `<run_dir>/checkpoints`; the first save makes it.
        keep: how many of the newest whole ones are kept (at least 2).
        keep_every: checkpoints of steps that this divides are kept for good.
        keep_best: the checkpoint with the lowest validation loss is kept too.
        asynchronous: `save` copies the state and returns; a thread writes.
        rank, world: this process and how many there are.
        phases: of this process; every part of a save or a load that ends advances it.
        needed: tells of a step whose checkpoint need not be kept whether it must stay for now; only
            process 0 asks.
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
        phases: Phases | None = None,
        needed: Callable[[int], bool] | None = None,
    ) -> None:
        assert keep >= 2, "one checkpoint alone is lost when it turns out to be damaged"
        self._store = Store(directory, needed)
        self._keep = Keep(keep, keep_every, keep_best)
        self._phases = phases or Phases()
        self._processes = Processes(rank, world, self._phases.advance)
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

        A checkpoint of this step that is already there and whole is not written again. It takes
        over the validation loss, if one is given; tensors and meta stay as they are.

        Args:
            state: what this process writes, by name: whole tensors and intervals of dim 0. Over all
                processes they must tile every tensor once, so of copies one process passes its own.
            meta: values that JSON can express; those of process 0 are kept.
            validation_loss: of this state; `keep_best` and `find("best")` compare it. One that is
                not finite counts as none.

        Raises:
            InputError: the disk is full, the directory cannot be written, ...; nothing has changed.
            ValueError: the intervals do not tile a tensor.

        Where there is a background thread, its errors are raised by the next call of any method
        that waits for it (`save`, `wait`, `newest`, `find`, `load`, `clean`).
        """
        self.wait()
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None  # JSON has no such number
        parts, ends, snapshot = self._processes.every(lambda: self._prepare(state, meta))
        self._processes.exchange(ends)
        if self._thread is None:
            self._write(step, parts, snapshot, validation_loss)
        else:
            self._saving = self._thread.submit(self._write, step, parts, snapshot, validation_loss)

    def add_loss(self, step: int, validation_loss: float) -> None:
        """Record the validation loss of the checkpoint of `step`, which this run has just written.

        The tensors are not looked at. Waits for the save under way.

        Raises:
            InputError: the manifest cannot be written; the checkpoint is as it was.
        """
        self.wait()
        store = self._store
        with _explained(f"{store.directory}: the validation loss of step {step} was not saved"):
            self._processes.first(lambda: store.add_loss(step, validation_loss))
        self._processes.first(lambda: store.remove_superfluous(step, self._keep))

    def without_copies(self, state: State) -> dict[str, Tensor | Interval]:
        """The part of `state` that this process passes to `save`.

        Rows that several processes hold are written by the one of the lowest rank.
        """
        fragments = {n: v for n, v in state.items() if isinstance(v, Fragment)}
        intervals = {n: as_interval(v) for n, v in state.items() if n not in fragments}
        mine = {(name, part.start): part for name, part in intervals.items()}
        everyone = self._processes.gather(list(mine))
        lower = {key for keys in everyone[: self._processes.rank] for key in keys}
        return {**fragments, **{key[0]: part for key, part in mine.items() if key not in lower}}

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The process group of saves and loads; None on one process."""
        return self._processes.group

    def wait(self) -> None:
        """Until the save under way is on the disk; raises its error, once."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; looks at names only."""
        return self._store.steps()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None where there is none yet.

        Each file is read by one process, and its checksum compared. Newer checkpoints that are
        damaged are passed over, and logged.

        Raises:
            InputError: there are checkpoints, but none is whole.
        """
        return self._find(LATEST)

    def find(self, name: str | int) -> Checkpoint:
        """As `newest`, or the best or that of a step.

        Args:
            name: "latest", "best" (the lowest validation loss) or a step.

        Raises:
            InputError: there is none, or the one that was asked for is not whole; only for "latest"
                an older one takes its place.
        """
        found = self._find(name)
        if found is None:
            raise InputError(f"{self._store.directory}: there is no checkpoint yet")
        return found

    def load(self, checkpoint: Checkpoint, into: State) -> None:
        """Copy a checkpoint into the given tensors, in place.

        Args:
            checkpoint: from `newest` or `find`, which have compared its checksums.
            into: tensors and intervals of any cut, on any device; each process names its own. They
                must name all tensors of the checkpoint between them.

        Raises:
            InputError: a name, dtype or shape differs, and nothing has been copied; or a file
                cannot be read.
        """
        self.wait()
        fragments = {n: v for n, v in into.items() if isinstance(v, Fragment)}

        def prepare() -> dict[str, Tensor | Interval]:
            wanted = {**into, **{name: touched_rows(f) for name, f in fragments.items()}}
            check_names(checkpoint, wanted)
            return wanted

        def refuse_unasked() -> None:
            unasked = sorted(set(checkpoint.manifest["tensors"]).difference(*asked))
            if unasked:
                raise InputError(
                    f"{checkpoint.path}: holds {len(unasked)} tensors that are not loaded: "
                    f"{', '.join(unasked[:5])}; model, optimizer and training.ema must be as they "
                    "were when it was saved"
                )

        def copy() -> None:
            copy_into(checkpoint, wanted)
            for name, fragment in fragments.items():
                fill(fragment, as_interval(wanted[name]))

        wanted = self._processes.every(prepare)
        asked = self._processes.gather_on_first(list(wanted))
        self._processes.first(refuse_unasked)
        self._processes.every(copy)

    def clean(self) -> None:
        """Remove what saves and removals of killed processes left; only under the run's lock."""
        self.wait()
        self._processes.first(self._store.clean)

    def _find(self, name: str | int) -> Checkpoint | None:
        """The store's answer on every process, after the checksums of its files agreed.

        A file that turns out damaged is noted in the store, which then gives another answer.
        """
        self.wait()
        share = slice(self._processes.rank, None, self._processes.world)
        while True:
            answer = self._processes.first(lambda: self._store.find(name))
            if answer is None:
                return None
            found, faults = answer
            try:
                self._processes.every(partial(check_files, found, contents=True, share=share))
                break
            except Damaged as error:
                self._store.damaged[found.path] = str(error)
        step = found.manifest["step"]
        if faults and name != LATEST:
            raise InputError(f"{faults[0]}; the nearest whole checkpoint is of step {step}")
        if self._processes.rank == 0:
            for fault in faults:
                log.warning("%s; going back to step %d", fault, step)
        return found

    def _prepare(
        self, state: State, meta: Mapping[str, Any]
    ) -> tuple[dict[str, Interval], Ends | None, dict[str, Any]]:
        """All of a save that can fail before the processes meet: memory, meta, the thread.

        Returns:
            This process's rows (copied, for the thread), the ends of rows that are to be exchanged,
            and a copy of `meta`.
        """
        snapshot = json.loads(json.dumps(dict(meta)))
        fragments = {n: v for n, v in state.items() if isinstance(v, Fragment)}
        parts = {n: as_interval(v) for n, v in state.items() if n not in fragments}
        if self._thread is None:
            begun, ends = begun_rows(fragments, _new_buffer)
        else:
            self._thread.submit(int).result()  # a thread starts with its first work, or fails to
            parts = self._copy_to_buffers(parts)
            begun, ends = begun_rows(fragments, self._buffer)
            if any(fragment.is_cuda for fragment in fragments.values()):
                torch.cuda.synchronize()
        return parts | begun, ends, snapshot

    def _write(
        self, step: int, parts: dict[str, Interval], meta: dict[str, Any], loss: float | None
    ) -> None:
        store, processes = self._store, self._processes
        with _explained(f"{store.directory}: the checkpoint of step {step} was not saved"):
            temporary = processes.first(lambda: store.begin(step, loss))
            if temporary is not None:
                try:
                    file = temporary / f"rank_{processes.rank:05d}.safetensors"
                    written = processes.every(lambda: self._write_file(file, parts))
                    reports = processes.gather_on_first(written)
                    processes.first(
                        lambda: store.commit(
                            temporary, step, make_manifest(step, meta, loss, reports)
                        )
                    )
                finally:
                    if processes.rank == 0:
                        store.abandon(temporary)
        processes.first(lambda: store.remove_superfluous(step, self._keep))

    def _write_file(self, file: Path, parts: dict[str, Interval]) -> dict[str, Any] | None:
        """Write this process's file and see it to the disk; on the way there it is progress."""
        with self._phases.writing(file):
            written = write_file(file, parts)
        if written is not None:
            sync(file, self._phases.advance)
        return written

    def _copy_to_buffers(self, parts: dict[str, Interval]) -> dict[str, Interval]:
        """The parts, their tensors copied to the CPU buffers of the last save."""
        buffers: dict[str, Tensor] = {}
        for name, part in parts.items():
            tensor = part.tensor.detach()
            buffer = self._buffer(name, tensor, tensor.numel()).view(tensor.shape)
            buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(part.tensor.is_cuda for part in parts.values()):
            torch.cuda.synchronize()
        return {name: part._replace(tensor=buffers[name]) for name, part in parts.items()}

    def _buffer(self, name: str, like: Tensor, numel: int) -> Tensor:
        """The last save's memory for `numel` elements under a name; new where it does not fit."""
        buffer = self._buffers.get(name)
        if buffer is None or (len(buffer), buffer.dtype) != (numel, like.dtype):
            buffer = self._buffers[name] = _new_buffer(name, like, numel)
        return buffer


def own_rows(name: str, tensor: Tensor) -> Tensor | Interval:
    """What this process holds of a tensor: the tensor itself, or its rows of a sharded one.

    Args:
        name: the tensor's, for the message.
        tensor: a plain tensor, a fragment or rows; or a DTensor that is replicated, or sharded
            along dim 0 over one axis of its mesh (and replicated over the others).

    Raises:
        InputError: it is a DTensor of another placement; a checkpoint holds rows only.
    """
    if isinstance(tensor, Rows):
        return Interval(tensor.as_subclass(Tensor), tensor.start, tensor.whole)
    if not isinstance(tensor, DTensor):
        return tensor
    split = [axis for axis, p in enumerate(tensor.placements) if not p.is_replicate()]
    if not split:
        return tensor.to_local()
    axis, placement = split[0], tensor.placements[split[0]]
    # torch's subclass of Shard for two axes cuts in another order.
    if len(split) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise InputError(
            f"'{name}' cannot be saved: its placements are {tensor.placements} on a mesh of shape "
            f"{tuple(tensor.device_mesh.shape)}; a checkpoint holds tensors that are Replicate() "
            "everywhere, or Shard(dim=0) over one axis of the mesh"
        )
    rows, index = tensor.shape[0], tensor.device_mesh.get_local_rank(axis)
    start = min(-(-rows // tensor.device_mesh.size(axis)) * index, rows)  # as torch.chunk cuts
    return Interval(tensor.to_local(), start, tuple(tensor.shape))


def _new_buffer(_: str, like: Tensor, numel: int) -> Tensor:
    return torch.empty(numel, dtype=like.dtype, pin_memory=like.is_cuda)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error of the file system into one line for the user."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or error}; the ones before it are as they were"
        raise InputError(text) from error
