"""Adapters beside frozen weights under every sharding: two processes against one.

A unit holds bfloat16 weights that are frozen beside float32 ones that are trained. All cells run in
one launch; what they save one process reads.
"""

import gc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.checkpoints.format import copy_into, read_checkpoint
from llmnorm.models.adapters import is_adapter
from llmnorm.optim import sharded
from llmnorm.optim.fragments import master
from llmnorm.parallel.check import check
from tests.distributed.processes import run
from tests.distributed.tiny import Run
from tests.models.adapter_kinds import ADAPTERS

pytest.importorskip("peft", reason="needs the extra finetune")

STEPS = 4
KINDS = ("lora", "dora")
# Beside LoRA the rows of new tokens, of embedding and head; of one token where the two are tied,
# so that one process holds none.
NEW_TOKENS: dict[str, tuple[range, dict[str, Any]]] = {
    "rows": (range(37, 40), {}),
    "row": (range(39, 40), {"tie_word_embeddings": True}),
}
SHARDINGS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CELLS = (
    [
        (sharding, optimizer, kind, "fp32")
        for sharding in SHARDINGS
        for optimizer in ("adamw", "muon")
        for kind in KINDS
    ]
    + [
        (sharding, "adamw" if kind == "lora" else "muon", kind, "bf16")
        for sharding in ("ddp", "fsdp2", "zero2", "zero3")
        for kind in KINDS
    ]
    + [
        (sharding, "muon", kind, "bf16" if kind == "rows" else "fp32")
        for sharding in ("ddp", "fsdp2", "zero2", "zero3")
        for kind in NEW_TOKENS
    ]
)
IDS = ["-".join(cell) for cell in CELLS]


def started(sharding: str, optimizer: str, kind: str, precision: str, cut: int = 1) -> Run:
    new, model = NEW_TOKENS.get(kind, (range(0), {}))
    return Run(
        sharding,
        optimizer,
        model=model,
        adapter=ADAPTERS["lora" if new else kind],
        new_tokens=new,
        precision=precision,
        micro_batches=cut,
        dtype=torch.float32,
        lr=1e-3,
    )


def trained(one: Run) -> list[float]:
    """The losses of the steps, and of one more."""
    losses: list[float] = []
    for step in range(STEPS + 1):
        losses.append(one.forward_backward(step))
        one.parallel.clip(one.parameters, 0.5)
        if step < STEPS:
            one.hyperparameters.set(one.optimizer.param_groups, step)
            one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)
        one.parallel.end_step()
    return losses


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells whose sharding is installed."""
    sharded.BUCKET_BYTES = 4096  # several buckets
    said: dict[str, Any] = {}
    started(*CELLS[0])
    gc.freeze()  # DeepSpeed looks for garbage with every model
    for name, cell in zip(IDS, CELLS, strict=True):
        if cell[0].startswith("zero") and not _has_deepspeed():
            continue
        one = started(*cell)
        check(one.parallel, one.model, one.rows(0))
        kinds = {n: p.dtype for n, p in one.model.named_parameters()}
        losses = trained(one)
        one.save(directory.parent / name, STEPS)
        again = started(*cell)
        again.load(directory.parent / name, STEPS)
        said[name] = {
            "losses": losses,
            "narrow": sorted(n for n, dtype in kinds.items() if dtype == torch.bfloat16),
            "resumed": again.forward_backward(STEPS),
            "same": again.equals(one),
        }
    return said


def _has_deepspeed() -> bool:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two(place: Path) -> dict[str, Any]:
    """What the first process says of every cell; both must say the same."""
    first, second = run(everything, place)
    assert isinstance(first, dict), first
    assert first == second
    return first


@cache
def alone(optimizer: str, kind: str, precision: str, cut: int) -> tuple[list[float], Any]:
    """Losses and weights of one process that cuts a step's rows into so many micro-batches."""
    one = started("none", optimizer, kind, precision, cut)
    losses = trained(one)
    return losses, {n: master(p).detach().clone() for n, p in one.model.named_parameters()}


def saved(directory: Path) -> dict[str, Tensor]:
    """The weights of the checkpoint there, read by one process."""
    checkpoint = read_checkpoint(directory / f"step_{STEPS:08d}")
    tensors = {
        name: torch.empty(entry["shape"])
        for name, entry in checkpoint.manifest["tensors"].items()
        if name.startswith("model.")
    }
    copy_into(checkpoint, tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of a number that is trained."""
    return max(float((first[n] - second[n]).abs().max()) for n in first if is_adapter(n))


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_two_processes_train_what_one_does(place: Path, two: Any, cell: Any) -> None:
    """Oracle: one process; of bf16 products what the same rows in 2 micro-batches do to it."""
    sharding, *rest = cell
    name = "-".join(cell)
    if name not in two:
        pytest.skip("the extra deepspeed is not installed")
    losses, weights = alone(*rest, 1)
    cut_losses, cut_weights = alone(*rest, 2)
    found = saved(place / name)
    assert all(map(is_adapter, found)) and len(found) == sum(map(is_adapter, weights))
    for loss, expected, cut in zip(two[name]["losses"], losses, cut_losses, strict=True):
        limit = 1e-6 * expected if rest[-1] == "fp32" else max(3 * abs(cut - expected), 2e-5)
        assert abs(loss - expected) <= limit
    assert losses[-1] != losses[0]
    assert distance(found, weights) <= max(3 * distance(cut_weights, weights), 2e-6)
    assert bool(two[name]["narrow"]) == (rest[-1] == "bf16")
    assert not any(map(is_adapter, two[name]["narrow"]))


@pytest.mark.parametrize("name", IDS)
def test_a_sharded_adapter_is_loaded_again(two: Any, name: str) -> None:
    """Oracle: the loss after the last step, which the resumed run computes before any of its own;
    its state to the bit."""
    if name not in two:
        pytest.skip("the extra deepspeed is not installed")
    assert two[name]["resumed"] == two[name]["losses"][-1]
    assert two[name]["same"]
