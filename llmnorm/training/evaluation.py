"""Evaluation: an objective's figures for the weights, and for their moving average.

objectives/figures.py describes what figures are.
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
    """The figures of `model`; every process must call it, and the model's mode is restored.

    Args:
        objective: computes the figures on its validation rows.
        micro_batch: rows at once.
        parallel: this process.
        ema: the weights' moving average; its figures are under "ema".

    Raises:
        Interrupted: a process was asked to stop.
    """
    was_training = model.training
    model.eval()
    try:
        figures = objective.evaluate(model, micro_batch=micro_batch, parallel=parallel)
        if ema is not None:
            with ema.in_place_of_weights():
                averaged = objective.evaluate(model, micro_batch=micro_batch, parallel=parallel)
            figures["ema"] = averaged
    finally:
        model.train(was_training)
    return figures
