"""Compressed RMS norm: the RMS norm of a zero-mean vector of which one entry is not stored.

Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv 2305.14858), section
3.3. Shapes: x and y (..., hidden); the vector meant is (x, -S) with S = sum(x), of
d = hidden + 1 entries; r = ((sum(x^2) + S^2) / d + eps)^-1/2 (..., 1); g = dL/dy.

y = r x. Backward: dx_i = r g_i - (r^3 / d) (x_i + S) sum_j g_j x_j.
There is no gain: a diagonal one does not commute with leaving an entry out. A model with this norm
is made from a Pre-LN one (`llmnorm convert`), whose gains stand in the matrices by then.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.precision import wide_dtype


class CRMSNorm(Norm):
    """RMS norm of (x, -sum(x)) over hidden + 1 entries, without the last one."""

    def __init__(self, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _CRMSNorm.apply(x, self.eps, self.scale)
        return y

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.hidden_size}, eps={self.eps}"


class _CRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, scale: float) -> Tensor:
        dtype = wide_dtype(x.dtype)
        total = x.sum(-1, keepdim=True, dtype=dtype)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()
        r = squares.add_(total.square()).div_(x.shape[-1] + 1).add_(eps).rsqrt_()
        ctx.save_for_backward(x, total, r)
        ctx.scale = scale
        return (x * (r * scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        x, total, r = ctx.saved_tensors
        grad, values = grads[0].to(r.dtype), x.to(r.dtype)
        along = torch.linalg.vecdot(grad, values).unsqueeze(-1)
        factor = along.mul_(r.pow(3)).mul_(-ctx.scale / (x.shape[-1] + 1))
        dx = (grad * (r * ctx.scale)).addcmul_(values + total, factor)
        return dx.to(x.dtype), None, None
