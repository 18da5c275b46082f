"""Fine-tuning on two processes against one: the same steps, figures and answers, rows unequal.

All scenarios run in one launch.
"""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm import cli
from llmnorm.objectives.sft import SFT
from llmnorm.parallel.check import check
from llmnorm.training.evaluation import evaluate
from llmnorm.training.step import count, forward_backward
from tests.distributed.processes import run as run_processes
from tests.distributed.tiny import Run, tensor_of
from tests.objectives.examples import Stream, Template, conversations, objective, on_disk
from tests.running import llmnorm, metrics_of

STEPS = 3
# (context, trained) lengths, of which two steps are made; 248 tokens of each are trained.
LENGTHS = [(180, 1), (170, 7), (160, 40), (10, 200)]
# By the room of a row: four rows, two for each process; one row, and none is left for the second.
ROOMS = {"four rows": 230, "one row": 800}
CELLS = [(sharding, case) for sharding in ("ddp", "fsdp2") for case in ROOMS]
if importlib.util.find_spec("deepspeed") is not None:
    CELLS += [("zero2", "one row"), ("zero3", "one row")]


class Tuned(Run):
    """A run on examples; `losses` holds those of its steps."""

    def __init__(self, sharding: str, sft: SFT, dtype: torch.dtype) -> None:
        model = {"max_position_embeddings": 1024, "initializer_range": 0.2}
        super().__init__(sharding, "adamw", model=model, dtype=dtype)
        rank, world = self.parallel.rank, self.parallel.world
        self._sft, self.losses = sft, []
        batches = {"global_batch": 4, "micro_batch": 1, "rank": rank, "world": world}
        self._batches = sft.batches(0, **batches)
        self.first = next(sft.batches(0, **batches))

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        micro_batches = next(self._batches)
        labels = count(micro_batches, self.parallel)[0].double()
        assert labels == 248
        loss = forward_backward(self.replica, micro_batches, labels, self.parallel)
        self.losses.append(float(self.parallel.reduce(loss)))
        return self.losses[-1]

    def figures(self) -> dict[str, Any]:
        return evaluate(self.model, self._sft, micro_batch=1, parallel=self.parallel)

    def texts(self) -> list[dict[str, str]]:
        return self._sft.texts(self.model, self.parallel)


def dtype_of(sharding: str) -> torch.dtype:
    """Masters of DeepSpeed are float32."""
    return torch.float32 if sharding.startswith("zero") else torch.float64


def tuned(sharding: str, room: int, tokenizer: Path, dtype: torch.dtype = torch.float64) -> Tuned:
    """The run before its first step; some answers end at once, as their references do."""
    stops = Template(list(range(3, 24)))
    data = conversations([LENGTHS], room, tokenizer_directory=tokenizer, template=stops)
    (source,) = data.sources
    held = Stream(source.train.examples, [""] * len(source.train))
    data = dataclasses.replace(data, sources=[dataclasses.replace(source, validation=held)])
    return Tuned(sharding, objective(data, "evaluation.answers=4"), dtype)


def everything(
    directory: Path, rank: int, world: int, *, tokenizer: Path, words: list[str]
) -> dict[str, Any]:
    """All cells, of which the weights after the steps are saved; and a whole run, by `words`."""
    said: dict[str, Any] = {}
    for sharding, case in CELLS:
        one = tuned(sharding, ROOMS[case], tokenizer, dtype_of(sharding))
        check(one.parallel, one.model, torch.cat([batch.rows for batch in one.first]))
        rows = [len(batch.inputs["input_ids"]) for batch in one.first]
        examples = sum(len(batch.rows) for batch in one.first)
        before, norms = one.figures(), one.train(0, STEPS)
        said[f"{sharding} {case}"] = {
            **{"norms": norms, "losses": one.losses, "rows": rows, "examples": examples},
            **{"before": before, "after": one.figures(), "texts": one.texts()},
        }
        one.save(directory.parents[1] / f"{sharding} {case}", STEPS)
    said["whole run"] = cli.main([*words, "parallel.sharding=fsdp2"])  # it closes the group
    return said


