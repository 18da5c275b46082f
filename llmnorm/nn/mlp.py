"""The two MLPs: SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6) and plain GELU.

Shapes: x and out (batch, length, hidden). Projections carry Hugging Face's names.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.projections import outputs


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    same_input: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        gate, up = outputs(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class GELU(nn.Module):
    """down(gelu(up(x))), with the exact gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        return self.down_proj(F.gelu(self.up_proj(x)))
