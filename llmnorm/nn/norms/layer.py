"""Layer norm: y = gain * (x - mean) / sqrt(variance + eps) + bias.

Source: Ba, Kiros, Hinton 2016 (arXiv 1607.06450), equation 3. Shapes: x and y (..., hidden). The
variance is the biased one: divided by hidden, not by hidden - 1. With hidden = 1 the output is the
bias and the gradient of the input is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.settings import LayerNormSettings
from llmnorm.nn.precision import wide_dtype, without_autocast


class LayerNorm(Norm):
    """Layer norm with statistics in float32 (float64 for float64 input), output in x's dtype."""

    def __init__(self, hidden_size: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        LayerNormSettings(eps=eps, bias=bias).check(hidden_size)
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
        dtype = wide_dtype(x.dtype)
        with without_autocast(x.device.type):
            gain = self.scaled(self.weight.to(dtype))
            bias = None if self.bias is None else self.scaled(self.bias.to(dtype))
            return F.layer_norm(x.to(dtype), gain.shape, gain, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"
