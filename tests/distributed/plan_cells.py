"""Cells of runs whose memory is planned and counted: every pair of values of their six axes.

tests/distributed/test_plan.py takes a few of them, tools/bench/plan_memory.py all.
"""

import itertools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.memory import memory
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.optim import sharded
from llmnorm.parallel import zero
from llmnorm.parallel.processes import Parallel
from llmnorm.runs import directory
from llmnorm.training.prepare import prepare
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import step
from tests.running import SMOKE

COMMON = ["training.device=cpu", "evaluation.every=null", "checkpoint.every=null"]
COMMON += ["evaluation.samples=0", "training.steps=2", "training.global_batch=8"]
SIZES = {
    "small": ["model.hidden_size=64", "model.intermediate_size=176", "model.num_hidden_layers=2"],
    "wide": [
        "model.hidden_size=128",
        "model.intermediate_size=320",
        "model.num_hidden_layers=2",
        "model.tie_word_embeddings=false",
    ],
    "deep": ["model.hidden_size=96", "model.intermediate_size=256", "model.num_hidden_layers=6"],
}
SHARDINGS = {  # processes, replicas
    "none": (1, 1),
    "ddp": (2, 1),
    "fsdp2": (2, 1),
    "hsdp": (4, 2),
    "zero1": (2, 1),
    "zero2": (2, 1),
    "zero3": (2, 1),
}
OPTIMIZERS = ("adamw", "muon", "normuon", "conda", "adamp", "soap")
MIXERS = ("softmax", "nala", "ssd")
# Else DeepSpeed's bucket of 128 MiB, and one bucket of matrices, would be all that is seen.
REDUCE_ELEMENTS, BUCKET_BYTES = 2**15, 2**18


class Cell(NamedTuple):
    """A run of two steps."""

    size: str
    sharding: str
    optimizer: str
    recompute: bool
    mixer: str
    micro_batches: int

    @property
    def name(self) -> str:
        """For messages and tables."""
        again = "recomputed" if self.recompute else "kept"
        return (
            f"{self.size} {self.sharding} {self.optimizer} {again} {self.mixer} "
            f"{self.micro_batches}"
        )

    def words(self) -> list[str]:
        """The settings, but for places."""
        world, replicas = SHARDINGS[self.sharding]
        words = [*COMMON, *SIZES[self.size], f"model.mixer={self.mixer}"]
        words += [f"optimizer={self.optimizer}", f"parallel.sharding={self.sharding}"]
        words += [f"parallel.activation_checkpointing={str(self.recompute).lower()}"]
        words += [f"parallel.replicas={replicas}"]
        words += [f"training.micro_batch={8 // world // self.micro_batches}"]
        if self.optimizer in ("muon", "normuon"):
            words.append("optimizer.precision=fp32")  # what another machine's CPU would do
        return words


AXES = (list(SIZES), list(SHARDINGS), OPTIMIZERS, (False, True), MIXERS, (1, 2))


def cells() -> list[Cell]:
    """Few cells that have every pair of values of two axes; the same list every time."""
    every = [Cell(*values) for values in itertools.product(*AXES)]
    missing = set().union(*(_pairs(cell) for cell in every))
    found = []
    while missing:
        best = max(every, key=lambda cell: len(_pairs(cell) & missing))
        found.append(best)
        missing -= _pairs(best)
    return found


def _pairs(cell: Cell) -> set[Any]:
    values = list(enumerate(cell))
    return set(itertools.combinations(values, 2))


def planned(cell: Cell, places: list[str]) -> dict[str, Any]:
    """What the plan says: peak and state of the process with the most."""
    with smaller():
        config = load(SMOKE, [*cell.words(), *places]).config
        found = memory(layout_of(config, gpu_named("cpu"), SHARDINGS[cell.sharding][0]))
    return {"peak": found.peak, "state": found.state, "moment": found.moment}


class smaller:
    """Inside, buckets are small enough to be several."""

    def __enter__(self) -> None:
        from llmnorm.analysis.plan import shardings

        self._before = (zero.REDUCE_ELEMENTS, sharded.BUCKET_BYTES)
        zero.REDUCE_ELEMENTS, sharded.BUCKET_BYTES = REDUCE_ELEMENTS, BUCKET_BYTES
        shardings.REDUCE_ELEMENTS = REDUCE_ELEMENTS

    def __exit__(self, *_: object) -> None:
        from llmnorm.analysis.plan import shardings

        zero.REDUCE_ELEMENTS, sharded.BUCKET_BYTES = self._before
        shardings.REDUCE_ELEMENTS = self._before[0]


def counting(
    place: Path, rank: int, world: int, *, chosen: list[Cell], places: list[str]
) -> dict[str, Any]:
    """A scenario: peak and state of this process in every cell."""
    # Processes of former cells are the same ones; nobody is to wait for their progress.
    Parallel.watch = lambda *_: None  # type: ignore[method-assign]
    found = {}
    for number, cell in enumerate(chosen):
        words = [*cell.words(), *places, f"run_dir={place.parent / f'run {number}'}"]
        with smaller():
            found[cell.name] = counted(load(SMOKE, words).config)
    return found


def counted(config: RunConfig) -> dict[str, Any]:
    """The most bytes of tensors that were live in two steps of a run, and those of its state."""
    assert config.run_dir is not None
    stack = ExitStack()  # never closed: the process group stays
    agreed = directory.agree(config, going_on=False)
    with Bytes() as live:
        run = prepare(config, agreed, stack, data_command="", dry_run=True)
        batches, stop = run.batches(), StopRequest()
        live.most = 0
        for _ in range(2):
            step(run, next(batches), stop)
        tensors = [t for state in run.optimizer.state.values() for t in state.values()]
        state = {
            storage._cdata: storage.nbytes() for storage in map(_storage, tensors) if len(storage)
        }
    return {"peak": live.most, "state": sum(state.values())}


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


class Bytes(TorchDispatchMode):
    """Inside, the bytes of all storages that operations have made and that still live.

    Storages are asked whether they live; so what a collective call's thread lets go is seen. FSDP
    empties and fills storages by resizing them, which is no operation and is noted here too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> "Bytes":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = self._resize(storage, size)
            self._note(storage)
            self._look()
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        for storage in _storages(answer):
            if storage._cdata not in given:  # a file that is mapped is no memory of an operation
                self._note(storage)
        self._look()
        return answer

    def _note(self, storage: torch.UntypedStorage) -> None:
        reference, key = StorageWeakRef(storage), storage._cdata
        self._sizes[key] = (reference, storage.nbytes())

    def _look(self) -> None:
        if self._live() > self.most:
            time.sleep(0.005)  # a collective call's thread lets go a moment later
            self.most = max(self.most, self._live())

    def _live(self) -> int:
        for key in [key for key, (ref, _) in self._sizes.items() if ref.expired()]:
            del self._sizes[key]
        return sum(size for _, size in self._sizes.values())


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in memory; a DTensor's own storage is none, its part's is."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    found = [leaf._local_tensor if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    return [tensor.untyped_storage() for tensor in found if tensor.device.type == "cpu"]
