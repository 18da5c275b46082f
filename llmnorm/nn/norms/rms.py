"""Root mean square norm: y = gain * x / sqrt(mean(x^2) + eps).

Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4. Shapes: x and y (..., hidden), gain
and offset (hidden,). rms_cpu.py has the forward and backward pass on a CPU.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.rms_cpu import CPURMSNorm, forward_only
from llmnorm.nn.norms.settings import RMSNormSettings
from llmnorm.nn.precision import wide_dtype, without_autocast


class RMSNorm(Norm):
    """RMS norm with statistics in float32 (float64 for float64 input), output in x's dtype.

    `cast_mode="llama"` rounds to x's dtype before the gain, as Hugging Face's LlamaRMSNorm does; in
    a model of one dtype the two are equal to the bit. Below float32 the two modes differ by up to
    one unit in the last place. A float32 gain makes LlamaRMSNorm's output float32; here it is x's
    dtype all the same.

    Raises:
        ValueError: what RMSNormSettings refuses too, e.g. an offset with `cast_mode="llama"`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        cast_mode: Literal["fp32_affine", "llama"] = "fp32_affine",
        bias: bool = False,
    ) -> None:
        super().__init__()
        RMSNormSettings(eps=eps, cast_mode=cast_mode, bias=bias).check(hidden_size)
        self.eps = eps
        self.cast_mode = cast_mode
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def reset_parameters(self) -> None:
        """Gain one, offset zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        with without_autocast(x.device.type):
            gain = self.scaled(self.weight)
            if self.cast_mode == "llama":
                return self._llama(x, gain)
            if self.bias is None:
                return rms_norm(x, gain, self.eps)
            values, offset = x.to(wide_dtype(x.dtype)), self.scaled(self.bias)
            return (rms_norm(values, gain, self.eps) + offset).to(x.dtype)

    def _llama(self, x: Tensor, gain: Tensor) -> Tensor:
        values = x.to(wide_dtype(x.dtype))
        r = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        return (gain * (values * r).to(x.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        size = f"{self.weight.numel()}, eps={self.eps}, cast_mode={self.cast_mode}"
        return size if self.bias is None else f"{size}, bias=True"


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain * x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype; gain (hidden,)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses by itself
        if not torch.is_grad_enabled():
            return forward_only(x, gain, eps)
        y: Tensor = CPURMSNorm.apply(x, gain, eps)
        return y
    if x.dtype == gain.dtype:
        return F.rms_norm(x, gain.shape, gain, eps)
    dtype = torch.promote_types(torch.promote_types(x.dtype, gain.dtype), torch.float32)
    return F.rms_norm(x.to(dtype), gain.shape, gain.to(dtype), eps).to(x.dtype)
