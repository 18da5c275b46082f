"""A short depthwise convolution over time: y_t = bias + sum_o w_o x_{t - o}, channel by channel.

Causal: o = 0 .. kernel - 1. Symmetric: o from -(kernel // 2) to kernel // 2. Shapes: x and y
(batch, length, channels); weight (channels, 1, kernel), whose last tap (causal) is on the token
itself, as in torch's Conv1d with padding on the left. Taps that reach into another document are
left out; what was before the first token is `window` (batch, kernel - 1, channels), or nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.steps import counts_of, takes_step
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.states import last_inputs
from llmnorm.nn.visibility import Cached
from llmnorm.part import InputError

PIECE = 128  # tokens


class ShortConvolution(nn.Module):
    """The convolution; parameters carry Conv1d's names."""

    def __init__(
        self, channels: int, kernel: int, *, bias: bool = True, causal: bool = True
    ) -> None:
        super().__init__()
        if not causal and kernel % 2 == 0:
            raise InputError(f"a convolution that looks both ways has an odd kernel, got {kernel}")
        self.kernel, self.causal = kernel, causal
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own: uniform within 1 / sqrt(kernel)."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -1 / math.sqrt(self.kernel), 1 / math.sqrt(self.kernel))

    def forward(
        self, x: Tensor, segments: Tensor | None = None, window: Tensor | None = None
    ) -> Tensor:
        """x (batch, length, channels) -> the same shape, in x's dtype."""
        before = self.kernel - 1 if self.causal else self.kernel // 2
        after = self.kernel - 1 - before
        weight = self.weight.to(x.dtype)
        bias = x.new_zeros(x.shape[2]) if self.bias is None else self.bias.to(x.dtype)
        if window is not None:
            around = torch.cat((window.to(x.dtype), x), 1)
        else:
            around = F.pad(x, (0, 0, before, after))
        cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if cpu and x.dtype == wide_dtype(x.dtype):  # sums of taps are not rounded to bf16
            return _Taps.apply(around, weight.squeeze(1), bias, segments, before)
        if segments is None:
            return F.conv1d(around.mT, weight, bias, groups=x.shape[2]).mT
        numbers = F.pad(segments, (before, after), value=-1)
        same = numbers.unfold(1, self.kernel, 1) == segments[..., None]
        y, length = bias.expand_as(x), x.shape[1]
        for tap in range(self.kernel):
            inputs = around[:, tap : tap + length].masked_fill(~same[..., tap, None], 0)
            y = torch.addcmul(y, inputs, weight[:, 0, tap])
        return y

    def in_pass(
        self, x: Tensor, context: Context, window: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` behind `window`, and the next window if the rows have a cache, else None."""
        if not isinstance(context.visibility, Cached):
            return self(x, context.segments, window), None
        places, width = context.visibility.places, self.kernel - 1
        if not takes_step(x, context):
            return self(x, None, window), self.carried(window, x, counts_of(places))
        y, around = self.step(x, window)
        if places.real is None:
            return y, around[:, x.shape[1] :]
        last = around.flatten(0, 1).index_select(0, places.last(width))
        return y, last.view(x.shape[0], width, x.shape[2])

    def step(self, x: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        """A causal `forward` for few tokens (steps.py), and the inputs with the window in front."""
        assert self.causal
        around = self._around(window, x)
        wide, new = wide_dtype(x.dtype), x.shape[1]
        taps = self.weight.to(wide).squeeze(1)  # (channels, kernel)
        if new == 1:
            y = (around.to(wide).mT * taps).sum(-1).unsqueeze(1)
        else:  # a third of the time for 8 rows of 5 tokens
            taps = taps.t().contiguous()
            y = around[:, :new].to(wide) * taps[0]
            for tap in range(1, self.kernel):
                y.addcmul_(around[:, tap : tap + new], taps[tap])
        if self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype), around

    def carried(self, window: Tensor | None, x: Tensor, counts: Tensor | None) -> Tensor:
        """The next `window`, after the first `counts` (batch,) of the inputs x; None: after all."""
        if counts is None:
            return self._around(window, x)[:, x.shape[1] :]
        return last_inputs(window, x, counts, self.kernel - 1)

    def _around(self, window: Tensor | None, x: Tensor) -> Tensor:
        """x with what was before it, (batch, kernel - 1 + length, channels)."""
        if window is None:
            return F.pad(x, (0, 0, self.kernel - 1, 0))
        return torch.cat((window.to(x.dtype), x), 1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, kernel={self.kernel}, causal={self.causal}"


class _Taps(torch.autograd.Function):
    """Tap by tap over short pieces of a row, which stay in the processor's cache.

    A third of the time of torch's kernel, which wants channels before time and copies for it.
    Shapes: around (batch, length + kernel - 1, channels), weight (channels, kernel), segments
    (batch, length) or None; `before`: taps on tokens before the own one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        around: Tensor,
        weight: Tensor,
        bias: Tensor,
        segments: Tensor | None,
        before: int,
    ) -> Tensor:
        ctx.save_for_backward(around, weight, segments)
        ctx.before = before
        taps = weight.t().contiguous()
        batch, whole, channels = around.shape
        y = around.new_empty(batch, whole - len(taps) + 1, channels)
        for row, piece, document in _pieces(y, segments):
            y[row, piece.start : piece.stop] = bias
            for tap, out, inputs in _reads(piece, document, len(taps), before):
                y[row, out].addcmul_(around[row, inputs], taps[tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        around, weight, segments = ctx.saved_tensors
        taps, dy = weight.t().contiguous(), grads[0]
        d_around, d_taps = torch.zeros_like(around), torch.zeros_like(taps)
        for row, piece, document in _pieces(dy, segments):
            for tap, out, inputs in _reads(piece, document, len(taps), ctx.before):
                grad = dy[row, out]
                d_around[row, inputs].addcmul_(grad, taps[tap])
                d_taps[tap] += (grad * around[row, inputs]).sum(0)
        return d_around, d_taps.t(), dy.sum((0, 1)), None, None


def _pieces(y: Tensor, segments: Tensor | None) -> Iterator[tuple[int, range, range | None]]:
    """A row, some of its tokens, and those of the document that they are of, if there are any."""
    batch, length = y.shape[:2]
    for row in range(batch):
        starts = [0]
        if segments is not None:
            starts += (segments[row].diff().nonzero().flatten() + 1).tolist()
        for document in map(range, starts, [*starts[1:], length]):
            for start in document[::PIECE]:
                piece = range(start, min(start + PIECE, document.stop))
                yield row, piece, None if segments is None else document


def _reads(
    piece: range, document: range | None, kernel: int, before: int
) -> Iterator[tuple[int, slice, slice]]:
    """A tap, the tokens (of y) that it serves, and where (in `around`) it reads for them.

    It leaves out those for which it would leave the document: of a document's tokens 5 .. 9 the tap
    on the token before serves 6 .. 9.
    """
    for tap in range(kernel):
        low, high = piece.start, piece.stop
        if document is not None:
            low = max(low, document.start + before - tap)
            high = min(high, document.stop + before - tap)
        if low < high:
            yield tap, slice(low, high), slice(low + tap, high + tap)
