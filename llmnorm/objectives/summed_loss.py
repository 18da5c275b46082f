"""The loss of a causal model, summed over all labels of some batches on all processes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from llmnorm.objectives.apart import as_asked
from llmnorm.objectives.contract import MicroBatch
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def summed_loss(
    model: "PreTrainedModel", batches: Iterable[MicroBatch], parallel: Parallel
) -> tuple[float, float]:
    """The summed loss in nats, and the number of labels; the same on every process.

    Args:
        model: in evaluation mode.
        batches: this process's; every process has equally many.
        parallel: this process.

    Raises:
        Interrupted: a process was asked to stop.
    """
    # Summed in float64, so that the total hardly depends on how rows are spread.
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        parallel.poll()
        for part in as_asked(model, [batch], parallel):
            # A forward pass over shards needs all processes, those without rows too.
            if part.labels == 0 and not parallel.spread:
                continue
            with parallel.autocast():
                inputs = part.inputs_on(parallel.device)
                loss = model(**inputs, num_items_in_batch=1.0).loss
            total += torch.tensor([float(loss), part.labels], dtype=torch.float64)
    summed, labels = parallel.reduce(total).tolist()
    return summed, labels
