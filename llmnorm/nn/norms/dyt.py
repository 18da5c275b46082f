"""Dynamic tanh: y = gain * tanh(alpha x) + bias, which takes the place of a norm.

Source: Zhu et al. 2025, "Transformers without Normalization" (arXiv 2503.10622), algorithm 1.
Shapes: x and y (..., hidden); alpha (1,), shared by all channels; t = tanh(alpha x), g = dL/dy.

Backward: dx = gain g alpha (1 - t^2), dalpha = sum gain g x (1 - t^2), dgain = sum over tokens of
g t, dbias = sum over tokens of g. Unlike a norm it is not invariant to the scale of x.
"""

import torch
from torch import Tensor, nn

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.settings import DyTSettings
from llmnorm.nn.precision import wide_dtype, without_autocast


class DyT(Norm):
    """Dynamic tanh, computed in float32 (float64 for float64 input), output in x's dtype."""

    def __init__(self, hidden_size: int, *, alpha: float, bias: bool) -> None:
        super().__init__()
        DyTSettings(alpha=alpha, bias=bias).check(hidden_size)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def reset_parameters(self) -> None:
        """Alpha as configured, gain one, offset zero."""
        nn.init.constant_(self.alpha, self.initial_alpha)
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """gain * tanh(alpha x) + bias for x (..., hidden)."""
        dtype = wide_dtype(x.dtype)
        with without_autocast(x.device.type):
            squashed = torch.tanh(x.to(dtype) * self.alpha.to(dtype))
            gain = self.scaled(self.weight.to(dtype))
            if self.bias is None:
                return (squashed * gain).to(x.dtype)
            return torch.addcmul(self.scaled(self.bias.to(dtype)), squashed, gain).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.numel()}, alpha={self.initial_alpha}, bias={self.bias is not None}"
