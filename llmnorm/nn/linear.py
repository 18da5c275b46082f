"""Linear layers, and which library multiplies for them.

Shapes: x (..., in), weight (out, in), y (..., out); `product(a, b)`: a (m, k), b (n, k) -> (m, n);
`products` the same for a batch of pairs.

torch.mm in float32 on a CPU is MKL's, which on AMD processors runs its AVX2 kernels. torch also
carries oneDNN, which runs AVX-512 kernels on any processor that has them. Measured on an EPYC of
family 26 (tools/bench/training_step.py), float32 in and out, one thread: 105 against 240 GFLOP/s
forward and for the input's gradient, 105 against 200 for the weight's, from about two million
multiply-adds on; below that the call costs more than it saves. The error against float64 is the
same for k = 384 and 1.6 times MKL's for k = 1024 (4e-7 of the result). Hence the rule, read from
the processor and the shape and never timed: oneDNN on AMD with AVX-512 from `SMALLEST` on, torch
everywhere else (GPUs, other processors and dtypes, bf16 autocast, compiled code).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**21  # multiply-adds


class Linear(nn.Linear):
    """torch's nn.Linear, multiplied by `product`'s rule."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not _by_onednn(x, self.weight, x.numel() * self.out_features):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times the transpose of b (n, k), (m, n); any strides, no gradients."""
    if not _by_onednn(a, b, a.numel() * len(b)):
        return a @ b.t()
    return onednn_product(a, b)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a (batch, m, k) times the transposes of b (batch, n, k), (batch, m, n); no gradients.

    Which library multiplies is decided for one pair, so a pair's result is the same in any batch.
    """
    if not _by_onednn(a, b, a[0].numel() * b.shape[1]):
        return torch.bmm(a, b.mT)
    total = a.new_empty(len(a), a.shape[1], b.shape[1]) if len(a) > 1 else None
    if total is None:
        return onednn_product(a[0], b[0]).unsqueeze(0)
    for out, left, right in zip(total, a, b, strict=True):
        out.copy_(onednn_product(left, right))
    return total


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds product(a, b) to total (m, n), in place."""
    if total.dtype == a.dtype and not _by_onednn(a, b, a.numel() * len(b)):
        return total.addmm_(a, b.t())
    return total.add_(product(a, b))


def onednn_product(a: Tensor, b: Tensor, offset: Tensor | None = None) -> Tensor:
    """The same by oneDNN whatever the rule says, plus `offset` (n,)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, offset, "none", [], "")


@cache
def onednn_is_faster() -> bool:
    """Whether this processor is one of those on which oneDNN was measured to be faster."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor = torch.cpu.get_capabilities()
    return "AMD" in processor.get("cpu_name", "") and bool(processor.get("avx512_f"))


def _by_onednn(a: Tensor, b: Tensor, multiply_adds: int) -> bool:
    return (
        multiply_adds >= SMALLEST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        flat = grad.reshape(-1, weight.shape[0])
        x_grad, weight_grad, bias_grad = None, None, None
        if ctx.needs_input_grad[0]:
            x_grad = onednn_product(flat, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = onednn_product(flat.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0)
        return x_grad, weight_grad, bias_grad
