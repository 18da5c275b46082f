"""What an objective is: rows, what the model is asked about them, and figures.

The loop takes micro-batches from `batches`, divides the summed loss by the labels of the whole
step, and calls `evaluate` at intervals; it knows nothing else of what is learned. An objective has
no state: row n of a run and everything drawn for it is a function of the configuration and n.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmnorm.data.examples import Examples
from llmnorm.data.packed import PackedData
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MicroBatch(NamedTuple):
    """What one process runs at once.

    Attributes:
        inputs: the model's arguments by name, labels among them; CPU tensors.
        labels: what the summed loss is divided by, in this micro-batch.
        tokens: tokens that count as trained on.
        rows: numbers of the rows, no two processes' the same.
    """

    inputs: dict[str, Tensor | int]
    labels: int
    tokens: int
    rows: Tensor

    def inputs_on(self, device: torch.device) -> dict[str, Any]:
        """The model's arguments with their tensors on a device; copying them is not waited for."""
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }


class Objective:
    """A run's objective on its data.

    Attributes:
        data: what was opened: rows of packed text, or labelled examples.
        head_share: of the tokens, how many reach the model's head.
    """

    data: PackedData | Examples
    head_share = 1.0

    def model_keys(self) -> dict[str, Any]:
        """What the model's configuration has to know beside its settings."""
        return {}

    def describe(self, rows: int) -> str:
        """What a run of so many `rows` reads of each source or file: a table of a few lines."""
        raise NotImplementedError

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """This process's part of the steps from `first_row` on, without end.

        Args:
            global_batch: rows of a step, over all processes.
            rank, world: this process and how many there are.
            micro_batch: rows of a micro-batch.
        """
        raise NotImplementedError

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Figures on the validation rows; "loss", and under "sources" the same source by source.

        The model is in evaluation mode; every process evaluates its part, the sums are reduced.
        """
        raise NotImplementedError

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """Generated texts to read beside the figures, where the model can make any."""
        return []
