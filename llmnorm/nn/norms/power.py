"""PowerNorm: each channel divided by the root of its running mean square; no centring.

Source: Shen et al. 2020, "PowerNorm: Rethinking Batch Normalization in Transformers" (arXiv
2003.07845), section 4 and algorithm 2, as the authors' code has it. Shapes: x and y (..., hidden),
flattened to (tokens, hidden); phi (running mean square), nu (running gradient mean), s2 (this
batch's mean square) (hidden,); t counts steps from 1.

    x~   = x / sqrt(mean over a group of channels of x^2 + 1e-5), for every token
    z    = x~ / sqrt(D + eps), D = phi of the former steps (s2 while t <= warmup)
    y    = gain z + bias

The backward pass is not the gradient. It takes s2 and phi for constants, and approximates the term
that is lost by a running mean, nu. With q = gain dL/dy:

    u    = q - nu z
    dx~  = u / sqrt(s2 + eps);   dgain = sum dL/dy z;   dbias = sum dL/dy;   dx from dx~ exactly
    phi <- a phi + (1 - a) s2   (while t < warmup, phi <- phi (t - 1) / t + s2 / t before that)
    nu  <- nu + (1 - b) mean(u z)

What would surprise:
- In the backward pass the paper divides by sqrt(phi + eps), the authors' code by sqrt(s2 + eps) of
  the current batch. The setting `backward` chooses.
- The scaling of groups has an eps of its own, 1e-5, as in the authors' code.
- During the warm-up a token's output depends on the whole batch, later tokens included. After it,
  and with `warmup` 0, it depends on the token alone.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.column_sums import column_sums
from llmnorm.nn.norms.rms import rms_norm
from llmnorm.nn.norms.running import RunningNorm, counted_sums
from llmnorm.nn.norms.settings import PowerNormSettings
from llmnorm.nn.precision import wide_dtype

GROUP_EPS = 1e-5  # GroupScaling1D of the authors' code, which is not given the module's eps


class PowerNorm(RunningNorm):
    """PowerNorm with statistics in float32 (float64 for float64 input), output in x's dtype.

    In training the backward pass is not the gradient of the forward pass (module docstring).
    """

    running_square: Tensor
    running_gradient: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        forward_decay: float,
        backward_decay: float,
        warmup: int,
        groups: int,
        backward: Literal["official", "paper"],
        count_padding: bool,
    ) -> None:
        super().__init__()
        PowerNormSettings(
            eps=eps,
            forward_decay=forward_decay,
            backward_decay=backward_decay,
            warmup=warmup,
            groups=groups,
            backward=backward,
            count_padding=count_padding,
        ).check(hidden_size)
        self.eps, self.warmup, self.groups = eps, warmup, groups
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.backward, self.count_padding = backward, count_padding
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("running_square", torch.ones(hidden_size, dtype=torch.float32))
        self.register_buffer("running_gradient", torch.zeros(hidden_size, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Gain one, offset zero, no steps."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.running_square)
        nn.init.zeros_(self.running_gradient)
        self.steps.zero_()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        dtype = wide_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            groups = x.to(dtype).reshape(-1, self.groups, x.shape[-1] // self.groups)
            scaled = rms_norm(groups, groups.new_ones(groups.shape[-1]), GROUP_EPS)
            y = self._by_channel(scaled.flatten(1)).view_as(x)
        return y.to(x.dtype)

    def _by_channel(self, x: Tensor) -> Tensor:
        weight, bias = self.scaled(self.weight.to(x.dtype)), self.scaled(self.bias.to(x.dtype))
        phi = self.running_square.to(x.dtype)
        if not self.counting:
            return torch.addcmul(bias, x, weight * torch.rsqrt(phi + self.eps))
        square = self.batch_square(x)
        divisor = torch.where(self.steps < self.warmup, square, phi)
        back = square if self.backward == "official" else divisor
        inverses = torch.rsqrt(divisor + self.eps), torch.rsqrt(back + self.eps)
        y: Tensor = _PowerNorm.apply(x, weight, bias, *inverses, self, self._real)
        return y

    def total(self, gradients: Tensor) -> Tensor:
        """The step's gradient sums over all processes."""
        return self.reduce(gradients)

    def update(self, square: Tensor, gradient: Tensor, counts: Tensor) -> None:
        """phi and nu of the next step."""
        phi, nu, a = self.running_square, self.running_gradient, self.forward_decay
        step = (self.steps + 1).to(phi.dtype)
        averaged = phi * ((step - 1) / step) + square / step
        moved = a * torch.where(step < self.warmup, averaged, phi) + (1 - a) * square
        phi.copy_(torch.where(counts, moved, phi))
        nu.copy_(torch.where(counts, nu + (1 - self.backward_decay) * gradient, nu))
        self.steps += counts

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}, groups={self.groups}, warmup={self.warmup}"


class _PowerNorm(torch.autograd.Function):
    """From x~ to y, and the approximate way back; every tensor is read once or twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        inverse: Tensor,
        back: Tensor,
        norm: PowerNorm,
        real: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, inverse, back)
        ctx.norm, ctx.real = norm, None if norm.count_padding else real
        ctx.nu = norm.running_gradient.to(x.dtype, copy=True)
        return torch.addcmul(bias, x, weight * inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, inverse, back = ctx.saved_tensors
        dx = (grad * (weight * back)).addcmul_(x, -ctx.nu * inverse * back)
        dweight = column_sums(grad, x) * inverse
        if ctx.real is None:
            along = torch.cat((dweight * weight, dweight.new_full((1,), len(x))))
        else:
            along = counted_sums(grad, x, ctx.real)
            along[:-1] *= inverse * weight
        squares = counted_sums(x, x, ctx.real)[:-1] * inverse.square()
        along[:-1] -= ctx.nu * squares  # the sum of u z
        ctx.norm.add_gradients(along)
        return dx, dweight, grad.sum(0), None, None, None, None
