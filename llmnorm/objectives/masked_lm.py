"""The objective of encoders: predict masked tokens (Devlin et al. 2019, BERT, arXiv 1810.04805).

Rows are those of the next-token objective without their last token: packed documents that do not
see each other. data/masking.py draws the masks, by (seed, row) in training and by (source, row) in
evaluation. So the masks of an evaluation are the same at every step and in every run, and runs can
be compared. Figures: the mean loss over masked tokens, and the share of them whose likeliest token
is right; totals weigh the sources by their training bytes.
"""

from typing import TYPE_CHECKING, Any

import torch

from llmnorm.config.tree import RunConfig
from llmnorm.data.loader import IGNORED, Batch, document_bounds, evaluation_batches
from llmnorm.data.masking import Masking
from llmnorm.data.settings import TrainedOn
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.packed_text import PackedText
from llmnorm.objectives.settings import MaskedLMSettings
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING, EVALUATION = 1 << 62, 1 << 63  # so that no mask of training is one of evaluation


class MaskedLM(PackedText):
    """Rows of packed text, some of whose tokens are masked.

    Raises:
        InputError: the tokenizer has no mask token.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: MaskedLMSettings,
        *,
        alone: bool,
        command: str,
        trained_on: TrainedOn | None = None,
    ) -> None:
        super().__init__(config, alone=alone, command=command, trained_on=trained_on)
        self._settings = settings
        self.head_share = settings.mask_share
        encoder = TextEncoder(self.packed.tokenizer_directory)
        if encoder.mask is None:
            raise InputError(
                f"tokenizer.path: {config.tokenizer.path} names no mask_token, which objective "
                "'masked_lm' needs"
            )
        self._masking = Masking(
            encoder.vocab_size,
            encoder.mask,
            encoder.ordinary,
            random=settings.random,
            kept=settings.kept,
        )

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """The rows with their masks of training."""
        found = self._masked(batch, self._settings.mask_share, TRAINING + self.config.seed)
        return found._replace(inputs={**found.inputs, "loss_only": True})

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Loss in nats a masked token, and the share of them whose likeliest token is right."""
        sources: dict[str, dict[str, float]] = {}
        for index, source in enumerate(self.packed.sources):
            total = torch.zeros(3, dtype=torch.float64)
            mine = evaluation_batches(
                self.packed, index, parallel.rank, parallel.world, micro_batch
            )
            for rows in mine:
                parallel.poll()
                share = self._settings.evaluation_mask_share
                batch = self._masked(rows, share, EVALUATION + index)
                # A forward pass over shards needs all processes, those without rows too.
                if batch.labels == 0 and not parallel.spread:
                    continue
                with parallel.autocast():
                    inputs = batch.inputs_on(parallel.device)
                    found = model(**inputs, num_items_in_batch=1.0)
                right = int((found.logits.argmax(-1) == inputs["labels"]).sum())
                total += torch.tensor([float(found.loss), right, batch.labels]).double()
            loss, right, count = parallel.reduce(total).tolist()
            if not count:
                raise InputError(
                    f"objective.evaluation_mask_share: no token of {source.name}'s validation "
                    "text is masked; raise it, or data.validation_bytes"
                )
            sources[source.name] = {"loss": loss / count, "accuracy": right / count}
        means = {
            key: self.packed.mean({name: found[key] for name, found in sources.items()})
            for key in ("loss", "accuracy")
        }
        return {**means, "sources": sources}

    def _masked(self, batch: Batch, share: float, key: int) -> MicroBatch:
        seen, labels = self._masking(batch["input_ids"], batch["rows"], share=share, key=key)
        inputs = {"input_ids": seen, "position_ids": batch["position_ids"], "labels": labels}
        bounds = document_bounds(batch["position_ids"])
        counted = int((labels.numpy() != IGNORED).sum())
        return MicroBatch({**inputs, **bounds}, counted, seen.numel(), batch["rows"])
