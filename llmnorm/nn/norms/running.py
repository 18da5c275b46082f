"""Norms with running statistics: what they share, whatever the statistic is.

Shapes: x (..., hidden); real (tokens,) bool, True where a token counts; sums (hidden + 1,): a sum
over tokens for every channel, and the number of tokens behind it.

Life of a step, for every micro-batch: `begin(real)`, forward, backward; then once `commit()`, or
`discard()` if the update was skipped. Statistics of a step are taken over the real tokens of all
its micro-batches and of all processes; `reduce` sums over these.

What would surprise: the sums of a micro-batch are made by its first forward pass and found again by
every later one until `begin`, so that a recomputation (activation checkpointing) counts nothing;
without `RunningStatistics`, which is how the training loop takes over, each micro-batch counts as a
step, at the `begin` of the next; without gradients, as in evaluation, nothing is counted; the
statistics stay float32 when the model is cast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.nn.norms.column_sums import column_sums
from llmnorm.nn.norms.contract import Norm

Reduce = Callable[[Tensor], Tensor]


class RunningNorm(Norm):
    """A norm that keeps statistics of former steps in its buffers.

    Attributes:
        reduce: the sum of a tensor over all processes.
        stepwise: whether someone calls `commit`.
        steps: () int64, how many steps the statistics hold.
    """

    steps: Tensor
    reduce: Reduce

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.reduce = _alone
        self.stepwise = False
        self._real: Tensor | None = None
        self._batch: Tensor | None = None
        self._squares: Tensor | None = None
        self._gradients: Tensor | None = None

    def begin(self, real: Tensor | None) -> None:
        """A micro-batch begins; `real` (batch, length) is True where a token counts (None: all)."""
        if not self.stepwise:
            self.commit()
        self._real = None if real is None else real.flatten()
        self._batch = None

    def commit(self) -> None:
        """Take the step's sums into the statistics."""
        if self._squares is not None:
            squares, gradients = self._squares, self._gradients
            if gradients is None:  # a forward pass alone
                gradients = torch.zeros_like(squares)
            with torch.no_grad():
                self.update(_mean(squares), _mean(self.total(gradients)), squares[-1] > 0)
        self.discard()

    def discard(self) -> None:
        """Forget the step's sums."""
        self._real = self._batch = self._squares = self._gradients = None

    def update(self, square: Tensor, gradient: Tensor, counts: Tensor) -> None:
        """Move the statistics by one step.

        Args:
            square: (hidden,), mean square of the step's inputs.
            gradient: (hidden,), mean over the step of what `add_gradients` was given.
            counts: () bool, False if the step had no real token; nothing moves then.
        """
        raise NotImplementedError

    def total(self, gradients: Tensor) -> Tensor:
        """The step's gradient sums over all processes; the norm's own affair."""
        raise NotImplementedError

    @property
    def counting(self) -> bool:
        """Whether a forward pass now uses, and counts in, the statistics of its own batch."""
        return self.training and torch.is_grad_enabled()

    def batch_square(self, x: Tensor) -> Tensor:
        """The micro-batch's mean square (hidden,) of x (tokens, hidden), over all processes."""
        if self._batch is None:
            with torch.no_grad():
                self._batch = self.reduce(counted_sums(x, x, self._real))
                self._squares = _plus(self._squares, self._batch)
        return _mean(self._batch)

    def add_gradients(self, sums: Tensor) -> None:
        """Count the sums (hidden + 1,) of a backward pass."""
        self._gradients = _plus(self._gradients, sums)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Buffers follow the model's device, not its dtype (float64 excepted)."""
        before = dict(self._buffers)
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None and new is not None
            if new.dtype not in (old.dtype, torch.float32, torch.float64):
                kept = torch.empty_like(old, device=new.device)
                self._buffers[name] = kept if old.is_meta else kept.copy_(old)
        return result


class RunningStatistics:
    """The norms of a model that keep statistics, counted by optimizer steps from now on.

    Args:
        model: whose norms; none of them need be of this kind.
        reduce: the sum of a tensor over all processes, which all call it in the same order.
    """

    def __init__(self, model: nn.Module, reduce: Reduce) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
        for norm in self.norms:
            norm.reduce, norm.stepwise = reduce, True
            norm.discard()

    def commit(self) -> None:
        """After an optimizer step."""
        for norm in self.norms:
            norm.commit()

    def discard(self) -> None:
        """After a step whose update was skipped."""
        for norm in self.norms:
            norm.discard()


def counted_sums(one: Tensor, other: Tensor, real: Tensor | None) -> Tensor:
    """(hidden + 1,): the sum of one * other (tokens, hidden) over real tokens, and their number."""
    if real is None:
        return torch.cat((column_sums(one, other), one.new_full((1,), len(one))))
    weights = real.to(one.dtype).unsqueeze(1)
    return torch.cat((column_sums(one, other, weights), weights.sum().unsqueeze(0)))


def _mean(sums: Tensor) -> Tensor:
    return sums[:-1] / sums[-1].clamp(min=1)


def _plus(total: Tensor | None, sums: Tensor) -> Tensor:
    return sums.clone() if total is None else total + sums


def _alone(values: Tensor) -> Tensor:
    return values
