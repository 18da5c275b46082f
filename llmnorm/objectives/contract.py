"""What an objective is: the rows of a run, the model's inputs made of them, and its figures.

The training loop takes micro-batches from `batches`, divides the summed loss by the labels of the
whole step, and calls `evaluate` at intervals. It knows nothing else about what is learned.

What would surprise: an objective has no state to save. Row n of a run, and all that is drawn at
random for it, is a function of the configuration, the stages (data/stages.py) and n.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmnorm.config.stock import Tokens
from llmnorm.config.tree import TrainingSettings
from llmnorm.data.prepared import Preparation
from llmnorm.data.run_data import RunData, Stage
from llmnorm.objectives.teacher import Teacher
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MicroBatch", "Objective", "Preparation"]


class MicroBatch(NamedTuple):
    """The rows that one process runs at once.

    Attributes:
        inputs: the model's arguments by name, labels among them; tensors are on the CPU. Those of
            language models in training ask for no logits (`loss_only`). Tuples stay on the CPU.
        labels: how many labels of this micro-batch count in the loss.
        tokens: how many of its tokens count as trained on, which rate and MFU are taken of: the
            labels of causal_lm, all tokens that masked_lm, classification and sft read.
        rows: (rows,) their numbers in the run; no two processes have the same. Of sft the numbers
            of its examples, of which it may have none.
        spans: of each of `rows` where its tokens are in the inputs laid end to end: the first, and
            the one behind the last. Empty where an objective's rows are not selected.
        teacher: the model whose distributions take the place of the labels, if there is one.
    """

    inputs: Mapping[str, Tensor | int | tuple[int, ...]]
    labels: int
    tokens: int
    rows: Tensor
    spans: Sequence[tuple[int, int]] = ()
    teacher: Teacher | None = None

    def inputs_on(self, device: torch.device) -> dict[str, Any]:
        """The model's arguments with their tensors on `device`, without waiting for the copies.

        A teacher runs here, and its distributions are one of the arguments.
        """
        inputs: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        if self.teacher is not None:
            inputs["soft_targets"] = self.teacher.soft_targets(inputs)
        return inputs


class Objective:
    """A run's objective on its data.

    Attributes:
        data: the opened data: rows of packed text, labelled examples, or conversations.
        head_share: the share of the tokens for which the model's head is computed, for the FLOPs:
            1 with LlmNormForCausalLM, whatever its labels, unless it is told where they are (as sft
            does); LlmNormForMaskedLM computes its head at labels alone.
    """

    data: RunData
    head_share = 1.0

    def model_keys(self) -> dict[str, Any]:
        """Keys of the model's configuration that depend on the data, e.g. its classes."""
        return {}

    @property
    def ends(self) -> Tokens:
        """The tokens with which a text of the model ends."""
        return self.data.eos

    def rows_at_once(self, training: TrainingSettings, world: int) -> int:
        """How many rows one process runs at once: `training.micro_batch`, or its share of a step.

        Args:
            training: the settings of batches.
            world: the number of processes.
        """
        return training.micro_batch or max(1, training.rows // world)

    def read_in(self, stages: Sequence[Stage]) -> None:
        """Read the rows in these stages; who trains calls it once, before any row is asked for."""
        self.data = self.data.in_stages(stages)

    def learn_from(self, teacher: Teacher) -> None:
        """Take the model of `ObjectiveSettings.teacher_directory`; who trains calls it once."""
        raise NotImplementedError

    def describe(self, rows: int) -> str:
        """What a run of `rows` rows reads of each source or file: a table, a line each."""
        raise NotImplementedError

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step.

        Every process yields equally many in a step, without labels if need be, since a forward or
        backward pass may need all processes.

        Args:
            first_row: the number of the first step's first row.
            global_batch: rows of a step, over all processes.
            rank, world: this process's number and the number of processes.
            micro_batch: rows of a micro-batch.
        """
        raise NotImplementedError

    def read(
        self, numbers: NDArray[np.int64], *, rank: int, world: int, micro_batch: int
    ) -> list[MicroBatch]:
        """This process's micro-batches of a step of any rows, as `batches` makes them.

        Only of an objective whose settings say that its rows can be selected (`selects`).

        Args:
            numbers: the step's rows over all processes, in ascending order; every process gives
                the same and reads its part. `world` divides them.
            rank, world: this process's number and the number of processes.
            micro_batch: rows of a micro-batch; the last may have fewer.
        """
        raise NotImplementedError

    def sources(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `data.sources` each row of the run is of; nothing is read."""
        raise NotImplementedError

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Figures on the validation rows: "loss", others, and under "sources" those of each source.

        Every process must call it; each evaluates a part of the rows, and all get the same figures.
        An objective calls `parallel.poll()` before each batch, as often on every process, so that a
        signal is answered within a few batches.

        Args:
            model: in evaluation mode.
            micro_batch: rows at once.
            parallel: this process.

        Raises:
            Interrupted: a process was asked to stop.
        """
        raise NotImplementedError

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """Texts that the model generates, to be read beside the figures; none by default."""
        return []
