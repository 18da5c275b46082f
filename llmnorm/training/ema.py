"""Exponential moving average of the weights: a + (1 - d)(w - a) after every step, elementwise.

Early on d grows as (1 + t) / (10 + t) (the rule of TensorFlow's ExponentialMovingAverage) until it
reaches `training.ema`, so that the initial weights are soon forgotten. t is the step's number, so
the averages are all that a checkpoint has to hold. Each process averages what it holds itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """The average of a model's trainable and frozen parameters.

    Args:
        weights: what this process holds of each parameter, by its name.
        decay: the largest d.
        changed: called when weights have been changed behind the optimizer's back.

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
        """Take the weights after step number `step` (from 0) into the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, weights = list(self.average.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the averages."""
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
