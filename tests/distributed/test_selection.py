"""Rows chosen by two processes against one: the same picks, the same weights after the steps.

All scenarios run in one launch.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from llmnorm.config.adapter import LoraSettings
from llmnorm.objectives.contract import MicroBatch
from llmnorm.selection.contract import Selector
from llmnorm.selection.settings import FeatureSettings
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
    ZERO += [("zero2", "gradient", "lora"), ("zero3", "zeroth_order", "full")]
    ZERO += [("zero3", "zeroth_order", "lora"), ("zero3", "hidden", "lora")]


class Given(Selector):
    """Chooses the rows that it was given for each step."""

    def __init__(self, steps: Sequence[Sequence[int]]) -> None:
        self._steps = steps

    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        first = int(numbers[0])
        return torch.tensor(self._steps[first // POOL]) - first


class GivenSettings(FeatureSettings):
    """Rows are measured as for CoLM, and chosen as another run has chosen them."""

    name: Literal["given"] = "given"
    steps: list[list[int]]
    """The numbers of the rows of each step."""

    def build(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> Given:
        return Given(self.steps)


class Chosen(Run):
    """A run on examples that are chosen; `picks` holds this process's of each step.

    With `given`, the picks of another run's steps, these are trained on.
    """

    def __init__(
        self,
        sharding: str,
        feature: str,
        adapter: str,
        dtype: torch.dtype,
        given: list[list[int]] | None = None,
    ) -> None:
        lora = LoraSettings(rank=2) if adapter == "lora" else None
        model = {"max_position_embeddings": 64, "initializer_range": 0.2}
        super().__init__(sharding, "adamw", model=model, dtype=dtype, adapter=lora)
        words = ["selection=colm", f"selection.pool={POOL}", *FEATURES[feature]]
        sft = objective(conversations(LENGTHS, ROOM), *words, batch=BATCH)
        config = sft.config.model_copy(update={"adapter": lora} if lora else {})
        if given is not None:
            same = config.selection.model_dump(include={*FeatureSettings.model_fields})
            config = config.model_copy(update={"selection": GivenSettings(**same, steps=given)})
        self._selecting = Selecting(
            config, sft, self.model, self.parallel, self.statistics, micro_batch=1
        )
        self.state |= self._selecting.state
        self.picks: list[list[int]] = []

    def choose(self, step: int) -> list[MicroBatch]:
        """This process's rows of a step."""
        micro_batches = self._selecting.choose(POOL * step)
        self.picks.append([int(row) for batch in micro_batches for row in batch.rows])
        return micro_batches

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        micro_batches = self.choose(step)
        labels = count(micro_batches, self.parallel)[0].double()
        loss = forward_backward(self.replica, micro_batches, labels, self.parallel)
        return float(self.parallel.reduce(loss))


def dtype_of(sharding: str) -> torch.dtype:
    """Masters of DeepSpeed are float32."""
    return torch.float32 if sharding.startswith("zero") else torch.float64


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells, of which the state after the steps is saved.

    Under ZeRO the run also chooses the rows of the step behind a checkpoint of one process, and
    another run has the picks of one process.
    """
    place = directory.parents[1]
    said: dict[str, Any] = {}
    for cell in (*EXACT, *ZERO):
        name = " ".join(cell)
        one = Chosen(*cell, dtype=dtype_of(cell[0]))
        norms = one.train(0, STEPS)
        said[name] = {"norms": norms, "picks": one.picks}
        if cell in EXACT:
            one.save(place / name, STEPS)
            continue
        one.load(place / f"{name} alone", STEPS)
        one.choose(STEPS)
        given = json.loads((place / f"{name}.json").read_text())
        same = Chosen(*cell, dtype=torch.float32, given=given)
        said[name]["with the same picks"] = same.train(0, STEPS)
        same.save(place / name, STEPS)
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selection")


class Alone(NamedTuple):
    """What one process has done.

    Attributes:
        norms: of the gradients of each step.
        picks: of each step, and of the step behind them.
        weights: after the steps, by name.
    """

    norms: list[float]
    picks: list[list[int]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Alone]:
    """One process in float32 on the cells of ZeRO; its checkpoints and its picks are in files."""
    found = {}
    for cell in ZERO:
        name = " ".join(cell)
        one = Chosen("none", *cell[1:], dtype=torch.float32)
        norms = one.train(0, STEPS)
        one.save(place / f"{name} alone", STEPS)
        weights = {n: tensor_of(p) for n, p in one.state.items() if n.startswith("model.")}
        one.choose(STEPS)
        picks = [sorted(rows) for rows in one.picks]
        (place / f"{name}.json").write_text(json.dumps(picks))
        found[name] = Alone(norms, picks, weights)
    return found


@pytest.fixture(scope="module")
def launched(place: Path, alone: dict[str, Alone]) -> list[dict[str, Any]]:
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
def test_picks_under_zero_are_those_of_one_process_at_equal_weights(launched, alone, cell) -> None:
    """Oracle: one process in float32, at the first step, and at the step behind a checkpoint of one
    process; other picks may part where rounding meets a near tie, so that the norms are compared up
    to the first that differ."""
    one = alone[" ".join(cell)]
    found = together(launched, cell)
    assert found[0] == one.picks[0] and found[STEPS] == one.picks[STEPS]
    same = next((n for n in range(STEPS) if found[n] != one.picks[n]), STEPS)
    for process in launched:
        assert process[" ".join(cell)]["norms"][:same] == pytest.approx(one.norms[:same], rel=1e-4)


@pytest.mark.parametrize("cell", ZERO, ids=" ".join)
def test_with_the_same_picks_zero_trains_as_one_process(launched, place, alone, cell) -> None:
    """Oracle: one process in float32 that has chosen these rows: norms and weights to 1e-6."""
    name = " ".join(cell)
    for process in launched:
        assert process[name]["with the same picks"] == pytest.approx(alone[name].norms, rel=1e-6)
    two = Chosen("none", *cell[1:], dtype=torch.float32, given=[])
    two.load(place / name, STEPS)
    for key, expected in alone[name].weights.items():
        torch.testing.assert_close(tensor_of(two.state[key]), expected, atol=1e-6, rtol=0)
