"""Unified Normalization: each channel divided by the root of its mean square, smoothed over steps.

Source: Yang et al. 2022, "Unified Normalization for Accelerating and Stabilizing Transformers"
(arXiv 2208.01313), section 3, as the authors' code has it. Shapes: x and y (..., hidden), flattened
to (tokens, hidden); X and G (window, hidden), the last steps' mean squares and gradient means; rv
(running mean square), psi (running gradient mean), s2 (this batch's mean square) (hidden,); t
counts steps from 1, M = window. A "skip" is a step whose batch is an outlier; with M = 1 every step
is one, though nothing is left out of X then.

    X[t mod M] <- s2, or rv on a skip
    D     = geometric mean of X; s2 while t <= M or t < warmup, and on a skip
    z     = x / sqrt(D + eps),  y = gain z + bias;  evaluation: D = rv
    kappa = sqrt(D + eps) / sqrt(rv + eps) in [1/5, 5]; 1 while t <= max(1000, warmup), on a skip
    rv   <- m rv + (1 - m) D

The backward pass is not the gradient. It takes D for a constant, and approximates the term that is
lost by running means. With q = gain kappa dL/dy and p = mean(q z):

    G[t mod M] <- p, or psi on a skip
    p-    = mean of G; p while t <= M or t < warmup, and on a skip
    psi  <- m psi + (1 - m) p-
    dx    = (q - psi z) / sqrt(D + eps), with p- for psi on a skip
    dgain = sum dL/dy kappa z,  dbias = sum dL/dy

Outliers are looked for from step `warmup` on, unless `filter` is "off". A channel has one where the
arithmetic minus the geometric mean of its window exceeds M times the variance of sqrt(X).
- `filter: paper` takes each channel's variance, the current step included, and skips channels.
- `filter: official` takes one variance over all channels, without the current step, and skips the
  whole layer if one channel has an outlier, as the authors' code does.

What would surprise:
- D depends on later tokens of the batch, so a causal model sees them in training (`allow_leak`).
- In evaluation, and without gradients, the norm is one factor and one offset a channel. They fold
  into the next linear layer (models/equivalence.py).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.column_sums import column_sums
from llmnorm.nn.norms.running import RunningNorm, counted_sums
from llmnorm.nn.norms.settings import UnifiedNormSettings
from llmnorm.nn.precision import wide_dtype


class _Step(NamedTuple):
    """What the forward pass of a step uses; letters as in the module docstring."""

    row: Tensor  # (1,) t mod M, the row of X and G that this step writes
    skip: Tensor  # () or (hidden,) bool
    early: Tensor  # () or (hidden,) bool: D is s2, the window is not used
    window: Tensor  # X after the insertion
    divisor: Tensor  # D
    kappa: Tensor


class UnifiedNorm(RunningNorm):
    """Unified Normalization with statistics in float32 (float64 for float64), output in x's dtype.

    In training the backward pass is not the gradient of the forward pass (module docstring).
    """

    running_square: Tensor
    running_gradient: Tensor
    window_square: Tensor
    window_gradient: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        window: int,
        warmup: int,
        momentum: float,
        filter: Literal["off", "official", "paper"],
        count_padding: bool,
    ) -> None:
        super().__init__()
        UnifiedNormSettings(
            eps=eps,
            window=window,
            warmup=warmup,
            momentum=momentum,
            filter=filter,
            count_padding=count_padding,
        ).check(hidden_size)
        self.eps, self.window, self.warmup = eps, window, warmup
        self.momentum, self.filter, self.count_padding = momentum, filter, count_padding
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        for name in ("running_square", "running_gradient"):
            self.register_buffer(name, torch.zeros(hidden_size, dtype=torch.float32))
        for name in ("window_square", "window_gradient"):
            self.register_buffer(name, torch.zeros(window, hidden_size, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain one, offset zero, no steps."""
        nn.init.ones_(self.weight)
        nn.init.ones_(self.running_square)
        for zero in (self.bias, self.running_gradient, self.window_square, self.window_gradient):
            nn.init.zeros_(zero)
        self.steps.zero_()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        dtype = wide_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(dtype).reshape(-1, x.shape[-1])
            weight, bias = self.scaled(self.weight.to(dtype)), self.scaled(self.bias.to(dtype))
            if self.counting:
                step = self._step(self.batch_square(values))
                inverse = torch.rsqrt(step.divisor + self.eps)
                y = _UnifiedNorm.apply(values, weight, bias, inverse, step, self, self._real)
            else:
                inverse = torch.rsqrt(self.running_square.to(dtype) + self.eps)
                y = torch.addcmul(bias, values, weight * inverse)
        return y.view_as(x).to(x.dtype)

    def _step(self, square: Tensor) -> _Step:
        """The equations of the forward pass for s2 = `square` (hidden,); no buffer is changed."""
        rv, before, m = self.running_square.to(square.dtype), self.window_square, self.window
        t = self.steps + 1
        row = (t % m).view(1)
        window = before.to(square.dtype).index_copy(0, row, square.unsqueeze(0))
        # With a window of one the official code takes the branch of an outlier at every step.
        skip = torch.full_like(t, m == 1, dtype=torch.bool)
        if self.filter != "off" and m > 1:
            gap = window.mean(0) - window.log().mean(0).exp()
            if self.filter == "official":
                spread = before.to(square.dtype).sqrt().var()
                skip = (gap > m * spread).any()
            else:
                skip = gap > m * window.sqrt().var(0)
            skip = (t >= self.warmup) & skip
            window = window.index_copy(0, row, torch.where(skip, rv, square).unsqueeze(0))
        early = (t <= m) | (t < self.warmup) | skip
        divisor = torch.where(early, square, window.log().mean(0).exp())
        kappa = ((divisor + self.eps).sqrt() / (rv + self.eps).sqrt()).clamp(1 / 5, 5)
        kappa = torch.where((t <= max(1000, self.warmup)) | skip, 1.0, kappa)
        return _Step(row, skip, early, window, divisor, kappa)

    def gradient_step(self, step: _Step, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G and psi after a step with p = `mean` (hidden,), and the factor of z in dx."""
        psi, m = self.running_gradient.to(mean.dtype), self.momentum
        inserted = torch.where(step.skip, psi, mean).unsqueeze(0)
        window = self.window_gradient.to(mean.dtype).index_copy(0, step.row, inserted)
        smooth = torch.where(step.early, mean, window.mean(0))
        moved = m * psi + (1 - m) * smooth
        return window, moved, torch.where(step.skip, smooth, moved)

    def total(self, gradients: Tensor) -> Tensor:
        """`gradients` as they are: the backward pass has summed them over all processes."""
        return gradients

    def update(self, square: Tensor, gradient: Tensor, counts: Tensor) -> None:
        """Move windows and running means by one step."""
        step, m = self._step(square), self.momentum
        window, psi, _ = self.gradient_step(step, gradient)
        rv = m * self.running_square + (1 - m) * step.divisor
        for buffer, moved in (
            (self.window_square, step.window),
            (self.window_gradient, window),
            (self.running_square, rv),
            (self.running_gradient, psi),
        ):
            buffer.copy_(torch.where(counts, moved, buffer))
        self.steps += counts

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        size = f"{self.weight.numel()}, eps={self.eps}"
        return f"{size}, window={self.window}, warmup={self.warmup}, filter={self.filter}"


class _UnifiedNorm(torch.autograd.Function):
    """Forward and backward of the module docstring; the backward is not the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        inverse: Tensor,
        step: _Step,
        norm: UnifiedNorm,
        real: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, inverse)
        ctx.step, ctx.norm, ctx.real = step, norm, None if norm.count_padding else real
        return torch.addcmul(bias, x, weight * inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, inverse = ctx.saved_tensors
        norm, kappa = ctx.norm, ctx.step.kappa
        dweight = column_sums(grad, x) * (inverse * kappa)
        if ctx.real is None:
            along = torch.cat((dweight, dweight.new_full((1,), len(x))))
        else:
            along = counted_sums(grad, x, ctx.real)
            along[:-1] *= inverse * kappa
        along[:-1] *= weight  # the sum of q z
        along = norm.reduce(along)
        norm.add_gradients(along)
        _, _, factor = norm.gradient_step(ctx.step, along[:-1] / along[-1].clamp(min=1))
        dx = (grad * (weight * kappa * inverse)).addcmul_(x, -factor * inverse.square())
        return dx, dweight, grad.sum(0), None, None, None, None
