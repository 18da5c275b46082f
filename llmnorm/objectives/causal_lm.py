"""The next token: loss, perplexity and bits per byte, source by source.

Every token of the validation text is charged exactly once (the last row is padded with ignored
labels), so bits per byte = summed loss / ln 2 / bytes of the text, whatever the tokenizer; it can
be held against a compressor's rate on the same text. Totals weigh the sources by their training
bytes.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmnorm.data.loader import IGNORED, Batch, evaluation_batches
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.packed_text import PackedText
from llmnorm.objectives.samples import Samples
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(PackedText):
    """Rows of packed text and their next tokens."""

    def ask(self, batch: Batch) -> MicroBatch:
        """The rows and their next tokens; a label is a token."""
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "shift_labels")}
        labels = int((batch["shift_labels"].numpy() != IGNORED).sum())
        return MicroBatch(inputs, labels, labels, batch["rows"])

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Loss in nats a token, perplexity and bits per byte."""
        sources: dict[str, dict[str, float]] = {}
        for index, source in enumerate(self.packed.sources):
            # Summed in float64: the total is the same to the last digits however rows are spread.
            total = torch.zeros(2, dtype=torch.float64)
            place = parallel.rank, parallel.world, micro_batch
            for asked in map(self.ask, evaluation_batches(self.packed, index, *place)):
                if asked.labels == 0 and not parallel.spread:  # shards come from all processes
                    continue
                with parallel.autocast():
                    inputs = asked.inputs_on(parallel.device)
                    loss = model(**inputs, num_items_in_batch=1.0).loss
                total += torch.tensor([float(loss), asked.labels], dtype=torch.float64)
            summed, tokens = parallel.reduce(total).tolist()
            sources[source.name] = _figures(summed / tokens, summed / source.validation_bytes)
        loss = self.packed.mean({name: one["loss"] for name, one in sources.items()})
        bits = self.packed.mean({name: one["bits_per_byte"] for name, one in sources.items()})
        return {**_figures(loss, bits * math.log(2)), "sources": sources}

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.config, self.packed)

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """What the model puts after the prompts of `evaluation`."""
        return self._samples.generate(model, parallel)


def _figures(nats_per_token: float, nats_per_byte: float) -> dict[str, float]:
    return {
        "loss": nats_per_token,
        "perplexity": math.exp(min(nats_per_token, 700.0)),
        "bits_per_byte": nats_per_byte / math.log(2),
    }
