"""The plan's memory of sharded runs against the bytes that real processes hold."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.plan_cells import Cell, cells, counting, planned
from tests.distributed.processes import run

CELLS = [
    Cell("deep", "ddp", "muon", False, "softmax", 2),
    Cell("deep", "fsdp2", "adamp", True, "softmax", 1),
    Cell("wide", "fsdp2", "adamw", False, "softmax", 2),
]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Any:
    """What each of two processes counts in every cell."""
    scenario = partial(counting, chosen=CELLS, places=[f"data.dir={smoke_data}"])
    answers = run(scenario, tmp_path_factory.mktemp("plan"))
    assert all(isinstance(answer, dict) for answer in answers), answers[0]
    return answers


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_planned_bytes_are_those_of_two_processes(
    cell: Cell, counts: Any, smoke_data: Path
) -> None:
    """Oracle: storages that operations have made and that still live; peak 10 %, state exact."""
    said = planned(cell, [f"data.dir={smoke_data}"])
    assert said["state"] == max(answer[cell.name]["state"] for answer in counts)
    assert said["peak"] == pytest.approx(
        max(answer[cell.name]["peak"] for answer in counts), rel=0.1
    )


def test_the_cells_have_every_pair() -> None:
    """Oracle: a count; 42 is the least, since there are 7 shardings and 6 optimizers."""
    found = cells()
    assert 42 <= len(found) <= 60
    assert len({(c.sharding, c.optimizer) for c in found}) == 42
    assert len({(c.size, c.mixer, c.recompute) for c in found}) > 9
