"""Root mean square norm: y = gain * x / sqrt(mean(x^2) + eps).

Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4. Shapes: x and y (..., hidden),
r = (mean(x^2) + eps)^-1/2 (..., 1), x^ = r x, q = gain * dL/dy.

Backward: dx = r (q - x^ mean(q x^)), dgain = sum over tokens of dL/dy x^; only x and r are kept.
On a CPU torch's own rms_norm is not fused, so this file has its own function there. Its backward
borrows the fused kernel of layer norm: with mean 0 and 1/std = r that kernel gives
r (q - mean(q) - x^ mean(q x^)), and the rank-one term r mean(q) is put back while a piece of the
rows is in the cache.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.precision import wide_dtype

PIECE = 400_000  # numbers a thread at a time: the cache's size over a few tensors of float32


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
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.cast_mode = cast_mode
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def reset_parameters(self) -> None:
        """Gain one, offset zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        with torch.autocast(x.device.type, enabled=False):
            gain = self.scaled(self.weight)
            if self.cast_mode == "llama":
                return self._llama(x, gain)
            if self.bias is None:
                return rms_norm(x, gain, self.eps)
            values, offset = x.to(wide_dtype(x.dtype)), self.scaled(self.bias)
            return (rms_norm(values, gain, self.eps) + offset).to(x.dtype)

    def _llama(self, x: Tensor, gain: Tensor) -> Tensor:
        values = x.to(wide_dtype(x.dtype))
        r = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        return gain * (values * r).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        size = f"{self.weight.numel()}, eps={self.eps}, cast_mode={self.cast_mode}"
        return size if self.bias is None else f"{size}, bias=True"


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype; gain (hidden,)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses by itself
        y: Tensor = _RMSNorm.apply(x, gain, eps)
        return y
    if x.dtype == gain.dtype:
        return F.rms_norm(x, gain.shape, gain, eps)
    dtype = torch.promote_types(torch.promote_types(x.dtype, gain.dtype), torch.float32)
    return F.rms_norm(x.to(dtype), gain.shape, gain.to(dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y and its gradients (module docstring), both in pieces that fit the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        r = torch.empty((*x.shape[:-1], 1), dtype=wide_dtype(x.dtype))
        epsilon = torch.tensor(eps, dtype=r.dtype)
        for one_x, one_r, into in _pieces(x, r, y):
            torch.linalg.vector_norm(one_x, dim=-1, keepdim=True, dtype=r.dtype, out=one_r)
            torch.addcmul(epsilon, one_r, one_r, value=1 / x.shape[-1], out=one_r).rsqrt_()
            normed = torch.mul(one_x, one_r, out=into if into.dtype == r.dtype else None)
            torch.mul(normed, gain, out=into)
        ctx.save_for_backward(x, gain, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gain, r = ctx.saved_tensors
        hidden = x.shape[-1]
        wants_x, wants_gain, _ = ctx.needs_input_grad
        wide_gain = gain.to(r.dtype)
        mean_of_q = wide_gain / hidden
        dx, dgain = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(wide_gain)
        for one_grad, one_x, one_r, zero, into in _pieces(grads[0], x, r, torch.zeros_like(r), dx):
            grad = one_grad.to(r.dtype)
            centred, summed, _ = torch.ops.aten.native_layer_norm_backward(
                *(grad, one_x.to(r.dtype), [hidden], zero, one_r, wide_gain, None),
                [wants_x, wants_gain, False],
            )
            if wants_x:
                torch.add(centred, torch.mv(grad, mean_of_q).unsqueeze(1).mul_(one_r), out=into)
            if wants_gain:
                dgain += summed
        return dx if wants_x else None, dgain.to(gain.dtype) if wants_gain else None, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all (..., hidden or 1), as many at a time as the first has in PIECE numbers."""
    rows = max(1, PIECE * torch.get_num_threads() // tensors[0].shape[-1])
    return zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in tensors), strict=True)
