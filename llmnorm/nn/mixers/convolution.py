"""A short depthwise convolution over time: y_t = bias + sum_o w_o x_{t - o}, channel by channel.

Causal: o = 0 .. kernel - 1. Symmetric: o from -(kernel // 2) to kernel // 2. Shapes: x and y
(batch, length, channels); weight (channels, 1, kernel), whose last tap (causal) is on the token
itself, as in torch's Conv1d with padding on the left. Taps that reach into another document are
left out; what was before the first token is `window` (batch, kernel - 1, channels), or nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.recurrent_cache import last_inputs


class ShortConvolution(nn.Module):
    """The convolution; parameters carry Conv1d's names."""

    def __init__(
        self, channels: int, kernel: int, *, bias: bool = True, causal: bool = True
    ) -> None:
        super().__init__()
        assert causal or kernel % 2, "a symmetric kernel has a middle"
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
        if segments is None:
            return F.conv1d(around.mT, weight, bias, groups=x.shape[2]).mT
        numbers = F.pad(segments, (before, after), value=-1)
        y, length = bias.expand_as(x), x.shape[1]
        for tap in range(self.kernel):
            same = (numbers[:, tap : tap + length] == segments)[..., None]
            inputs = around[:, tap : tap + length].masked_fill(~same, 0)
            y = torch.addcmul(y, inputs, weight[:, 0, tap])
        return y

    def carried(self, window: Tensor | None, x: Tensor, counts: Tensor) -> Tensor:
        """The next `window`, after the first `counts` (batch,) of the inputs x."""
        return last_inputs(window, x, counts, self.kernel - 1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, kernel={self.kernel}, causal={self.causal}"
