"""Linear layers, and which library multiplies for them.

Shapes: x (..., in), weight (out, in), y (..., out); `product(a, b)`: a (m, k), b (n, k) -> (m, n);
`products` the same for a batch of pairs.

torch.mm in float32 on a CPU is MKL's, which on AMD processors runs its AVX2 kernels. torch also
carries oneDNN, which runs AVX-512 kernels on any processor that has them, but copies its left
operand where that is not contiguous (in a weight's gradient). Measured in GFLOP/s, float32, one
thread, MKL against oneDNN (tools/bench/training_step.py and the products of its shapes alone):

                             forward, input's gradient    weight's gradient
    EPYC family 26 (Zen 5)        105 -> 240                 105 -> 200
    EPYC family 25 (Zen 4)         90 -> 105                  97 -> 90

from about two million multiply-adds on; below that the call costs more than it saves. The error
against float64 is the same for k = 384 and 1.6 times MKL's for k = 1024 (4e-7 of the result). Hence
the rule, read from processor and shape and never timed: from `SMALLEST` on oneDNN on AMD with
AVX-512, for weights' gradients from family 26 on; torch everywhere else (GPUs, other processors and
dtypes, bf16 autocast, compiled code).
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**21  # multiply-adds


class Linear(nn.Linear):
    """torch's nn.Linear, multiplied by `product`'s rule.

    Attributes:
        initial_std: standard deviation of the initial weights; the model's `initializer_range` if
            None.
    """

    initial_std: float | None = None

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
    if len(a) == 1:  # no copy into a stack
        return onednn_product(a[0], b[0]).unsqueeze(0)
    total = a.new_empty(len(a), a.shape[1], b.shape[1])
    for out, left, right in zip(total, a, b, strict=True):
        out.copy_(onednn_product(left, right))
    return total


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad (tokens, out) transposed times x (tokens, in), (out, in); no gradients."""
    if not _copies_by_onednn(grad, x):
        return grad.t() @ x
    if grad.shape[1] > x.shape[1]:  # the narrower of the two is copied
        return onednn_product(x.t(), grad.t()).t().contiguous()
    return onednn_product(grad.t(), x.t())


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Adds weight_gradient(grad, x) to `total` (out, in) from `sum_of_weight_gradients`."""
    if total.is_contiguous():
        if total.dtype == grad.dtype:
            total.addmm_(grad.t(), x)
        else:
            total.add_(grad.t() @ x)
    else:
        total.t().add_(product(x.t(), grad.t()))


def sum_of_weight_gradients(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros (out, in), in the order of memory in which a head's gradients are added fastest.

    A head has more rows than columns, so that oneDNN is given the hidden states to copy.
    """
    if weight.device.type == "cpu" and dtype == torch.float32 and onednn_copies_are_cheap():
        return weight.new_zeros(weight.shape[::-1], dtype=dtype).t()
    return weight.new_zeros(weight.shape, dtype=dtype)


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


@cache
def onednn_copies_are_cheap() -> bool:
    """Whether it is so much faster that it may copy an operand first: AMD's family 26 and later."""
    if not onednn_is_faster():
        return False
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.M)
    return family is not None and int(family[1]) >= 26


def _by_onednn(a: Tensor, b: Tensor, multiply_adds: int) -> bool:
    return (
        multiply_adds >= SMALLEST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and not torch.compiler.is_compiling()  # which would break at what follows
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


def _copies_by_onednn(grad: Tensor, x: Tensor) -> bool:
    return _by_onednn(grad, x, grad.numel() * x.shape[1]) and onednn_copies_are_cheap()


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
            weight_grad = weight_gradient(flat, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0)
        return x_grad, weight_grad, bias_grad
