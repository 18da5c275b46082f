"""Rows chosen by two processes against one: the same picks, the same weights after the steps.

All scenarios run in one launch.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.config.adapter import LoraSettings
from llmnorm.training.selecting import Selecting
from llmnorm.training.step import count, forward_backward
from tests.distributed.processes import run as run_processes
from tests.distributed.tiny import Run, tensor_of
from tests.objectives.examples import conversations, objective

STEPS, POOL, BATCH = 3, 12, 6
# Two sources, of which the second is small; (context, trained) lengths.
LENGTHS = [
    [(5 + 3 * (n % 7), 2 + n % 5) for n in range(30)],
    [(4 + n % 6, 3 + n % 3) for n in range(9)],
]
ROOM = 60
FEATURES = {
    "zeroth_order": [],
    "probes": ["selection.probes=3", "selection.keep=none"],
    "gradient": ["selection.feature=gradient", "selection.sketch=5"],
    "hidden": ["selection.feature=hidden"],
}
EXACT = [
    ("ddp", "zeroth_order", "full"),
    ("ddp", "gradient", "lora"),
    ("fsdp2", "zeroth_order", "lora"),
    ("fsdp2", "gradient", "full"),
    ("fsdp2", "gradient", "lora"),
    ("fsdp2", "probes", "full"),
    ("fsdp2", "hidden", "full"),
]
ZERO = []
if importlib.util.find_spec("deepspeed") is not None:
    ZERO = [("zero2", "zeroth_order", "full"), ("zero2", "gradient", "full")]
    ZERO += [("zero3", "zeroth_order", "full"), ("zero3", "hidden", "lora")]


class Chosen(Run):
    """A run on examples that are chosen; `picks` holds this process's of each step."""

    def __init__(self, sharding: str, feature: str, adapter: str, dtype: torch.dtype) -> None:
        lora = LoraSettings(rank=2) if adapter == "lora" else None
        model = {"max_position_embeddings": 64, "initializer_range": 0.2}
        super().__init__(sharding, "adamw", model=model, dtype=dtype, adapter=lora)
        words = ["selection=colm", f"selection.pool={POOL}", *FEATURES[feature]]
        sft = objective(conversations(LENGTHS, ROOM), *words, batch=BATCH)
        config = sft.config.model_copy(update={"adapter": lora} if lora else {})
        self._selecting = Selecting(
            config, sft, self.model, self.parallel, self.statistics, micro_batch=1
        )
        self.state |= self._selecting.state
        self.picks: list[list[int]] = []

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        micro_batches = self._selecting.choose(POOL * step)
        self.picks.append([int(row) for batch in micro_batches for row in batch.rows])
        labels = count(micro_batches, self.parallel)[0].double()
        loss = forward_backward(self.replica, micro_batches, labels, self.parallel)
        return float(self.parallel.reduce(loss))


def dtype_of(sharding: str) -> torch.dtype:
    """Masters of DeepSpeed are float32."""
    return torch.float32 if sharding.startswith("zero") else torch.float64


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells, of which the state after the steps is saved."""
    said: dict[str, Any] = {}
    for cell in (*EXACT, *ZERO):
        one = Chosen(*cell, dtype=dtype_of(cell[0]))
        norms = one.train(0, STEPS)
        said[" ".join(cell)] = {"norms": norms, "picks": one.picks}
        one.save(directory.parents[1] / " ".join(cell), STEPS)
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selection")


@pytest.fixture(scope="module")
def launched(place: Path) -> list[dict[str, Any]]:
    """What both processes say."""
    said = run_processes(everything, place / "launch")
    assert all(isinstance(answer, dict) for answer in said), said
    return said


def together(launched: list[dict[str, Any]], cell: tuple[str, str, str]) -> list[list[int]]:
    """The picks of each step on both processes, each with as many rows as it has."""
    parts = [process[" ".join(cell)]["picks"] for process in launched]
    return [sorted([*one, *other]) for one, other in zip(*parts, strict=True)]


@pytest.mark.parametrize("cell", EXACT, ids=" ".join)
def test_two_processes_choose_and_train_as_one(launched, place, cell) -> None:
    """Oracle: one process, float64: the picks of all steps, norms and weights to 1e-9, and the
    selector's history."""
    alone = Chosen("none", *cell[1:], dtype=torch.float64)
    norms = alone.train(0, STEPS)
    expected = [sorted(rows) for rows in alone.picks]
    assert together(launched, cell) == expected
    assert all(len(rows) == BATCH for rows in expected)
    for process in launched:
        assert process[" ".join(cell)]["norms"] == pytest.approx(norms, rel=1e-9)
    two = Chosen("none", *cell[1:], dtype=torch.float64)
    two.load(place / " ".join(cell), STEPS)
    for name, part in two.state.items():
        if name.startswith(("model.", "selection.")):
            found, wanted = tensor_of(part).double(), tensor_of(alone.state[name]).double()
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cell", ZERO, ids=" ".join)
def test_the_first_picks_under_zero_are_those_of_one_process(launched, cell) -> None:
    """Oracle: one process in float32 with the same weights; later picks may part where rounding
    meets a near tie, so that the norms are compared up to the first that differ."""
    alone = Chosen("none", *cell[1:], dtype=torch.float32)
    norms = alone.train(0, STEPS)
    found, expected = together(launched, cell), [sorted(rows) for rows in alone.picks]
    assert found[0] == expected[0]
    same = next((n for n in range(STEPS) if found[n] != expected[n]), STEPS)
    for process in launched:
        assert process[" ".join(cell)]["norms"][:same] == pytest.approx(norms[:same], rel=1e-4)
