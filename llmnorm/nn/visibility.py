"""Who may look at whom in a forward pass: Plain, Masked, Packed or Cached, exactly one of them.

The model makes the value once a pass and checks it there (models/context.py); a mixer matches on
its kind. Beyond what a kind says, a causal mixer never sees later tokens, and a window narrows what
is seen.

    Plain     each row is one document without padding
    Masked    each row is one document; some tokens are padding
    Packed    some row holds several documents, which do not see each other
    Cached    new tokens of rows whose earlier tokens are in a cache; a causal mixer only

Shapes: rows (batch, length). Padding of packed rows is a document of its own (masks.py).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.masks import document_boundaries, document_mask, document_segments
from llmnorm.nn.places import Places


@dataclass(frozen=True)
class Plain:
    """Each row is one document without padding."""


@dataclass(frozen=True)
class Masked:
    """Each row is one document; some tokens are padding, which no real token sees."""

    real: Tensor
    """(batch, length), False for padding."""
    mask: Tensor | None
    """(batch, 1, length, length) for attention; None where causality alone hides the padding, all
    of which is then behind the real tokens."""


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end hold documents that do not see each other.

    Attention keeps them apart by the kernel if there is one, else by the mask if there is one, else
    it takes them one by one; the model gives a kernel or a mask, or neither, and never both.
    """

    boundaries: Tensor | None
    """(documents + 1,) int32, where documents start, and where the last one ends; None for a
    compiler that was given none, since their number would be a value."""
    segments: Tensor
    """(batch, length) int64, the number of each token's document."""
    longest: int
    """No document has more tokens."""
    kernel: bool = False
    """Whether a GPU kernel serves the attention of such rows (mixers/varlen.py)."""
    mask: Tensor | None = None
    """(batch, 1, length, length), for attention without a kernel where documents must not be taken
    one by one: on a GPU, and for a compiler."""
    fixed_shapes: bool = False
    """Whether no shape may depend on the documents' lengths, as a compiler wants it."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The documents' lengths, on the host; on a GPU the first call waits for the device."""
        assert not self.fixed_shapes and self.boundaries is not None
        return tuple(self.boundaries.diff().tolist())


@dataclass(frozen=True)
class Cached:
    """New tokens of rows with a cache; each sees its row up to itself."""

    places: Places
    """Where the new tokens go, which of them are padding, whether the rows are empty before them,
    and the masks, which are made once for all layers."""


Visibility = Plain | Masked | Packed | Cached


def packed(documents: tuple[int, ...], batch: int, device: torch.device) -> Packed:
    """Documents of these lengths in `batch` rows laid end to end; attention takes them one by one.

    (2, 1, 3) with batch 2: two documents in the first row, one in the second.
    """
    boundaries = document_boundaries(documents, device)
    segments = document_segments(boundaries, batch, sum(documents) // batch)
    return Packed(boundaries, segments, max(documents))


def visible_tokens(like: Tensor, visibility: Visibility, *, causal: bool) -> Tensor:
    """How many real tokens each token sees, at least 1: (batch or 1, length), int64.

    In its document, up to itself or (causal=False) to the end; like (batch, length, ...).
    """
    batch, length = like.shape[:2]
    match visibility:
        case Cached(places=places):
            return places.seen
        case Plain():
            count = torch.arange(1, length + 1, device=like.device)
            return (count if causal else count.new_full((length,), length)).unsqueeze(0)
        case Masked():
            segments, real = None, visibility.real.long()
        case Packed():
            segments = visibility.segments
            real = torch.ones(batch, length, dtype=torch.long, device=like.device)
    seen = _running_count(real, segments)
    if not causal:
        flipped = None if segments is None else segments.flip(1)
        seen = seen + _running_count(real.flip(1), flipped).flip(1) - real
    return seen.clamp(min=1)


def visible_pairs(like: Tensor, visibility: Visibility, *, causal: bool) -> Tensor:
    """(batch or 1, 1, length, length), True where token i sees the real token j.

    What the explicit matrices of recurrent mixers are masked by; like (batch, length, ...). Padding
    sees no padding, not even itself.
    """
    length = like.shape[1]
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device)
    if causal:
        visible = visible.tril()
    match visibility:
        case Plain():
            return visible
        case Masked(real=real):
            return visible & real[:, None, None, :]
        case Packed(segments=segments):
            return visible & document_mask(segments, causal=False)
    raise AssertionError("the matrix is that of rows without a cache")


def _running_count(real: Tensor, segments: Tensor | None) -> Tensor:
    running = real.cumsum(1)
    if segments is None:
        return running
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return running - ((running - real) * first).cummax(1).values
