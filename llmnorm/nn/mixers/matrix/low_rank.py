"""The low-rank family: M_ij = q_i . k_j / sqrt(qk_dim length), linear in the length.

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1: linear attention (Katharopoulos et al. 2020,
arXiv 2006.16236) without a normaliser, with silu on q and k where they are made from tokens.

Shapes: q and k (batch or 1, length, heads, qk_dim). Every token of a document reads the same sum of
k v^T; rows of several documents pass the engine of linear_recurrence.py in both directions.
"""

import math

import torch
from torch import Tensor

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.linear_recurrence import linear_recurrence
from llmnorm.nn.mixers.matrix.family import QueriesKeys, QueryKeyFamily, root_of_length
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Packed, visible_pairs


class LowRank(QueryKeyFamily):
    """Of rank qk_dim."""

    activated = True

    def matrix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """Products of queries and keys."""
        q, k = (t.to(wide_dtype(v.dtype)) for t in made)
        weights = torch.einsum("bihd,bjhd->bhij", q, k) / self._root(v, context).transpose(1, 2)
        return weights.masked_fill(~visible_pairs(v, context.visibility, causal=False), 0)

    def mix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """Sums over the document, read by each of its tokens."""
        wide = wide_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            q, k, values = (t.to(wide) for t in (*made, v))
            if isinstance(context.visibility, Packed):
                y = _both_ways(q, k, values, context.visibility.segments)
            else:
                sums = torch.einsum("bjhd,bjhv->bhdv", k.expand(len(v), -1, -1, -1), values)
                y = torch.einsum("bihd,bhdv->bihv", q.expand(len(v), -1, -1, -1), sums)
            return (y / self._root(v, context)).to(v.dtype)

    def _root(self, v: Tensor, context: Context) -> Tensor:
        """(batch or 1, length, 1, 1)."""
        root = root_of_length(v, context, self.fixed)
        return math.sqrt(self.qk_dim) * root[..., None, None]

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """The sum written and read."""
        return 4.0 * self.heads * self.qk_dim * head_dim


def _both_ways(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    """The sums over each document; both directions count the token itself."""
    before, _ = linear_recurrence(q, k, v, segments=segments)
    flipped = (t.flip(1) for t in (q, k, v))
    after, _ = linear_recurrence(*flipped, segments=segments.flip(1))
    return before + after.flip(1) - (q * k).sum(-1, keepdim=True) * v
