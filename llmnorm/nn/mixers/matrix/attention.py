"""The attention family: M_ij = softmax_j(q_i . k_j / sqrt(qk_dim)), both ways, without positions.

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1; Vaswani et al. 2017 (arXiv 1706.03762). q and
k come out of the convolution, which is all that tells neighbours from others.

Shapes: q and k (batch or 1, length, heads, qk_dim). Learned q and k are one matrix for all rows,
made once; the official code crashes there (its einsum takes the length for the heads).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.matrix.family import QueriesKeys, QueryKeyFamily
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Plain, visible_pairs


class Attention(QueryKeyFamily):
    """Rows that sum to 1."""

    def matrix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """The weights."""
        wide = wide_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            q, k = (t.to(wide) for t in made)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(self.qk_dim)
            return scores.masked_fill(~_mask(v, context), -torch.inf).softmax(-1)

    def mix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """By torch's kernels, unless one matrix serves all rows."""
        if not self.data_dependent:
            return super().mix(made, v, context)
        q, k, values = (t.transpose(1, 2) for t in (*made, v))
        mask = None if isinstance(context.visibility, Plain) else _mask(v, context)
        return F.scaled_dot_product_attention(q, k, values, attn_mask=mask).transpose(1, 2)


def _mask(v: Tensor, context: Context) -> Tensor:
    """Who sees whom, (batch or 1, 1, length, length); padding sees itself: no row is empty."""
    itself = torch.eye(v.shape[1], dtype=torch.bool, device=v.device)
    return visible_pairs(v, context.visibility, causal=False) | itself
