"""Compressed RMS norm: the RMS norm of a vector of mean zero whose last entry is not stored.

Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv 2305.14858), section
3.3. Shapes: x and y (..., hidden). x stands for the vector (x, -S) with S = sum(x), which has
d = hidden + 1 entries; r = ((sum(x^2) + S^2) / d + eps)^-1/2 (..., 1); g = dL/dy.

y = r x. Backward: dx_i = r g_i - (r^3 / d) (x_i + S) sum_j g_j x_j.
There is no gain, because a diagonal gain does not commute with leaving out an entry. A model with
this norm is made from a Pre-LN model by `llmnorm convert`, which multiplies the gains into the
linear layers first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.settings import CRMSNormSettings
from llmnorm.nn.precision import wide_dtype, without_autocast


class CRMSNorm(Norm):
    """RMS norm of (x, -sum(x)) over hidden + 1 entries; the output leaves out the last one.

    Statistics are float32 (float64 for float64 input), the output has x's dtype.
    """

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        CRMSNormSettings(eps=eps).check(hidden_size)
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        with without_autocast(x.device.type):
            if not torch.is_grad_enabled():
                return _normed(x, self.eps, self.scale)[0]
            y: Tensor = _CRMSNorm.apply(x, self.eps, self.scale)
        return y

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.hidden_size}, eps={self.eps}"


class _CRMSNorm(torch.autograd.Function):
    """y and its gradient (module docstring); keeps x, S and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, scale: float) -> Tensor:
        y, total, r = _normed(x, eps, scale)
        ctx.save_for_backward(x, total, r)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        x, total, r = ctx.saved_tensors
        grad, values = grads[0].to(r.dtype), x.to(r.dtype)
        along = torch.linalg.vecdot(grad, values).unsqueeze(-1)
        factor = along.mul_(r.pow(3)).mul_(-ctx.scale / (x.shape[-1] + 1))
        dx = (grad * (r * ctx.scale)).addcmul_(values + total, factor)
        return dx.to(x.dtype), None, None


def _normed(x: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and r."""
    dtype = wide_dtype(x.dtype)
    total = x.sum(-1, keepdim=True, dtype=dtype)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
    r = squares.add_(total.square()).div_(x.shape[-1] + 1).add_(eps).rsqrt_()
    return (x * (r * scale)).to(x.dtype), total, r
