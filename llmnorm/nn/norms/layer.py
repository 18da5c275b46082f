"""Layer norm: y = gain * (x - mean) / sqrt(variance + eps) + bias.

Source: Ba, Kiros, Hinton 2016 (arXiv 1607.06450), equation 3. Shapes: x and y (..., hidden). The
variance is the biased one (divided by hidden, not hidden - 1). With hidden = 1 the output is the
bias and the input's gradient is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer norm with statistics in float32 (float64 for float64 input), output in x's dtype."""

    def __init__(self, hidden_size: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def reset_parameters(self) -> None:
        """Gain one, offset zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"
