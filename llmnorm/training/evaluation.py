"""Evaluation: an objective's figures of the weights and of their moving average.

What figures are is said in objectives/figures.py.
"""

from typing import TYPE_CHECKING, Any

import torch

from llmnorm.objectives.contract import Objective
from llmnorm.parallel.processes import Parallel
from llmnorm.training.ema import EMA

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    objective: Objective,
    *,
    micro_batch: int,
    parallel: Parallel,
    ema: EMA | None = None,
) -> dict[str, Any]:
    """The figures of `model`; its mode is as before afterwards.

    Args:
        objective: what is measured, on which rows.
        micro_batch: rows at once; the shape of every batch.
        parallel: this process.
        ema: the weights' moving average, evaluated too.
    """
    was_training = model.training
    model.eval()
    figures = objective.evaluate(model, micro_batch=micro_batch, parallel=parallel)
    if ema is not None:
        with ema.in_place_of_weights():
            figures["ema"] = objective.evaluate(model, micro_batch=micro_batch, parallel=parallel)
    model.train(was_training)
    return figures
