"""The next token: loss, perplexity and bits per byte, source by source.

Every token of the validation text is charged exactly once (the last row is padded with ignored
labels), so bits per byte = summed loss / ln 2 / bytes of the text, whatever the tokenizer; it can
be held against a compressor's rate on the same text. Totals weigh the sources by their training
bytes.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmnorm.config import RunConfig
from llmnorm.data import packing
from llmnorm.data.loader import Batch, Loader, evaluation_batches
from llmnorm.training.objectives.contract import MicroBatch, Objective
from llmnorm.training.parallel import Parallel
from llmnorm.training.samples import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(Objective):
    """Rows of packed text and their next tokens."""

    def __init__(self, config: RunConfig, *, alone: bool, command: str) -> None:
        self._config = config
        self.data = self._packed = packing.ready(
            config.data, config.tokenizer, alone=alone, command=command
        )

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """This process's part of the steps from `first_row` on, without end."""
        loader = Loader(
            self._packed,
            seed=self._config.data_seed,
            global_batch=global_batch,
            rank=rank,
            world=world,
            micro_batch=micro_batch,
        )
        return ([_asked(batch) for batch in step] for step in loader.batches(first_row))

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Loss in nats a token, perplexity and bits per byte."""
        sources: dict[str, dict[str, float]] = {}
        for index, source in enumerate(self._packed.sources):
            # Summed in float64: the total is the same to the last digits however rows are spread.
            total = torch.zeros(2, dtype=torch.float64)
            place = parallel.rank, parallel.world, micro_batch
            for asked in map(_asked, evaluation_batches(self._packed, index, *place)):
                if asked.labels == 0 and not parallel.spread:  # shards come from all processes
                    continue
                with parallel.autocast():
                    inputs = {k: v.to(parallel.device) for k, v in asked.inputs.items()}
                    loss = model(**inputs, num_items_in_batch=1.0).loss
                total += torch.tensor([float(loss), asked.labels], dtype=torch.float64)
            summed, tokens = parallel.reduce(total).tolist()
            sources[source.name] = _figures(summed / tokens, summed / source.validation_bytes)
        loss = self._packed.mean({name: one["loss"] for name, one in sources.items()})
        bits = self._packed.mean({name: one["bits_per_byte"] for name, one in sources.items()})
        return {**_figures(loss, bits * math.log(2)), "sources": sources}

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self._config, self._packed)

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """What the model puts after the prompts of `evaluation`."""
        return self._samples.generate(model, parallel)


def _asked(batch: Batch) -> MicroBatch:
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "shift_labels")}
    labels = int((batch["shift_labels"] != -100).sum())
    return MicroBatch(inputs, labels, labels, batch["rows"])


def _figures(nats_per_token: float, nats_per_byte: float) -> dict[str, float]:
    return {
        "loss": nats_per_token,
        "perplexity": math.exp(min(nats_per_token, 700.0)),
        "bits_per_byte": nats_per_byte / math.log(2),
    }
