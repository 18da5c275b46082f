"""The Cauchy family: M_ij = sum_c 1 / (e^{q_ic} + e^{k_jc} + 2 b + 1e-8) / sqrt(qk_dim length).

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1, and the official code, which this follows:
the paper's 1 / (q - k + c) has poles, the exponentials have none. The offset b (`bias`, 0.5 at
first) is learned and added to both exponentials, hence twice; learned q and k have none. Below 0 it
counts as 0, where the official code would have poles again: all entries are positive.

Shapes: q and k (batch or 1, length, heads, qk_dim); the bias (1,).
"""

import math

import torch
from torch import Tensor, nn

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.matrix.family import (
    QueriesKeys,
    QueryKeyFamily,
    root_of_length,
    summed_over_channels,
)
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import visible_pairs

TINY = 1e-8


class Cauchy(QueryKeyFamily):
    """Large where both q_i and k_j are small."""

    def __init__(
        self,
        heads: int,
        longest: int,
        *,
        qk_dim: int,
        data_dependent: bool,
        official_compat: bool,
    ) -> None:
        super().__init__(
            heads,
            longest,
            qk_dim=qk_dim,
            data_dependent=data_dependent,
            official_compat=official_compat,
        )
        if data_dependent:
            self.bias = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The bias one half; learned q and k by Xavier's normal, as the official code."""
        if self.data_dependent:
            nn.init.constant_(self.bias, 0.5)
        else:
            super().reset_parameters()

    def matrix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """Sums of reciprocals."""
        wide = wide_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            q, k = (t.to(wide).exp() for t in made)
            if self.data_dependent:
                q = q + 2 * self.bias.to(wide).clamp(min=0)
            weights = summed_over_channels(_reciprocal, q, k)
            root = root_of_length(v, context, self.fixed)[:, None, :, None]
            weights = weights / (math.sqrt(self.qk_dim) * root)
        return weights.masked_fill(~visible_pairs(v, context.visibility, causal=False), 0)


def _reciprocal(row: Tensor, column: Tensor) -> Tensor:
    return 1 / (row + column + TINY)
