"""`plan --trace`: a step of one process among many on shapes alone, and splits that are wrong.

All is done by one process of its own, since it pretends to be another.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from llmnorm.analysis.plan import traffic
from llmnorm.analysis.plan.gpus import gpu_named
from llmnorm.analysis.plan.layout import layout_of
from llmnorm.analysis.plan.optimizer import owned
from llmnorm.analysis.plan.recording import record
from llmnorm.analysis.plan.trace import shortened, trace
from llmnorm.analysis.plan.traffic import Transfer, transfers
from llmnorm.config.file import load
from llmnorm.optim.sharded import Exchange
from llmnorm.parallel import processes, shards
from llmnorm.part import InputError
from tests.distributed.processes import run
from tests.running import SMOKE

# sharding, processes, replicas, the traced one, optimizer, other settings
CELLS = {
    "none": ("none", 1, 1, 0, "adamw", []),
    "ddp": ("ddp", 4, 1, 3, "muon", []),
    "fsdp2": ("fsdp2", 1024, 1, 1023, "conda", ["model.mixer=[softmax, ssd]"]),
    "hsdp": ("hsdp", 12, 4, 5, "soap", ["parallel.activation_checkpointing=true"]),
    "one batch": ("hsdp", 8, 2, 5, "adamw", ["training.micro_batch=2", "training.precision=bf16"]),
}


def traced(name: str) -> dict[str, Any]:
    sharding, world, replicas, rank, optimizer, more = CELLS[name]
    words = [f"training.global_batch={2 * world}", "training.micro_batch=1"]
    words += [f"optimizer={optimizer}", f"parallel.replicas={replicas}", *more]
    config = load(SMOKE, words).config
    layout = shortened(layout_of(config, gpu_named("h100"), world, sharding=sharding))
    recording = record(layout.config, layout.micro_batch, layout.device)
    found = trace(layout, rank, transfers(layout, recording, owned(layout, recording)))
    return {
        "rows": found.collectives,
        "empty": found.empty,
        "matrices": found.matrices,
        "balance": found.balance,
    }


def a_row_too_few(self: Exchange, parameter: Any, rank: int) -> tuple[int, int]:
    """Rows by rounding down, where FSDP2 rounds up."""
    import torch.distributed as dist

    rows, columns = parameter.shape
    block = max(1, rows // dist.get_world_size(self.group))
    return min(block * rank, rows) * columns, min(block * (rank + 1), rows) * columns


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "rows of an owner's matrix": ("hsdp", lambda: patch.object(Exchange, "cut", a_row_too_few)),
    "a model that is not cut": (
        "fsdp2",
        lambda: patch.object(processes, "shard", lambda *_, **__: None),
    ),
    "replicas that are not reduced": (
        "hsdp",
        lambda: patch.object(FSDPModule, "set_requires_all_reduce", _never),
    ),
    "other bytes than planned": ("ddp", lambda: patch(f"{__name__}.transfers", _more)),
    "columns in the place of rows": (
        "one batch",
        lambda: patch.object(
            shards, "fully_shard", partial(fully_shard, shard_placement_fn=_last_axis)
        ),
    ),
}


def _never(self: Any, _: bool, **__: Any) -> None:
    for group in self._get_fsdp_state()._fsdp_param_groups:
        group.all_reduce_grads = False


def _more(*arguments: Any) -> list[Transfer]:
    return [t._replace(sent=1.05 * t.sent) for t in traffic.transfers(*arguments)]


def _last_axis(parameter: Any) -> Shard:
    return Shard(parameter.ndim - 1)


def everything(_: Path, __: int, ___: int) -> dict[str, Any]:
    said: dict[str, Any] = {name: traced(name) for name in CELLS}
    said["faults"] = {}
    for fault, (name, planted) in FAULTS.items():
        with planted():
            try:
                traced(name)
            except InputError as error:
                said["faults"][fault] = str(error)
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # With variables of its own it does not join a group of real processes.
    (answer,) = run(everything, tmp_path_factory.mktemp("trace"), world=1, environment={"A": "B"})
    assert isinstance(answer, dict), answer
    return answer


@pytest.mark.parametrize("name", CELLS)
def test_a_step_sends_what_is_planned(name: str, found: dict[str, Any]) -> None:
    """Oracle: the collectives of the run's own code, which trace.py compares with the plan."""
    kind, world, replicas = CELLS[name][:3]
    rows = {(how, group): row for how, group, *row in found[name]["rows"]}
    group = world // replicas
    gathers = {("all-gather", group), ("reduce-scatter", group)}
    assert (
        rows.keys()
        == {
            "none": set(),
            "ddp": {("all-reduce", 4), ("all-gather", 4)},
            "fsdp2": gathers,  # and the process owns no matrix
            "hsdp": gathers | {("all-to-all", group), ("all-reduce", replicas)},
            "one batch": gathers | {("all-reduce", replicas)},
        }[name]
    )
    for how, _ in rows.keys() - {("all-to-all", group)}:
        calls, sent, due = next(row for key, row in rows.items() if key[0] == how)
        assert sent == pytest.approx(due, rel=0.01)
    if kind in ("fsdp2", "hsdp"):  # two blocks and what is outside of them, for both passes
        assert rows["all-gather", group][0] == 2 * 3 * (1 if name == "one batch" else 2)


def test_processes_without_rows_are_named(found: dict[str, Any]) -> None:
    """Oracle: 1,024 processes share matrices of 512 rows and fewer."""
    assert "model.layers.0.self_attn.q_proj.weight" in found["fsdp2"]["empty"]
    assert found["ddp"]["empty"] == []
    assert found["fsdp2"]["matrices"] == 0
    assert found["hsdp"]["balance"] >= 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_split_is_found(fault: str, found: dict[str, Any]) -> None:
    """Oracle: a split that was made wrong on purpose ends the trace, in a line that says where."""
    message = found["faults"][fault]
    assert message.startswith("--trace: process ") and "\n" not in message
    assert {
        "rows of an owner's matrix": "fails while it updates weights",
        "a model that is not cut": "laid out as 'none'",
        "replicas that are not reduced": "has no gradient",
        "other bytes than planned": "by all-reduce among 4, where ",
        "columns in the place of rows": "and of which it should hold",
    }[fault] in message
