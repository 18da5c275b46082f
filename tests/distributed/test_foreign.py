"""Classes of transformers over processes: two compute what one does."""

import gc
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.foreign_steps import Found, steps
from tests.distributed.processes import run

CELLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{family}-{sharding}{''.join(f'-{word}' for word in options)}": (family, sharding, options)
    for family, sharding, options in [
        ("gemma2", "ddp", {}),
        ("gemma2", "fsdp2", {"recomputed": True}),
        ("gemma2", "zero3", {}),
        ("gpt_oss", "fsdp2", {"adapter": True}),
        ("gpt_oss", "zero3", {"router_loss": 0.5, "optimizer": "muon"}),
        ("qwen3_moe", "ddp", {"router_loss": 0.5, "micro_batches": 2}),
        ("qwen3_moe", "fsdp2", {"router_loss": 0.5, "recomputed": True, "optimizer": "normuon"}),
        ("mixtral", "ddp", {"optimizer": "adamp"}),
        ("gpt_oss", "zero3", {"adapter": True, "experts": True}),
        ("qwen3_moe", "fsdp2", {"adapter": True, "experts": True, "recomputed": True}),
        ("falcon_h1", "ddp", {}),
        ("falcon_h1", "fsdp2", {}),
        ("mamba2", "zero3", {"adapter": True}),
        ("gpt2", "fsdp2", {"micro_batches": 2}),
        ("gpt2", "zero1", {"optimizer": "muon"}),
    ]
}


def everything(_: Path, rank: int, world: int) -> dict[str, Found]:
    """All cells whose sharding is installed."""
    steps("llama", "none" if world == 1 else "ddp")
    gc.freeze()  # DeepSpeed looks for garbage with every model
    found = {}
    for name, (family, sharding, options) in CELLS.items():
        if sharding.startswith("zero") and not _has_deepspeed():
            continue
        found[name] = steps(family, sharding, **options)
    return found


def _has_deepspeed() -> bool:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first process says of every cell; both must say the same."""
    first, second = run(everything, tmp_path_factory.mktemp("foreign"))
    assert isinstance(first, dict), first
    assert first == second
    return first


@pytest.mark.parametrize("name", CELLS)
def test_two_processes_train_what_one_does(two: dict[str, Any], name: str) -> None:
    """Oracle: one process; losses and gradient norms of 4 steps and of one more."""
    if name not in two:
        pytest.skip("the extra deepspeed is not installed")
    family, _, options = CELLS[name]
    ways, losses, norms, balances = two[name]
    own = ("adapter", "experts", "router_loss", "optimizer")
    alone = steps(family, "none", **{key: options[key] for key in own if key in options})
    assert ways == alone.ways
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    assert norms == pytest.approx(alone.norms, rel=1e-4)
    assert balances == pytest.approx(alone.balances, rel=1e-5)
    assert all(balances) is ("router_loss" in options)
    assert losses[-1] != losses[0]
