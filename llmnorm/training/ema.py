"""Exponential moving average of the weights: a <- a + (1 - d)(w - a) after every step.

Early in a run the decay d is (1 + t) / (10 + t), with t the step's number (the rule of TensorFlow's
ExponentialMovingAverage), until that exceeds `training.ema`. So the initial weights are forgotten
soon, and a checkpoint has to hold the averages only. Each process averages its own part of the
weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """The average of a model's trained parameters.

    Args:
        weights: this process's part of each parameter that is trained, by the parameter's name.
        decay: the largest d.
        changed: called after weights were swapped with averages: `Parallel.weights_changed`.

    Attributes:
        average: by parameter name, in the parameters' dtype and on their device.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], decay: float, changed: Callable[[], None] | None = None
    ) -> None:
        self._weights = dict(weights)
        self._changed = changed
        self._decay = decay
        self.average = {name: weight.clone() for name, weight in self._weights.items()}

    def update(self, step: int) -> None:
        """Move the average towards the weights after step number `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, weights = list(self.average.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Context manager: inside it the model computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weight in zip(self.average.values(), self._weights.values(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        if self._changed is not None:
            self._changed()
