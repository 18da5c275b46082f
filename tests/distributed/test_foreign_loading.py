"""What a process holds while a directory is loaded: its part of the model, and one unit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.exchange.loading import open_source
from llmnorm.models.convert import named_weights
from llmnorm.models.foreign import empty_foreign
from llmnorm.parallel.processes import Parallel
from tests.distributed.processes import run
from tests.families import tiny

SIZES = {"num_hidden_layers": 6, "hidden_size": 64, "moe_intermediate_size": 96}
KINDS = {"llama": {**SIZES, "intermediate_size": 192}, "qwen3_moe": SIZES}
SHARDINGS = ("fsdp2", "zero3")


def loading(directory: Path, _: int, __: int) -> dict[str, Any]:
    """Of every kind and sharding: bytes of the model, of a block, and the most that were live."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for sharding in SHARDINGS:
            try:
                found[f"{kind} {sharding}"] = peak(directory.parent / kind, sharding)
            except ImportError:
                continue  # DeepSpeed is not installed
    return found


def peak(base: Path, sharding: str) -> tuple[int, int, int]:
    parallel = Parallel(
        ParallelSettings(sharding=sharding), TrainingSettings(steps=1, device="cpu")
    )
    source = open_source(base, classes="transformers")
    assert source.kind is not None
    model = empty_foreign(source.kind, source.config)
    whole = sum(p.nbytes for p in model.parameters())
    unit = max(sum(p.nbytes for p in u.parameters()) for u in model.units().values())
    with Live() as live:
        parallel.lay_out(model, lambda modules: source.read_into(named_weights(modules)))
    return whole, unit, live.most


class Live(TorchDispatchMode):
    """Inside, the most bytes that tensors made by operations held at one time.

    Told by the storages themselves: torch's profiler does not see what is let go by a collective
    call's own thread. Stored tensors are mapped: no operation makes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {storage._cdata for storage in storages_of((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        self.storages += [
            (StorageWeakRef(storage), storage.nbytes())
            for storage in storages_of(answer)
            if storage._cdata not in given
        ]
        self.storages = [(ref, size) for ref, size in self.storages if not ref.expired()]
        self.most = max(self.most, sum(size for _, size in self.storages))
        return answer


def storages_of(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in memory."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in found if tensor.device.type == "cpu"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("loading")
    for kind, sizes in KINDS.items():
        tiny(kind, **sizes).save_pretrained(place / kind)
    answers = run(loading, place)
    assert isinstance(answers[0], dict), answers[0]
    return answers[0]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_holds_its_part_and_one_unit(
    kind: str, sharding: str, found: dict[str, Any]
) -> None:
    """Oracle: the storages that operations have made and that still live.

    A unit's part is made beside it. Experts are stacked and joined in memory before they are
    copied: at most another unit.
    """
    if f"{kind} {sharding}" not in found:
        pytest.skip("the extra deepspeed is not installed")
    whole, unit, most_bytes = found[f"{kind} {sharding}"]
    units = 2 if kind == "qwen3_moe" else 1
    assert most_bytes < whole / 2 + (units + 0.75) * unit, (whole, unit, most_bytes)
    assert most_bytes < whole
