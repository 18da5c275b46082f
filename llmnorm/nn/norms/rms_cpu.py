"""RMS norm on a CPU: y = gain * x / sqrt(mean(x^2) + eps), forward and backward by hand.

torch's own F.rms_norm is not fused on a CPU: it runs operation by operation and keeps what each of
them made. This function goes over pieces of the rows that fit the cache, and keeps x and r alone.

Measured gain, forward and backward in float32 against F.rms_norm, medians of the ratios of 41
paired rounds: 4.5 to 7 times as fast at 4096 x 768, 1.9 to 3.3 times at 2048 x 192, 2.5 to 3.8
times at 1024 x 4096 (three runs; torch 2.13.0, one thread, AMD EPYC family 25 model 17 with AVX-512
and, in the last run, AVX2; other processes were running). `tools/bench/nn.py` measures it again.

Shapes: x, y and dL/dy (..., hidden); r = (mean(x^2) + eps)^-1/2 (..., 1) in float32 (float64 for
float64 input); gain (hidden,).

Backward, with x^ = r x and q = gain * dL/dy:
    dx = r (q - x^ mean(q x^)),  dgain = sum over tokens of dL/dy x^.
torch's fused kernel for layer norms is borrowed: with mean 0 and 1/std = r it gives
r (q - mean(q) - x^ mean(q x^)), to which r mean(q) is added while the piece is in the cache.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.precision import wide_dtype

PIECE = 400_000  # numbers a thread takes at a time; four float32 tensors of it are 6.4 MB


class CPURMSNorm(torch.autograd.Function):
    """`CPURMSNorm.apply(x, gain, eps)` -> y (..., hidden) in x's dtype; gain (hidden,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """Keeps x, gain and r."""
        y, r = _by_pieces(x, gain, eps)
        ctx.save_for_backward(x, gain, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx in x's dtype and dgain in the gain's, each only if it is wanted."""
        x, gain, r = ctx.saved_tensors
        hidden = x.shape[-1]
        wants_x, wants_gain, _ = ctx.needs_input_grad
        wide_gain = gain.to(r.dtype)
        mean_of_q = wide_gain / hidden
        dx, dgain = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(wide_gain)
        pieces = _pieces(grads[0], x, r, torch.zeros_like(r), dx)
        for grad_rows, x_rows, r_rows, mean_rows, dx_rows in pieces:
            grad = grad_rows.to(r.dtype)
            centred, summed, _ = torch.ops.aten.native_layer_norm_backward(
                *(grad, x_rows.to(r.dtype), [hidden], mean_rows, r_rows, wide_gain, None),
                [wants_x, wants_gain, False],
            )
            if wants_x:
                mean_q = torch.mv(grad, mean_of_q).unsqueeze(1)
                torch.add(centred, mean_q.mul_(r_rows), out=dx_rows)
            if wants_gain:
                dgain += summed
        return dx if wants_x else None, dgain.to(gain.dtype) if wants_gain else None, None


def forward_only(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The same y, to the bit, where no gradient is wanted: without the Function around it.

    A few rows, as in a decode step, go without pieces too: five calls.
    """
    if x.numel() > PIECE * torch.get_num_threads():
        return _by_pieces(x, gain, eps)[0]
    dtype = wide_dtype(x.dtype)
    # What stands for a tensor in a tracer or a compiler is not kept.
    epsilon = _epsilon(eps, dtype) if type(x) is Tensor else torch.tensor(eps, dtype=dtype)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=epsilon.dtype)
    # A tracer would compute 1 / hidden in every step.
    r = torch.addcmul(epsilon, r, r, value=1 / int(x.shape[-1])).rsqrt()
    y = x * r * gain
    return y if y.dtype == x.dtype else y.to(x.dtype)


@cache
def _epsilon(eps: float, dtype: torch.dtype) -> Tensor:
    """eps as a tensor, kept: making one costs as much as an operator of the norm does."""
    return torch.tensor(eps, dtype=dtype)


def _by_pieces(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r."""
    y = torch.empty(x.shape, dtype=x.dtype)
    r = torch.empty((*x.shape[:-1], 1), dtype=wide_dtype(x.dtype))
    epsilon = torch.tensor(eps, dtype=r.dtype)
    for x_rows, r_rows, y_rows in _pieces(x, r, y):
        torch.linalg.vector_norm(x_rows, dim=-1, keepdim=True, dtype=r.dtype, out=r_rows)
        torch.addcmul(epsilon, r_rows, r_rows, value=1 / x.shape[-1], out=r_rows).rsqrt_()
        normed = torch.mul(x_rows, r_rows, out=y_rows if y.dtype == r.dtype else None)
        torch.mul(normed, gain, out=y_rows)
    return y, r


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor (..., hidden or 1), PIECE numbers a thread of the first one."""
    rows = max(1, PIECE * torch.get_num_threads() // tensors[0].shape[-1])
    return zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in tensors), strict=True)