@pytest.fixture(scope="module")
def tokenizer(smoke_data: Path) -> Path:
    return next((smoke_data / "packed").glob("*/tokenizer"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def words(place: Path, run: Path) -> list[str]:
    """A run of steps with two examples each, for which one row is enough."""
    place.mkdir(exist_ok=True)
    steps = ["training.steps=4", "training.global_batch=2", "evaluation.every=2"]
    return ["train", str(on_disk(place, run)), *steps, "logging.health_every=2"]


@pytest.fixture(scope="module")
def one_process(place: Path, words: list[str]) -> Path:
    """The whole run of one process, which prepares the data."""
    llmnorm(*words, f"run_dir={place}/one")
    return place / "one"


@pytest.fixture(scope="module")
def launched(
    place: Path, tokenizer: Path, words: list[str], one_process: Path
) -> list[dict[str, Any]]:
    """What both processes say."""
    both = [*words, f"run_dir={place}/two"]
    said = run_processes(partial(everything, tokenizer=tokenizer, words=both), place / "launch")
    assert all(isinstance(answer, dict) for answer in said), said
    return said


@pytest.fixture(scope="module")
def alone(tokenizer: Path) -> dict[str, Any]:
    """One process in float64: what it would say, and its weights."""
    one = tuned("none", 800, tokenizer)
    before, norms = one.figures(), one.train(0, STEPS)
    state = {name: tensor_of(part) for name, part in one.state.items()}
    narrow = tuned("none", 800, tokenizer, torch.float32)
    narrow.train(0, STEPS)
    return {
        "float32": difference(narrow, {"state": state}),
        **{"norms": norms, "losses": one.losses, "before": before, "after": one.figures()},
        **{"texts": one.texts(), "state": state},
    }


def difference(one: Tuned, alone: dict[str, Any]) -> float:
    """The largest relative difference of a weight."""
    return max(
        float((tensor_of(part) - alone["state"][name]).norm() / alone["state"][name].norm())
        for name, part in one.state.items()
        if name.startswith("model.")
    )


@pytest.mark.parametrize(("sharding", "case"), CELLS)
def test_two_processes_take_the_steps_of_one(
    launched, place, tokenizer, alone, sharding, case
) -> None:
    """Oracle: one process, in float64, all examples in one row."""
    exact = not sharding.startswith("zero")
    for process in launched:
        said = process[f"{sharding} {case}"]
        assert said["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert said["norms"] == pytest.approx(alone["norms"], rel=1e-9 if exact else 1e-5)
        for when in ("before", "after"):
            found, expected = said[when], alone[when]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found["exact_match"] == expected["exact_match"]
        assert said["texts"] == alone["texts"]
    one = tuned("none", 800, tokenizer, dtype_of(sharding))
    one.load(place / f"{sharding} {case}", STEPS)
    # Of DeepSpeed: what float32 alone does to one process, since Adam divides by moments near 0.
    assert difference(one, alone) < (1e-9 if exact else 3 * alone["float32"])


def test_both_processes_run_equally_many_rows(launched) -> None:
    """Oracle: by hand, four rows of one example each, and one row of all four."""
    for sharding, case in CELLS:
        first, second = (process[f"{sharding} {case}"] for process in launched)
        assert first["rows"] == second["rows"] == ([1, 1] if case == "four rows" else [1])
        examples = (first["examples"], second["examples"])
        assert examples == ((2, 2) if case == "four rows" else (4, 0))
    shares = [
        process[f"{s} {c}"]["before"]["exact_match"] for process in launched for s, c in CELLS
    ]
    assert 0 < min(shares) < 1


def test_a_whole_run_of_two_processes_is_that_of_one(launched, place, one_process) -> None:
    """Oracle: the lines and samples of one process; the second of two runs rows of padding."""
    assert [process["whole run"] for process in launched] == [0, 0]
    for found, other in zip(metrics_of(place / "two"), metrics_of(one_process), strict=True):
        assert found.keys() == other.keys() and found["tokens"] == other["tokens"]
        for key in ("loss", "grad_norm") if "loss" in found else ():
            assert found[key] == pytest.approx(other[key], rel=1e-5)
        if "validation" in found:
            assert found["validation"]["exact_match"] == other["validation"]["exact_match"]
            assert found["validation"]["loss"] == pytest.approx(other["validation"]["loss"], 1e-5)
    two, one = ((run / "samples.jsonl").read_text() for run in (place / "two", one_process))
    assert two == one
