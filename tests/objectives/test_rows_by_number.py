"""Rows that are asked for by their numbers are those that a run reads in turn."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmnorm.config.file import load
from llmnorm.data.loader import IGNORED
from llmnorm.objectives.causal_lm import CausalLM
from llmnorm.objectives.contract import MicroBatch, Objective
from tests.objectives.examples import conversations, objective
from tests.running import SMOKE

LENGTHS = [[(3, 2)] * 5, [(1, 4), (9, 3)] * 2, [(6, 1)] * 11]


@pytest.fixture(scope="module", params=["causal_lm", "sft"])
def learned(request: pytest.FixtureRequest, smoke_data: Path) -> Objective:
    if request.param == "sft":
        return objective(conversations(LENGTHS, room=20))
    config = load(SMOKE, [f"data.dir={smoke_data}"]).config
    return CausalLM(config, alone=True, command="")


def same(one: list[MicroBatch], other: list[MicroBatch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.inputs.keys() == b.inputs.keys() and a[1:3] == b[1:3]
        assert a.rows.equal(b.rows) and a.spans == b.spans
        for name, value in a.inputs.items():
            assert (
                torch.equal(value, b.inputs[name])
                if torch.is_tensor(value)
                else (value == b.inputs[name])
            )


def test_the_rows_of_a_step_by_number_are_its_batch(learned: Objective) -> None:
    """Oracle: `batches`, on each of two processes, in the middle of a run."""
    for rank in (0, 1):
        keys: dict[str, Any] = {"rank": rank, "world": 2, "micro_batch": 2}
        steps = learned.batches(24, global_batch=8, **keys)
        for number, step in enumerate(islice(steps, 3)):
            first = 24 + 8 * number
            same(learned.read(np.arange(first, first + 8), **keys), step)


def test_any_rows_are_dealt_out_to_the_processes(learned: Objective) -> None:
    """Oracle: the tokens of each row where a whole batch of one process has them; each row is read
    once, with the positions, labels and spans that it has alone."""
    numbers = np.array([2, 3, 11, 17, 30, 31])
    alone = {
        number: learned.read(np.array([number]), rank=0, world=1, micro_batch=1)[0]
        for number in numbers.tolist()
    }
    found = []
    for rank in range(3):
        for batch in learned.read(numbers, rank=rank, world=3, micro_batch=1):
            assert len(batch.spans) == len(batch.rows)
            for number, (start, stop) in zip(batch.rows.tolist(), batch.spans, strict=True):
                found.append(number)
                (begin, end), one = alone[number].spans[0], alone[number].inputs
                for key in ("input_ids", "position_ids", "shift_labels"):
                    here = batch.inputs[key].flatten()[start:stop]
                    assert here.equal(one[key].flatten()[begin:end])
                    assert end - begin == stop - start
    assert sorted(found) == numbers.tolist()


def test_spans_hold_all_labels_and_no_padding(learned: Objective) -> None:
    """Oracle: the labels outside of all spans, which are none; every row has one."""
    for batch in learned.read(np.arange(12), rank=0, world=1, micro_batch=3):
        labels = batch.inputs["shift_labels"].flatten().clone()
        for start, stop in batch.spans:
            assert (labels[start:stop] != IGNORED).any()
            labels[start:stop] = IGNORED
        assert (labels == IGNORED).all()


def test_sources_are_known_without_reading(learned: Objective) -> None:
    """Oracle: the order's own sources; with packed text those that its batches name."""
    order = learned._rows.order if isinstance(learned, CausalLM) else learned._order  # type: ignore[attr-defined]
    numbers = np.array([40, 3, 17])
    assert learned.sources(numbers).tolist() == [
        int(order.locate(n, 1)[0][0]) for n in numbers.tolist()
    ]
