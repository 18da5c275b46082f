"""A short depthwise convolution over time: y_t = bias + sum_o w_o x_{t - o}, channel by channel.

Causal: o = 0 .. kernel - 1. Symmetric: o from -(kernel // 2) to kernel // 2. Shapes: x and y (batch,
length, channels); weight (channels, 1, kernel), the last tap (causal) on the token itself, as in
torch's Conv1d with padding on the left. Taps that reach into another document are left out; what
was before the first token is `window` (batch, kernel - 1, channels), or nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if window is not None:
            x = torch.cat((window.to(x.dtype), x), 1)
            y = F.conv1d(x.mT, self.weight.to(x.dtype), self._bias(x), groups=x.shape[2]).mT
            return y
        if segments is None:
            x = F.pad(x, (0, 0, before, after))
            return F.conv1d(x.mT, self.weight.to(x.dtype), self._bias(x), groups=x.shape[2]).mT
        length = x.shape[1]
        padded = F.pad(x, (0, 0, before, after))
        numbers = F.pad(segments, (before, after), value=-1)
        y = torch.zeros_like(x) if self.bias is None else self._bias(x).expand_as(x)
        for tap in range(self.kernel):
            same = (numbers[:, tap : tap + length] == segments)[..., None]
            inputs = padded[:, tap : tap + length].masked_fill(~same, 0)
            y = torch.addcmul(y, inputs, self.weight[:, 0, tap].to(x.dtype))
        return y

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, kernel={self.kernel}, causal={self.causal}"
