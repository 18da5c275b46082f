"""Norms with running statistics: what PowerNorm and Unified Normalization share.

Shapes: x (..., hidden); real (tokens,) bool, True where a token counts; sums (hidden + 1,): a sum
over tokens for every channel, and the number of tokens in it.

The order of calls in a step: for every micro-batch `begin(real)` (the model's forward pass calls
it), forward, backward; then `commit()` once after the optimizer's step, or `discard()` if the
update was skipped (the training loop calls them, by `RunningStatistics`). The statistics of a step
are means over the real tokens of all its micro-batches and of all processes; `reduce` sums a tensor
over the processes.

What would surprise:
- The first forward pass of a micro-batch makes its sums; later ones, until the next `begin`, use
  them again. So a recomputation (activation checkpointing) is not counted twice.
- Without `RunningStatistics` nobody calls `commit`. Every micro-batch then counts as a step, which
  the `begin` of the next one commits.
- A forward pass without gradients, as in evaluation, counts nothing.
- The statistics stay float32 when the model is cast to bf16 or fp16.
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
        reduce: gives the sum of a tensor over all processes.
        stepwise: True if `commit` is called from outside, by `RunningStatistics`.
        still: True if statistics stay as they are in training too, since the weights below do.
        steps: () int64, how many steps the statistics were moved by.
    """

    steps: Tensor
    reduce: Reduce

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.reduce = _one_process
        self.stepwise = False
        self.still = False
        self._counts: bool | None = None
        self._real: Tensor | None = None
        self._batch: Tensor | None = None
        self._squares: Tensor | None = None
        self._gradients: Tensor | None = None

    def begin(self, real: Tensor | None, *, counts: bool | None = None) -> None:
        """Start a micro-batch; `real` (batch, length) is True where a token counts (None: all).

        Commits the micro-batch before as a step of its own unless `stepwise`.

        Args:
            counts: whether passes in training count; None: those with gradients. A model says it,
                since a reentrant checkpoint makes a block's first pass without gradients.
        """
        if not self.stepwise:
            self.commit()
        self._counts = counts
        self._real = None if real is None else real.flatten()
        self._batch = None

    def commit(self) -> None:
        """Move the statistics by the step's sums, if there are any, and forget the sums."""
        if self._squares is not None:
            squares, gradients = self._squares, self._gradients
            if gradients is None:  # a forward pass without a backward pass
                gradients = torch.zeros_like(squares)
            with torch.no_grad():
                self.update(_mean(squares), _mean(self.total(gradients)), squares[-1] > 0)
        self.discard()

    def discard(self) -> None:
        """Forget the step's sums; the statistics stay as they are."""
        self._real = self._batch = self._squares = self._gradients = None

    def update(self, square: Tensor, gradient: Tensor, counts: Tensor) -> None:
        """Move the statistics by one step.

        Args:
            square: (hidden,), mean square of the step's inputs.
            gradient: (hidden,), mean over the step's tokens of what `add_gradients` was given.
            counts: () bool, False if the step had no real token; nothing may move then.
        """
        raise NotImplementedError

    def total(self, gradients: Tensor) -> Tensor:
        """The step's gradient sums over all processes, from this process's or from all's."""
        raise NotImplementedError

    @property
    def counting(self) -> bool:
        """Whether a forward pass now uses its own batch's statistics and adds to the step's."""
        counts = torch.is_grad_enabled() if self._counts is None else self._counts
        return self.training and counts and not self.still

    def batch_square(self, x: Tensor) -> Tensor:
        """The micro-batch's mean square (hidden,) of x (tokens, hidden), over all processes."""
        if self._batch is None:
            with torch.no_grad():
                self._batch = self.reduce(counted_sums(x, x, self._real))
                self._squares = _plus(self._squares, self._batch)
        return _mean(self._batch)

    def add_gradients(self, sums: Tensor) -> None:
        """Add the sums (hidden + 1,) of a backward pass to the step's."""
        self._gradients = _plus(self._gradients, sums)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Buffers follow the model's device, but its dtype only to float32 and float64."""
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
    """Makes the norms of a model that keep statistics count optimizer steps from now on.

    Args:
        model: it need not have such norms.
        reduce: gives the sum of a tensor over all processes, which call it in the same order.
    """

    def __init__(self, model: nn.Module, reduce: Reduce) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
        for norm in self.norms:
            norm.reduce, norm.stepwise = reduce, True
            norm.discard()

    def commit(self) -> None:
        """Move every norm's statistics; to be called after an optimizer step."""
        for norm in self.norms:
            norm.commit()

    def discard(self) -> None:
        """Forget the step's sums; to be called after a step whose update was skipped."""
        for norm in self.norms:
            norm.discard()


def counted_sums(first: Tensor, second: Tensor, real: Tensor | None) -> Tensor:
    """(hidden + 1,): the sum of first * second over real tokens, and the number of these.

    first and second (tokens, hidden); real (tokens,), None if all are.
    """
    if real is None:
        return torch.cat((column_sums(first, second), first.new_full((1,), len(first))))
    weights = real.to(first.dtype).unsqueeze(1)
    return torch.cat((column_sums(first, second, weights), weights.sum().unsqueeze(0)))


def _mean(sums: Tensor) -> Tensor:
    return sums[:-1] / sums[-1].clamp(min=1)


def _plus(total: Tensor | None, sums: Tensor) -> Tensor:
    return sums.clone() if total is None else total + sums


def _one_process(values: Tensor) -> Tensor:
    return values
