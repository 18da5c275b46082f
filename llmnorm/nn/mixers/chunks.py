"""Rows cut into chunks: documents that share a chunk, decays inside it, blocks of chunks.

What the recurrences of linear_recurrence.py, gla.py and gated_delta.py have in common. Shapes in
letters: b batch, n chunk, g group of heads, r head of the group, c, i or j position in the chunk.

Sums of decays are sums of their own terms, never differences of a running sum: those lose digits
where gates are strong, and let one document's rounding leak into another's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    segments: Tensor | None,
    state: Tensor,
    chunk: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """`block` over rows of any length, `size` tokens at a time, recomputed if there are several.

    block(*inputs, segments, last, state, chunk) -> (y, state); inputs are (batch, length, ...);
    `last` (batch, 1) is the document that `state` belongs to.
    """
    assert inputs[0] is not None
    last = None if segments is None else segments[:, :1]
    if inputs[0].shape[1] <= size:
        return block(*inputs, segments, last, state, chunk)
    outs = []
    # `split`, not slices: its backward is one concatenation, not a row of zeros for every block.
    pieces = (
        [None] * -(-inputs[0].shape[1] // size) if t is None else t.split(size, 1)
        for t in (*inputs, segments)
    )
    for *part, numbers in zip(*pieces, strict=True):
        y, state = checkpoint(
            block,
            *part,
            numbers,
            last,
            state,
            chunk,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outs.append(y)
        last = None if numbers is None else numbers[:, -1:]
    return torch.cat(outs, 1), state


def whole_chunks(
    inputs: Sequence[Tensor | None], segments: Tensor | None, chunk: int
) -> tuple[Any, ...]:
    """The inputs, and behind them the segments, filled up with zeros to a multiple of `chunk`."""
    assert inputs[0] is not None
    tail = -inputs[0].shape[1] % chunk
    if not tail:
        return (*inputs, segments)
    if segments is not None:
        segments = torch.cat((segments, segments[:, -1:].expand(-1, tail)), 1)
    padded = (None if t is None else F.pad(t, (0, 0) * (t.ndim - 2) + (0, tail)) for t in inputs)
    return (*padded, segments)


def write(op: Callable[..., Tensor], *inputs: Tensor, out: Tensor) -> None:
    """op(*inputs) in the memory of `out`, a view perhaps; a compiler knows this as a copy alone."""
    if torch.compiler.is_compiling():
        out.copy_(op(*inputs))
    else:
        op(*inputs, out=out)


class Documents:
    """Which tokens of a chunk belong to one document, and which to that of the state before it.

    Attributes:
        same: (b, n, 1, 1, i, j), whether j is before, or is, i and in its document.
        continues: (b, n, 1, 1, c), whether the document of the state before the chunk is c's.
        ends: (b, n, 1, 1, c), whether c's document is the chunk's last one.
        carried: (b, n, 1, 1, 1), whether the document of the state before is the chunk's last one.
    """

    def __init__(self, segments: Tensor, last: Tensor | None, chunk: int) -> None:
        assert last is not None
        number = segments.unflatten(1, (-1, chunk))  # (b, n, c)
        ends = number[..., -1:]
        before = torch.cat((last, ends[:, :-1, 0]), 1)[..., None]
        same = (number[..., :, None] == number[..., None, :]).tril()
        self.same = same[:, :, None, None]
        self.continues = (number == before)[:, :, None, None]
        self.ends = (number == ends)[:, :, None, None]
        self.carried = (ends == before)[:, :, None, None]


def decays(g: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at i, of the state at i, of j at the chunk's end, of the state there.

    g (b, n, g, r, c, 1) -> (..., i, j), (..., c), (..., c) and (..., 1). Exponents are sums over
    j < l <= i of terms that are at most 0, so nothing overflows.
    """
    chunk = g.shape[4]
    ones = torch.ones(chunk, chunk, dtype=g.dtype, device=g.device)
    visible = ones.tril().bool()
    sums = (g * ones.tril(-1)).cumsum(-2)  # sum over l <= i of g_l [l > j]
    since = g.squeeze(-1) @ ones.triu()
    until = g.squeeze(-1) @ ones.tril(-1)
    carried = since[..., -1:]
    if documents is not None:
        visible = documents.same
        since = since.masked_fill(~documents.continues, -torch.inf)
        until = until.masked_fill(~documents.ends, -torch.inf)
        carried = carried.masked_fill(~documents.carried, -torch.inf)
    inside = torch.where(visible, sums.exp(), 0)  # exp(-inf) takes twice the time of others
    return inside, since.exp(), until.exp(), carried.exp()


def decay_matrix(log_decay: Tensor, visible: Tensor) -> Tensor:
    """What is left of token j at token i, (batch, heads, length, length): for explicit matrices.

    log_decay (batch, length, heads); visible (batch or 1, 1, length, length), False gives 0.
    """
    length = log_decay.shape[1]
    ones = torch.ones(length, length, dtype=log_decay.dtype, device=log_decay.device)
    sums = ones.tril() @ (log_decay.transpose(1, 2)[..., None] * ones.tril(-1))
    return sums.masked_fill(~visible, -torch.inf).exp()
