"""Root mean square norm: y = gain * x / sqrt(mean(x^2) + eps).

Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4. Shapes: x and y (..., hidden),
r = (mean(x^2) + eps)^-1/2 (..., 1), x^ = r x, q = gain * dL/dy.

Backward: dx = r (q - x^ mean(q x^)), dgain = sum over tokens of dL/dy x^; only x and r are kept.
On a CPU torch's own rms_norm is not fused, so this file has its own function there. Its backward
borrows the fused kernel of layer norm: with mean 0 and 1/std = r that kernel gives
r (q - mean(q) - x^ mean(q x^)), and the rank-one term r mean(q) is put back.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.contract import Norm, wide


class RMSNorm(Norm):
    """RMS norm with statistics in float32 (float64 for float64 input), output in x's dtype.

    `cast_mode="llama"` rounds to x's dtype before the gain, as Hugging Face's LlamaRMSNorm, whose
    outputs it reproduces bit for bit (below float32 the two modes differ by up to one ulp).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        cast_mode: Literal["fp32_affine", "llama"] = "fp32_affine",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.cast_mode = cast_mode
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def reset_parameters(self) -> None:
        """Gain one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        with torch.autocast(x.device.type, enabled=False):
            gain = self.scaled(self.weight)
            if self.cast_mode == "llama":
                return self._llama(x, gain)
            if x.device.type == "cpu":
                return _RMSNorm.apply(x, gain, self.eps)
            if x.dtype == gain.dtype:
                return F.rms_norm(x, gain.shape, gain, self.eps)
            dtype = torch.promote_types(torch.promote_types(x.dtype, gain.dtype), torch.float32)
            return F.rms_norm(x.to(dtype), gain.shape, gain.to(dtype), self.eps).to(x.dtype)

    def _llama(self, x: Tensor, gain: Tensor) -> Tensor:
        values = x.to(wide(x.dtype))
        r = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        return gain * (values * r).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}, cast_mode={self.cast_mode}"


class _RMSNorm(torch.autograd.Function):
    """y and its gradients in three and four passes over memory (module docstring)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        hidden = x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
        r = length.square_().div_(hidden).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        hidden = x.shape[-1]
        grad, wide_x, gain = (t.to(r.dtype) for t in (grads[0].contiguous(), x, weight))
        dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
            grad,
            wide_x,
            [hidden],
            torch.zeros_like(r),
            r,
            gain,
            None,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        if ctx.needs_input_grad[0]:
            mean_q = torch.mv(grad.view(-1, hidden), gain).view_as(r).div_(hidden)
            dx = dx.add_(mean_q.mul_(r)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dgain = dgain.to(weight.dtype)
        return dx, dgain, None
