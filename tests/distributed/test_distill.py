"""Distillation on two processes against one: each holds the teacher whole, whatever is sharded.

All scenarios run in one launch.
"""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.objectives.distill import Distill
from llmnorm.parallel.check import check
from llmnorm.training.evaluation import evaluate
from llmnorm.training.step import count, forward_backward
from llmnorm.training.teacher import give_teacher
from tests.distributed.processes import run as run_processes
from tests.distributed.tiny import Run, tensor_of
from tests.running import SMOKE, llmnorm, metrics_of

STEPS, ROWS = 3, 8
CELLS = ["ddp", "fsdp2"]
if importlib.util.find_spec("deepspeed") is not None:
    CELLS += ["zero2", "zero3"]
MODEL = {"vocab_size": 512, "max_position_embeddings": 64, "initializer_range": 0.2}


class Taught(Run):
    """A tiny model that learns from the smoke run; `losses` holds those of its steps."""

    def __init__(self, sharding: str, words: list[str], dtype: torch.dtype) -> None:
        super().__init__(sharding, "adamw", model=MODEL, dtype=dtype)
        config = load(SMOKE, words).config
        objective = config.objective.build(config, alone=False, command="")
        assert isinstance(objective, Distill)
        assert give_teacher(config, objective, self.parallel, {}) is not None
        assert objective._teacher is not None
        self.teacher = objective._teacher._model.to(dtype)
        self._objective, self.losses = objective, []
        rank, world = self.parallel.rank, self.parallel.world
        layout = {"global_batch": ROWS, "micro_batch": 2 if world > 1 else 4}
        self._batches = objective.batches(0, rank=rank, world=world, **layout)
        self.first = next(objective.batches(0, rank=rank, world=world, **layout))

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        micro_batches = next(self._batches)
        assert len(micro_batches) == 2
        labels = count(micro_batches, self.parallel)[0].double()
        loss = forward_backward(self.replica, micro_batches, labels, self.parallel)
        self.losses.append(float(self.parallel.reduce(loss)))
        return self.losses[-1]

    def figures(self) -> dict[str, Any]:
        return evaluate(self.model, self._objective, micro_batch=4, parallel=self.parallel)


def dtype_of(sharding: str) -> torch.dtype:
    """Masters of DeepSpeed are float32."""
    return torch.float32 if sharding.startswith("zero") else torch.float64


def everything(
    directory: Path, rank: int, world: int, *, words: list[str], whole: list[str]
) -> dict[str, Any]:
    """All cells, of which the weights after the steps are saved; and a whole run, by `whole`."""
    said: dict[str, Any] = {}
    for sharding in CELLS:
        one = Taught(sharding, words, dtype_of(sharding))
        check(one.parallel, one.model, torch.cat([batch.rows for batch in one.first]))
        held = sum(p.numel() for p in one.teacher.parameters())
        norms = one.train(0, STEPS)
        found = {"norms": norms, "losses": one.losses, "held": held}
        said[sharding] = found | {"figures": one.figures()}
        one.save(directory.parents[1] / sharding, STEPS)
    said["whole run"] = cli.main([*whole, "parallel.sharding=fsdp2"])  # it closes the group
    return said


@pytest.fixture(scope="module")
def words(run: Path, smoke_data: Path) -> list[str]:
    """The settings of rows and teacher."""
    return [f"data.dir={smoke_data}", "objective.name=distill", f"objective.teacher={run}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def launched(place: Path, words: list[str]) -> list[dict[str, Any]]:
    """What both processes say; a whole run, that of one process in `one`, of both in `two`."""
    whole = ["train", str(SMOKE), *words, "model.num_hidden_layers=1", "training.steps=3"]
    llmnorm(*whole, f"run_dir={place}/one")
    scenario = partial(everything, words=words, whole=[*whole, f"run_dir={place}/two"])
    said = run_processes(scenario, place / "launch")
    assert all(isinstance(answer, dict) for answer in said), said
    return said


@pytest.fixture(scope="module")
def alone(words: list[str]) -> dict[str, Any]:
    """One process in float64: what it would say, and its weights."""
    one = Taught("none", words, torch.float64)
    norms = one.train(0, STEPS)
    state = {name: tensor_of(part) for name, part in one.state.items()}
    narrow = Taught("none", words, torch.float32)
    narrow.train(0, STEPS)
    return {
        "float32": difference(narrow, {"state": state}),
        **{"norms": norms, "losses": one.losses, "figures": one.figures()},
        **{"state": state, "held": sum(p.numel() for p in one.teacher.parameters())},
    }


def difference(one: Taught, alone: dict[str, Any]) -> float:
    """The largest relative difference of a weight."""
    return max(
        float((tensor_of(part) - alone["state"][name]).norm() / alone["state"][name].norm())
        for name, part in one.state.items()
        if name.startswith("model.")
    )


@pytest.mark.parametrize("sharding", CELLS)
def test_two_processes_take_the_steps_of_one(launched, place, words, alone, sharding) -> None:
    """Oracle: one process, in float64; the teacher's weights counted on each process."""
    exact = not sharding.startswith("zero")
    for process in launched:
        said = process[sharding]
        assert said["held"] == alone["held"]
        assert said["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert said["norms"] == pytest.approx(alone["norms"], rel=1e-9 if exact else 1e-5)
        found, expected = said["figures"], alone["figures"]
        for key in ("loss", "acceptance"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)
        # In float32 a tie may be decided otherwise.
        within = 1e-12 if exact else 1e-3
        assert found["agreement"] == pytest.approx(expected["agreement"], abs=within)
    one = Taught("none", words, dtype_of(sharding))
    one.load(place / sharding, STEPS)
    # Of DeepSpeed: what float32 alone does to one process, since Adam divides by moments near 0.
    assert difference(one, alone) < (1e-9 if exact else 3 * alone["float32"])


def test_a_whole_run_of_two_processes_is_that_of_one(launched, place) -> None:
    """Oracle: the lines of one process."""
    assert [process["whole run"] for process in launched] == [0, 0]
    for found, other in zip(metrics_of(place / "two"), metrics_of(place / "one"), strict=True):
        assert found.keys() == other.keys() and found["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm") if "loss" in found else ():
            assert found[key] == pytest.approx(other[key], rel=1e-5)
        for key in ("loss", "agreement", "acceptance") if "validation" in found else ():
            expected = other["validation"][key]
            assert found["validation"][key] == pytest.approx(expected, rel=1e-5, abs=1e-3)
