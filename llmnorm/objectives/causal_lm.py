"""The objective of language models: predict the next token.

Figures: loss (nats per token), perplexity, and bits per byte, for each source and in total; a total
weighs the sources by their training bytes. Every token of the validation text is a label exactly
once (the last row is padded with ignored labels). So bits per byte = summed loss / ln 2 / bytes of
the text does not depend on the tokenizer and can be compared with a compressor's rate.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmnorm.data.loader import IGNORED, Batch, document_bounds, evaluation_batches
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.packed_text import PackedText
from llmnorm.objectives.samples import Samples
from llmnorm.objectives.summed_loss import summed_loss
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(PackedText):
    """Rows of packed text and their next tokens."""

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """The rows with their next tokens as labels; what counts as trained on is the labels."""
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "shift_labels")}
        bounds = document_bounds(batch["position_ids"])
        labels = int((batch["shift_labels"].numpy() != IGNORED).sum())
        rows, length = batch["input_ids"].shape
        spans = [(first, first + length) for first in range(0, rows * length, length)]
        return MicroBatch(
            {**inputs, **bounds, "loss_only": True}, labels, labels, batch["rows"], spans
        )

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Loss in nats a token, perplexity and bits per byte."""
        sources: dict[str, dict[str, float]] = {}
        for index, source in enumerate(self.packed.sources):
            mine = evaluation_batches(
                self.packed, index, parallel.rank, parallel.world, micro_batch
            )
            summed, tokens = summed_loss(model, map(self.micro_batch, mine), parallel)
            sources[source.name] = _figures(summed / tokens, summed / source.validation_bytes)
        loss = self.packed.mean({name: found["loss"] for name, found in sources.items()})
        bits = self.packed.mean({name: found["bits_per_byte"] for name, found in sources.items()})
        return {**_figures(loss, bits * math.log(2)), "sources": sources}

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self.config, self.packed)

    def texts(self, model: "PreTrainedModel", parallel: Parallel) -> list[dict[str, str]]:
        """The model's continuations of the prompts of `evaluation`."""
        return self._samples.generate(model, parallel)


def _figures(nats_per_token: float, nats_per_byte: float) -> dict[str, float]:
    return {
        "loss": nats_per_token,
        "perplexity": math.exp(min(nats_per_token, 700.0)),
        "bits_per_byte": nats_per_byte / math.log(2),
    }
