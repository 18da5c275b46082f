"""Linear layers, and which library multiplies for them.

Shapes: x (..., in), weight W (out, in), y (..., out), g (..., out) the gradient of y.

torch.mm in float32 on a CPU is MKL's, which runs AVX2 kernels on AMD processors. torch also carries
oneDNN, which runs AVX-512 kernels on every processor that has them, but copies its left operand
first where that is not contiguous, as in a weight's gradient. Which of the two is faster depends on
the processor and on the product: `CHOICES` says where oneDNN was measured to be. On processors
without an entry, on GPUs, in other dtypes, under autocast and in compiled code torch multiplies as
it always does.

What would surprise: the choice depends on the processor, the environment (ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA: llmnorm/machine/processor.py) and the shapes, and is never timed, so a run gives
the same bits whenever it is repeated on one machine. Against float64 oneDNN's error is that of MKL
for k = 384, and 1.6 times it for k = 1024 (4e-7 of the result).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.machine.processor import Processor, processor

# Fewer multiply-adds than these and a call of oneDNN costs more than it saves.
SMALLEST = 2**21


class Choice(NamedTuple):
    """Which products oneDNN computes on one kind of processor.

    Attributes:
        outputs: x W^T and every other product whose right operand is stored row by row.
        input_gradients: g W and every other product whose right operand is stored by columns.
        weight_gradients: g^T x, for which oneDNN copies its left operand.
        largest: numbers in the result up to which this holds. malloc maps new pages for more than
            32 MiB; torch can be given the memory of an earlier result instead.
        figures: GFLOP/s in float32 with one thread, torch.mm -> oneDNN.
        machine: where that was measured.
        date: when, as YYYY-MM-DD.
    """

    outputs: bool
    input_gradients: bool
    weight_gradients: bool
    largest: int
    figures: str
    machine: str
    date: str


NO_LIMIT = 2**62
CHOICES: dict[Processor, Choice] = {
    Processor("AMD", 26, "AVX512"): Choice(
        outputs=True,
        input_gradients=True,
        weight_gradients=True,
        largest=NO_LIMIT,
        figures="outputs and input gradients 105 -> 240, weight gradients 105 -> 200",
        machine="EPYC, family 26 (Zen 5)",
        date="2026-11-25",
    ),
    Processor("AMD", 25, "AVX512"): Choice(
        outputs=True,
        input_gradients=True,
        weight_gradients=False,
        largest=NO_LIMIT,
        figures="outputs and input gradients 90 -> 105, weight gradients 97 -> 90",
        machine="EPYC, family 25 model 17 (Zen 4)",
        date="2026-11-25",
    ),
    Processor("AMD", 25, "AVX2"): Choice(
        outputs=True,
        input_gradients=False,
        weight_gradients=False,
        largest=2**23,
        figures="outputs 84 -> 92 (384 x 384), 85 -> 88 (384 x 1024), 89 -> 95 (1024 x 384), "
        "64 -> 73 (384 x 32768; torch.mm into memory that is there: 80); "
        "input gradients 87 -> 80, weight gradients 93 -> 74",
        machine="EPYC, family 25 model 17 (Zen 4), limited to AVX2 by both variables",
        date="2026-11-30",
    ),
}


class Linear(nn.Linear):
    """torch's nn.Linear, computed by the library that `CHOICES` names for this processor.

    Attributes:
        initial_std: standard deviation of the initial weights; the model's `initializer_range` if
            None.
    """

    initial_std: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not _by_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `Linear` gives for x (..., in) and its weight: (..., out); computes no gradients."""
    return onednn_product(x, weight, bias) if _by_onednn(x, weight) else F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (m, k) times the transpose of b (n, k): (m, n). Any strides; computes no gradients.

    Args:
        a, b: the operands.
        out: (m, n), memory for the result. Only torch can write into it: `fills_memory` tells
            beforehand whether it will.
    """
    if not _by_onednn(a, b):
        return torch.mm(a, b.t(), out=out)
    return onednn_product(a, b)


def fills_memory(a: Tensor, b: Tensor) -> bool:
    """Whether `product(a, b, out)` writes into `out`, which saves new pages on a CPU."""
    return a.device.type == "cpu" and not _by_onednn(a, b)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a (batch, m, k) times the transposes of b (batch, n, k): (batch, m, n); no gradients.

    The library is chosen for one pair, so the result of a pair is the same in any batch.
    """
    if not _by_onednn(a[0], b[0]):
        return torch.bmm(a, b.mT)
    if len(a) == 1:  # no copy into a stack
        return onednn_product(a[0], b[0]).unsqueeze(0)
    total = a.new_empty(len(a), a.shape[1], b.shape[1])
    for out, left, right in zip(total, a, b, strict=True):
        out.copy_(onednn_product(left, right))
    return total


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad (tokens, out) transposed times x (tokens, in): (out, in); computes no gradients."""
    suits = _suits_onednn(grad, x, x.shape[1])
    measured = choice() if suits else None
    if measured is None or not measured.weight_gradients:
        return grad.t() @ x
    if grad.shape[1] > x.shape[1]:  # the narrower of the two is copied
        return onednn_product(x.t(), grad.t()).t().contiguous()
    return onednn_product(grad.t(), x.t())


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add weight_gradient(grad, x) to `total` (out, in), which `sum_of_weight_gradients` made."""
    if total.is_contiguous():
        if total.dtype == grad.dtype:
            total.addmm_(grad.t(), x)
        else:
            total.add_(grad.t() @ x)
    else:
        total.t().add_(product(x.t(), grad.t()))


def sum_of_weight_gradients(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros (out, in), stored in the order in which a head's gradients are added fastest.

    The result is not contiguous where oneDNN computes weights' gradients: a head has more rows than
    columns, so that oneDNN is better given the hidden states to copy than the logits' gradients.
    """
    measured = choice() if weight.device.type == "cpu" and dtype == torch.float32 else None
    if measured is not None and measured.weight_gradients:
        return weight.new_zeros(weight.shape[::-1], dtype=dtype).t()
    return weight.new_zeros(weight.shape, dtype=dtype)


def onednn_product(a: Tensor, b: Tensor, offset: Tensor | None = None) -> Tensor:
    """a (m, k) times the transpose of b (n, k) plus `offset` (n,), by oneDNN on any processor."""
    return torch.ops.mkldnn._linear_pointwise(a, b, offset, "none", [], "")


@cache
def choice() -> Choice | None:
    """The entry of this processor; None where torch computes every product."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    return CHOICES.get(processor())


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN computes a (..., k) times the transpose of b (n, k)."""
    if not _suits_onednn(a, b, len(b)):  # first, since a compiler cannot follow `choice`
        return False
    measured = choice()
    if measured is None or a.numel() // a.shape[-1] * len(b) > measured.largest:
        return False
    return measured.outputs if b.stride(-1) == 1 else measured.input_gradients


def _suits_onednn(a: Tensor, b: Tensor, columns: int) -> bool:
    """Whether a product of a's numbers with so many columns is worth asking `choice` for."""
    return (
        a.numel() * columns >= SMALLEST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and not torch.compiler.is_compiling()  # which would break at what follows
        and not torch.is_autocast_enabled("cpu")
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
            x_grad = product(flat, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            weight_grad = weight_gradient(flat, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0)
        return x_grad, weight_grad, bias_grad
