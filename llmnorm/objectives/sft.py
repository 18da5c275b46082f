"""The objective of supervised fine-tuning: the trained tokens of examples, e.g. a chat's answers.

A row of the run is an example: row n is chosen by the permutations that order packed rows too
(data/order.py), so that an epoch shows each example once. The examples of a step are laid into rows
of `data.context_length` tokens by best fit over the whole step (data/best_fit.py), and these rows
are dealt out to the processes; `training.micro_batch` counts them. Examples of a row do not see
each other: their positions restart at 0.

    training.global_batch    examples of a step, over all processes
    training.micro_batch     rows of data.context_length tokens that one process runs at once

Figures: the mean loss over trained tokens and its perplexity, of each source and in total; with
`evaluation.answers` the share of held-out examples whose greedy answer is the reference. A total
weighs the sources by their training bytes.

What would surprise: which rows are made of a step does not depend on the number of processes. Each
process has equally many rows of a step; where they do not divide, some get a row of padding.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from llmnorm.config.stock import Tokens, all_tokens
from llmnorm.config.tree import RunConfig, TrainingSettings
from llmnorm.data.best_fit import Example, best_fit, lay_out
from llmnorm.data.conversations import (
    ConversationData,
    Conversations,
    ConversationSource,
    ExampleStream,
)
from llmnorm.data.loader import AHEAD, document_bounds
from llmnorm.data.report import conversations_table
from llmnorm.data.run_data import Stage
from llmnorm.data.settings import TrainedOn
from llmnorm.objectives.answers import Answers
from llmnorm.objectives.contract import MicroBatch, Objective
from llmnorm.objectives.settings import SFTSettings
from llmnorm.objectives.summed_loss import summed_loss
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SURVEYED = 16_384  # examples whose rows are made before the run, to tell how full they are


class Layout(NamedTuple):
    """How the first steps of a run are laid out on one process.

    Attributes:
        filled: the share of the rows' tokens that belong to examples.
        most: the rows of the step that has most of them.
    """

    filled: float
    most: int


def preparation(config: RunConfig, settings: SFTSettings) -> ConversationData:
    """How the conversations of a run are prepared."""
    return ConversationData(config.data, config.tokenizer, settings.too_long)


class SFT(Objective):
    """Examples with their trained tokens.

    Args:
        config: the run's settings.
        conversations: the prepared data.
    """

    data: Conversations

    def __init__(self, config: RunConfig, conversations: Conversations) -> None:
        self.config, self.data = config, conversations
        self._follow_stages()

    def read_in(self, stages: Sequence[Stage]) -> None:
        """Read the examples in these stages."""
        super().read_in(stages)
        self._follow_stages()

    def _follow_stages(self) -> None:
        data, examples = self.data, self.config.total_steps(self.data.rows) * self.config.pool
        self._order = data.order(self.config.data_seed)
        weights = data.mixture(examples)
        pairs = zip(weights, data.sources, strict=True)
        labels = sum(w * s.trained_tokens / s.examples for w, s in pairs) / sum(weights)
        self.head_share = labels / data.row_tokens(examples)  # of an average example

    @classmethod
    def on_disk(
        cls,
        config: RunConfig,
        settings: SFTSettings,
        *,
        alone: bool,
        command: str,
        trained_on: TrainedOn | None = None,
    ) -> Self:
        """The objective on the run's data, which are prepared if need be (`settings.py`: build).

        Raises:
            InputError: the records cannot be used, or are to be prepared first.
        """
        kind = preparation(config, settings)
        return cls(config, kind.ready(alone=alone, command=command, trained_on=trained_on))

    @property
    def ends(self) -> Tokens:
        """The tokenizer's end token, and what ends a turn in its chat template."""
        return all_tokens(self.data.eos, self.data.template.stops)

    def rows_at_once(self, training: TrainingSettings, world: int) -> int:
        """How many rows one process runs at once: `training.micro_batch`, or its share of a step.

        That is its share of the step with most rows among the first; a later step with more rows
        is run in two parts.
        """
        return training.micro_batch or -(-self._layout.most // world)

    def describe(self, rows: int) -> str:
        """What a run of `rows` examples reads of each source, a line each; how full rows are."""
        batch = self.config.training.rows
        return (
            f"{conversations_table(self.data, rows)}\n{batch} examples a step in rows of "
            f"{self.data.context_length} tokens, which are {self._layout.filled:.1%} "
            f"filled; the head runs for {self.head_share:.1%} of the examples' tokens"
        )

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield, without end, this process's micro-batches of each step.

        The last micro-batch of a step may have fewer rows than `micro_batch`, on every process
        equally many.
        """
        for first, source, index in self._steps(first_row, global_batch):
            numbers = np.arange(first, first + global_batch)
            yield self._deal(numbers, source, index, rank, world, micro_batch)

    def read(
        self, numbers: NDArray[np.int64], *, rank: int, world: int, micro_batch: int
    ) -> list[MicroBatch]:
        """This process's micro-batches of a step of any examples, laid out over all of them."""
        return self._deal(numbers, *self._order.find(numbers), rank, world, micro_batch)

    def sources(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `data.sources` each example of the run is of."""
        return self._order.find(numbers)[0]

    def _deal(
        self,
        numbers: NDArray[np.int64],
        source: NDArray[np.int64],
        index: NDArray[np.int64],
        rank: int,
        world: int,
        micro_batch: int,
    ) -> list[MicroBatch]:
        """This process's rows of a step's examples, of which `numbers` are the run's."""
        streams = [source.train for source in self.data.sources]
        rows = best_fit(self._sizes(source, index), self.data.context_length)
        share = -(-len(rows) // world)
        mine = [*rows[rank::world], []][:share]  # a row of padding where one is missing
        return [
            self._micro_batch(
                [[(streams[source[n]], int(index[n])) for n in row] for row in part],
                [int(numbers[n]) for row in part for n in row],
            )
            for part in (
                mine[start : start + micro_batch] for start in range(0, share, micro_batch)
            )
        ]

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Loss in nats a trained token, perplexity, and the share of answers that are right."""
        sources: dict[str, dict[str, float]] = {}
        for source in self.data.sources:
            batches = self._evaluation_batches(source, micro_batch, parallel)
            summed, labels = summed_loss(model, batches, parallel)
            sources[source.name] = _figures(summed / labels)
            right = self._answers.exact_match(model, source, micro_batch, parallel)
            if right is not None:
                sources[source.name]["exact_match"] = right
        figures = _figures(self._mean(sources, "loss"))
        if any("exact_match" in found for found in sources.values()):
            figures["exact_match"] = self._mean(sources, "exact_match")
        return {**figures, "sources": sources}

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """Greedy answers to held-out examples beside their references, or to the prompts given."""
        return self._answers.texts(model, parallel)

    @cached_property
    def _answers(self) -> Answers:
        return Answers(self.config, self.data)

    @cached_property
    def _layout(self) -> Layout:
        batch, room = self.config.training.rows, self.data.context_length
        steps = min(max(1, SURVEYED // batch), max(1, self.data.rows // batch))
        taken, counts = 0, []
        for _, source, index in islice(self._steps(0, batch), steps):
            sizes = self._sizes(source, index)
            taken += int(sizes.sum())
            counts.append(len(best_fit(sizes, room)))
        return Layout(taken / (sum(counts) * room), max(counts))

    def _steps(
        self, first_row: int, global_batch: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield, without end, each step's first row, and the sources and indices of its rows."""
        steps = -(-AHEAD // global_batch)
        while True:
            source, index = self._order.locate(first_row, steps * global_batch)
            for start in range(0, steps * global_batch, global_batch):
                part = slice(start, start + global_batch)
                yield first_row + start, source[part], index[part]
            first_row += steps * global_batch

    def _sizes(self, source: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens of a row each example takes, (examples,)."""
        sizes = np.empty(len(source), np.int64)
        for number in np.unique(source).tolist():
            chosen = source == number
            sizes[chosen] = self.data.sources[number].train.sizes[index[chosen]] - 1
        return sizes

    def _evaluation_batches(
        self, source: ConversationSource, micro_batch: int, parallel: Parallel
    ) -> Iterator[MicroBatch]:
        """Yield the validation examples of a source that this process evaluates.

        Every process yields the same number of batches, of equally many rows.
        """
        stream, world = source.validation, parallel.world
        rows = best_fit(stream.sizes - 1, self.data.context_length)
        rows_at_once = min(micro_batch, -(-len(rows) // world))
        for first in range(0, len(rows), world * rows_at_once):
            start = first + parallel.rank * rows_at_once
            mine = rows[start : start + rows_at_once]
            mine += [[]] * (rows_at_once - len(mine))
            examples = [[(stream, number) for number in row] for row in mine]
            yield self._micro_batch(examples, [number for row in mine for number in row])

    def _micro_batch(
        self, rows: Sequence[Sequence[tuple[ExampleStream, int]]], numbers: list[int]
    ) -> MicroBatch:
        """The model's inputs for rows of examples, and what is counted of them."""
        examples: list[list[Example]] = [
            [stream.read(index) for stream, index in row] for row in rows
        ]
        data = self.data
        inputs = lay_out(examples, data.context_length, data.pad)
        bounds = document_bounds(inputs["position_ids"])
        read, spans = 0, list[tuple[int, int]]()
        for row, of_row in enumerate(examples):
            start = row * data.context_length
            for ids, _ in of_row:
                read += len(ids) - 1
                spans.append((start, start + len(ids) - 1))
                start = spans[-1][1]
        return MicroBatch(
            {**inputs, **bounds, "loss_only": True},
            len(inputs["label_positions"]),
            read,
            torch.tensor(numbers, dtype=torch.int64),
            spans,
        )

    def _mean(self, sources: dict[str, dict[str, float]], name: str) -> float:
        """The mean of a figure over the sources that have it."""
        found = {source: figures.get(name) for source, figures in sources.items()}
        share = self.data.mean({s: float(f is not None) for s, f in found.items()})
        return self.data.mean({s: f or 0.0 for s, f in found.items()}) / share


def _figures(nats_per_token: float) -> dict[str, float]:
    return {"loss": nats_per_token, "perplexity": math.exp(min(nats_per_token, 700.0))}
