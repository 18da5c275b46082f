"""The objective of drafts: the next token as a trained model, the teacher, expects it.

Source: Hinton et al. 2015, distillation (arXiv 1503.02531); Zhou et al. 2023, drafts that are
distilled on their target (DistillSpec, arXiv 2310.08461).

Rows and labels are those of causal_lm. The loss of a token is the cross-entropy with the teacher's
distribution (nn/soft_targets.py); the labels say which tokens count.

Figures: those of causal_lm, against the text, so that runs of both can be compared; and of every
label's position two about the teacher:

    agreement     the share at which both have the same likeliest token: what a greedy target
                  accepts of one drafted token
    acceptance    the mean of sum_v min(p_v, q_v) = 1 - total variation: what rejection sampling at
                  temperature 1 accepts (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6)

What would surprise: the loss of training and the loss of an evaluation are different numbers. The
first is held against the teacher, whose entropy it cannot fall below.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmnorm.config.pretrained import describe, refuse_encoder
from llmnorm.config.tree import RunConfig
from llmnorm.data.loader import IGNORED, evaluation_batches
from llmnorm.data.settings import TrainedOn
from llmnorm.nn.loss import LOGITS
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.soft_targets import SoftTargets
from llmnorm.objectives.causal_lm import CausalLM
from llmnorm.objectives.contract import MicroBatch
from llmnorm.objectives.settings import DistillSettings
from llmnorm.objectives.teacher import KEY, Teacher, read
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Distill(CausalLM):
    """Rows of packed text, held against a teacher.

    Raises:
        InputError: the teacher is no causal language model, or its context is too short; or it is
            not there, and the run has no checkpoint that says where it was.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: DistillSettings,
        *,
        alone: bool,
        command: str,
        trained_on: TrainedOn | None = None,
    ) -> None:
        if settings.teacher.is_dir() or trained_on is None:  # before data are prepared
            found = describe(settings.teacher, KEY, config.imports)
            who = f"{KEY}: {settings.teacher}"
            refuse_encoder(found.architectures, who, "a draft is distilled on")
            longest = found.config.get("max_position_embeddings")
            if longest is not None and longest < config.data.context_length:
                raise InputError(
                    f"{who}: has {longest} positions, and data.context_length is "
                    f"{config.data.context_length}; give at most {longest}"
                )
        super().__init__(config, alone=alone, command=command, trained_on=trained_on)
        self._teacher: Teacher | None = None

    def learn_from(self, teacher: Teacher) -> None:
        """Take the teacher, before the first step; without one there are causal_lm's figures."""
        self._teacher = teacher

    def batches(
        self, first_row: int, *, global_batch: int, rank: int, world: int, micro_batch: int
    ) -> Iterator[list[MicroBatch]]:
        """As causal_lm's; each micro-batch brings the teacher's distributions of its rows."""
        assert self._teacher is not None, "who trains gives it its teacher first"
        steps = super().batches(
            first_row, global_batch=global_batch, rank=rank, world=world, micro_batch=micro_batch
        )
        return ([batch._replace(teacher=self._teacher) for batch in step] for step in steps)

    def evaluate(
        self, model: "PreTrainedModel", *, micro_batch: int, parallel: Parallel
    ) -> dict[str, Any]:
        """Causal_lm's figures to the bit, and with a teacher agreement and acceptance.

        These take a second pass, of as many rows at once as a loss would have logits in memory.
        """
        figures = super().evaluate(model, micro_batch=micro_batch, parallel=parallel)
        if self._teacher is None:
            return figures
        logits = self.packed.context_length * model.config.vocab_size
        rows = max(1, min(micro_batch, LOGITS[parallel.device.type] // logits))
        sources = figures["sources"]
        for index, source in enumerate(self.packed.sources):
            sources[source.name] |= self._beside(self._teacher, model, index, rows, parallel)
        means = {
            key: self.packed.mean({name: found[key] for name, found in sources.items()})
            for key in ("agreement", "acceptance")
        }
        return figures | means

    def _beside(
        self,
        teacher: Teacher,
        model: "PreTrainedModel",
        source: int,
        rows: int,
        parallel: Parallel,
    ) -> dict[str, float]:
        """Agreement and acceptance on a source's validation rows."""
        total = torch.zeros(3, dtype=torch.float64, device=parallel.device)
        for batch in map(
            self.micro_batch,
            evaluation_batches(self.packed, source, parallel.rank, parallel.world, rows),
        ):
            parallel.poll()
            # A forward pass over shards needs all processes, those without rows too.
            if batch.labels == 0 and not parallel.spread:
                continue
            inputs = batch.inputs_on(parallel.device)
            with parallel.autocast():
                logits = model(**read(inputs)).logits
            soft = teacher.soft_targets(inputs)
            real = inputs["shift_labels"] != IGNORED
            for row in range(len(logits)):
                total[:2] += _compared(soft, logits[row], real[row], row * logits.shape[1])
            total[2] += batch.labels
        agreed, accepted, labels = parallel.reduce(total.cpu()).tolist()
        return {"agreement": agreed / labels, "acceptance": accepted / labels}


def _compared(soft: SoftTargets, logits: Tensor, real: Tensor, first: int) -> Tensor:
    """Agreement and acceptance summed over a row, (2,) float64 where the logits are.

    Args:
        soft: the teacher's distributions of all rows.
        logits: (length, vocabulary), the other model's of this row.
        real: (length,), which positions count.
        first: the row's first position in `soft`.
    """
    wide = wide_dtype(logits.dtype)
    theirs = soft.probabilities(slice(first, first + len(logits)), wide)
    agreed = theirs.argmax(-1) == logits.argmax(-1)
    accepted = torch.softmax(logits, -1, dtype=wide).minimum(theirs).sum(-1)
    return torch.stack([agreed, accepted.double()]).mul(real).sum(-1)
