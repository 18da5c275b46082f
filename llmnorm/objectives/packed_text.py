"""Packed text: the rows of the objectives that learn from plain text."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmnorm.config.tree import RunConfig
from llmnorm.data import packing
from llmnorm.data.loader import Batch, Loader, TrainingRows
from llmnorm.data.report import sources_table
from llmnorm.objectives.contract import MicroBatch, Objective


def preparation(config: RunConfig) -> packing.PackedText:
    """How the text of a run is prepared."""
    return packing.PackedText(config.data, config.tokenizer)


class PackedText(Objective):
    """Rows of packed text; a subclass makes the model's inputs of them.

    Attributes:
        config: the run's settings.
        data: the prepared data.
    """

    data: packing.PackedData

    def __init__(
        self,
        config: RunConfig,
        *,
        alone: bool,
        command: str,
        trained_on: packing.TrainedOn | None = None,
    ) -> None:
        self.config = config
        self.data = preparation(config).ready(alone=alone, command=command, trained_on=trained_on)

    @property
    def packed(self) -> packing.PackedData:
        """The prepared data."""
        return self.data

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """The model's inputs for a batch of training rows, and what is counted of them."""
        raise NotImplementedError

    def describe(self, rows: int) -> str:
        """What a run of `rows` rows reads of each source: the table of `data --stats`."""
        return sources_table(self.packed, rows)

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step."""
        loader = Loader(
            self.packed,
            seed=self.config.data_seed,
            global_batch=global_batch,
            rank=rank,
            world=world,
            micro_batch=micro_batch,
        )
        return ([self.micro_batch(batch) for batch in step] for step in loader.batches(first_row))

    def read(
        self, numbers: NDArray[np.int64], *, rank: int, world: int, micro_batch: int
    ) -> list[MicroBatch]:
        """This process's micro-batches of a step of any rows: the rank-th part of them."""
        share = len(numbers) // world
        assert share * world == len(numbers), (len(numbers), world)
        mine = numbers[rank * share : (rank + 1) * share]
        source, index = self._rows.order.find(mine)
        parts = [slice(first, first + micro_batch) for first in range(0, share, micro_batch)]
        return [
            self.micro_batch(self._rows.batch(mine[part], source[part], index[part]))
            for part in parts
        ]

    def sources(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `data.sources` each row of the run is of."""
        return self._rows.order.find(numbers)[0]

    @cached_property
    def _rows(self) -> TrainingRows:
        return TrainingRows(self.packed, self.config.data_seed)
