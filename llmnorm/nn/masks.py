"""Mask arithmetic: which documents packed rows hold, and which pairs of tokens see each other.

A document starts where a row starts and where `position_ids` is 0. Documents are written down in
three ways, which the functions here turn into each other; two rows of three tokens, of which the
first holds two documents:

    position_ids    [[0, 1, 0], [5, 6, 7]]
    lengths         (2, 1, 3)                   of the rows laid end to end, on the host
    boundaries      [0, 2, 3, 6]                int32: where documents start, and the end
    segments        [[0, 0, 1], [2, 2, 2]]      int64: the number of each token's document

Shapes: position_ids, segments and real (batch, length); boundaries (documents + 1,); masks (batch
or 1, 1, length, length), True where the query (a row of the mask) sees the key (a column).
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def document_lengths(position_ids: Tensor, real: Tensor | None = None) -> tuple[int, ...] | None:
    """Lengths of the documents of packed rows laid end to end; None if each row holds just one.

    Reads the positions back: on a GPU this waits for the device.

    Args:
        position_ids: (batch, length).
        real: (batch, length), False for padding, as in `document_starts`; rows whose real tokens
            are one document each give None, whatever their padding.
    """
    if real is not None and not bool(_later_starts(position_ids, real).any()):
        return None
    first = document_starts(position_ids, real).flatten().nonzero().flatten().tolist()
    if len(first) == len(position_ids):
        return None
    ends = [*first[1:], position_ids.numel()]
    return tuple(end - start for start, end in zip(first, ends, strict=True))


def document_starts(position_ids: Tensor, real: Tensor | None = None) -> Tensor:
    """(batch, length), True where a document of packed rows starts.

    Args:
        position_ids: (batch, length).
        real: (batch, length), False for padding. Every run of padding counts as a document of its
            own, so that keeping documents apart hides it.
    """
    if real is None:
        starts = position_ids[:, 1:] == 0
    else:
        starts = _later_starts(position_ids, real)[:, 1:] | (real[:, 1:] != real[:, :-1])
    return F.pad(starts, (1, 0), value=True)


def _later_starts(position_ids: Tensor, real: Tensor) -> Tensor:
    """(batch, length), True for real tokens at position 0 behind their row's first real token."""
    return (position_ids == 0) & real & (real.cumsum(1) != 1)


def document_boundaries(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """(documents + 1,) int32: (2, 1, 3) -> [0, 2, 3, 6]."""
    return torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)


def document_segments(boundaries: Tensor, batch: int, length: int) -> Tensor:
    """(batch, length) the number of each token's document: [0, 2, 3, 6] -> [[0, 0, 1], [2, 2, 2]].

    It does not read the boundaries back, so a GPU is not waited for.
    """
    token = torch.arange(batch * length, dtype=boundaries.dtype, device=boundaries.device)
    return (torch.searchsorted(boundaries, token, right=True) - 1).view(batch, length)


def document_mask(segments: Tensor, *, causal: bool = True) -> Tensor:
    """(batch, 1, length, length): True for what is before, or is, the query in its document.

    causal=False: for all of its document.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & causal_mask(segments.shape[-1], segments.device) if causal else same


def padding_mask(real: Tensor, *, causal: bool = True) -> Tensor | None:
    """(batch, 1, length, length) for rows with padding where `real` (batch, length) is False.

    None where none is needed: there is no padding, or (causal) it is all on the right, behind every
    real token; a compiler, which cannot look, always gets one. A padding token sees itself, so that
    no row of the mask is empty.
    """
    if not torch.compiler.is_compiling() and not bool(
        (real[:, 1:] & ~real[:, :-1]).any() if causal else (~real).any()
    ):
        return None
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    visible = real[:, None, None, :]
    return (causal_mask(length, real.device) & visible if causal else visible) | itself
