"""What a family of mixing matrices is, and what families share.

Source: Hwang, Lahoti, Dao, Gu 2024 (arXiv 2407.09941), table 1. A family is data-dependent (a token
brings the numbers of its row and column) or not (they are learned for each position, in tables that
end at the longest document).

Shapes: v (batch, length, heads, head_dim); matrices (batch or 1, heads or 1, length, length), row i
reads column j; q and k (batch or 1, length, heads, qk_dim); position (batch or 1, length) that of a
token in its document, from 0, padding not counted.

Surprises. Positions and lengths are those of the document, never of the row or of the tables: so
packed documents are what they are alone, and a data-dependent matrix knows no longest document. The
official code scales by the tables' length, whatever the row's; `fixed` is that.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Packed, Plain, Visibility, visible_tokens
from llmnorm.part import InputError

Made = TypeVar("Made")


class Family(nn.Module, Generic[Made]):
    """The matrix of one family, and the product with it; `Made` is what `prepare` makes for both.

    Attributes:
        convolved: channels a token brings, beside its values, through the convolution.
        activated: whether silu follows the convolution there (it does for the values).
        plain: channels a token brings through the projection alone.
        residual: whether the identity is added.
        longest: tokens of the longest document; None: any.
    """

    convolved = 0
    activated = False
    plain = 0
    residual = True
    longest: int | None = None

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> Made:
        """What the matrix is made of; convolved and plain (batch, length, channels)."""
        raise NotImplementedError

    def matrix(self, made: Made, v: Tensor, context: Context) -> Tensor:
        """The matrix without the identity, 0 where a token may not look."""
        raise NotImplementedError

    def mix(self, made: Made, v: Tensor, context: Context) -> Tensor:
        """The matrix times the values, (batch, length, heads, head_dim)."""
        matrix = self.matrix(made, v, context).to(v.dtype)
        return (matrix @ v.transpose(1, 2)).transpose(1, 2)

    def health(self, made: Made, context: Context) -> dict[str, Tensor]:
        """As the mixer's."""
        return {}

    def check(self, length: int, context: Context) -> None:
        """Refuse rows of `length` tokens that cannot be served.

        Raises:
            InputError: a document is longer than the tables.
        """
        tokens = length
        if isinstance(context.visibility, Packed):
            tokens = context.visibility.longest
        if self.longest is not None and tokens > self.longest:
            raise InputError(
                f"model.mixer.family: {type(self).__name__} has weights for documents of up to "
                f"model.max_position_embeddings = {self.longest} tokens, got {tokens}"
            )

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """Operations a token, beyond linear layers and the convolution."""
        raise NotImplementedError


class QueriesKeys(NamedTuple):
    """What row i and column j are made of: q_i and k_j."""

    q: Tensor
    k: Tensor


class QueryKeyFamily(Family[QueriesKeys]):
    """A family whose entry (i, j) is made of q_i and k_j.

    Attributes:
        fixed: the length that entries are scaled by (`root_of_length`); None: each document's.
    """

    def __init__(
        self,
        heads: int,
        longest: int,
        *,
        qk_dim: int,
        data_dependent: bool,
        official_compat: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.data_dependent = heads, qk_dim, data_dependent
        self.fixed = longest if official_compat else None
        if data_dependent:
            self.convolved = 2 * heads * qk_dim
        else:
            self.longest = longest
            self.q_matrix = nn.Parameter(torch.empty(longest, heads, qk_dim))
            self.k_matrix = nn.Parameter(torch.empty(longest, heads, qk_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's normal, as the official code."""
        for parameter in self.parameters(recurse=False):
            nn.init.xavier_normal_(parameter)

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> QueriesKeys:
        """Those that the token brings, or its position has."""
        if self.data_dependent:
            shape = (2, self.heads, self.qk_dim)
            return QueriesKeys._make(convolved.unflatten(-1, shape).unbind(2))
        position = positions(v, context)
        return QueriesKeys(self.q_matrix[position], self.k_matrix[position])

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """Entries and their sums, a row of the matrix each."""
        return 2.0 * self.heads * (self.qk_dim + head_dim) * context_length


def positions(v: Tensor, context: Context) -> Tensor:
    """The position of each token in its document, (batch or 1, length)."""
    return visible_tokens(v, context.visibility, causal=True) - 1


def root_of_length(v: Tensor, context: Context, fixed: int | None) -> Tensor:
    """The root of the length of each token's document, or of `fixed`: (batch or 1, length)."""
    length = visible_tokens(v, context.visibility, causal=False)
    if fixed is not None:
        length = torch.full_like(length, fixed)
    return length.to(wide_dtype(v.dtype)).sqrt()


def summed_over_channels(
    entry: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor
) -> Tensor:
    """The sum over the channels c of entry(rows_ic, columns_jc), (batch, heads, length, length).

    rows and columns (batch or 1, length, heads or 1, channels). One channel at a time, recomputed
    in the backward pass: memory is that of a few matrices, not of one for each channel.
    """
    total: Tensor | None = None
    for row, column in zip(rows.unbind(-1), columns.unbind(-1), strict=True):
        both = (row.transpose(1, 2)[..., None], column.transpose(1, 2)[:, :, None])
        one = checkpoint(entry, *both, use_reentrant=False, preserve_rng_state=False)
        total = one if total is None else total + one
    assert total is not None
    return total


def by_document(
    function: Callable[..., Tensor], visibility: Visibility, *inputs: Tensor
) -> Tensor | None:
    """`function` of the inputs (batch or 1, length, ...), of each document alone.

    None where that cannot be: there is padding, or no shape may depend on the documents' lengths.
    """
    match visibility:
        case Plain():
            return function(*inputs)
        case Packed(fixed_shapes=False) as packed:
            rows = (t.flatten(0, 1).unsqueeze(0) for t in inputs)
            pieces = [t.split(packed.lengths, 1) for t in rows]
            alone = [function(*document) for document in zip(*pieces, strict=True)]
            return torch.cat(alone, 1).view_as(inputs[-1])
    return None
