"""The dense family: M_ij = m_ij / sqrt(length), a free weight for every pair of positions.

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1, first row; the token mixing of MLP-Mixer
(Tolstikhin et al. 2021, arXiv 2105.01601) without its second layer. `M` (heads, longest, longest)
is the official name. Positions are those in the document, so a short one uses the leading block.
"""

import torch
from torch import Tensor, nn

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.matrix.family import Family, positions, root_of_length
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import visible_pairs


class Dense(Family[Tensor]):
    """One matrix a head, the same for all rows."""

    def __init__(self, heads: int, longest: int) -> None:
        super().__init__()
        self.heads, self.longest = heads, longest
        self.M = nn.Parameter(torch.empty(heads, longest, longest))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's normal, as the official code."""
        nn.init.xavier_normal_(self.M)

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> Tensor:
        """The weights of the pairs of positions, (batch or 1, heads, length, length)."""
        position = positions(v, context)
        if len(position) == 1:  # 0, 1, 2, ...
            return self.M[None, :, : v.shape[1], : v.shape[1]]
        return self.M[:, position[:, :, None], position[:, None, :]].transpose(0, 1)

    def matrix(self, made: Tensor, v: Tensor, context: Context) -> Tensor:
        """Scaled, documents apart."""
        root = root_of_length(v, context, None)[:, None, :, None]
        weights = made.to(wide_dtype(v.dtype)) / root
        return weights.masked_fill(~visible_pairs(v, context.visibility, causal=False), 0)

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """A row of the matrix times the values."""
        return 2.0 * self.heads * head_dim * context_length
