"""What one layer of a cache is, whatever its mixer keeps: key_values.py and recurrent_cache.py."""

from collections.abc import Sequence
from typing import Protocol

import torch

from llmnorm.nn.places import Places

KEPT = 64  # real tokens of a row that can always be rolled back
VERIFIED = 17  # new tokens of a row in the widest verification: one, and 16 that were drafted
PADDING = VERIFIED  # columns behind a full row, which that pass writes


def check_places(layer: "LayerCache", places: Places) -> None:
    """Refuse places that were found for other rows than the layer's first ones.

    Raises:
        ValueError: the rows' lengths differ: the layer would overwrite, or skip, tokens.
    """
    check_lengths(layer, places.lengths)


def check_lengths(layer: "LayerCache", expected: list[int]) -> None:
    """Refuse a layer whose first rows have other lengths than `expected` (`check_places`)."""
    lengths = layer.lengths[: len(expected)]
    if lengths != expected:
        raise ValueError(
            f"the cache's layer has rows of {lengths} tokens, and the new tokens' places are "
            f"for rows of {expected}; make the places from this cache, for every pass anew "
            "(RaggedCache.places)"
        )


def lengths_after_rollback(lengths: Sequence[int], counts: Sequence[int]) -> list[int]:
    """What is left of rows of `lengths` tokens without the last `counts` of the first rows.

    Raises:
        ValueError: counts of more rows than there are, below 0, or beyond a row's tokens.
    """
    left = [a - b for a, b in zip(lengths, counts, strict=False)]
    if len(counts) > len(lengths) or min(counts, default=0) < 0 or min(left, default=0) < 0:
        raise ValueError(f"rollback of {list(counts)} tokens from rows of {list(lengths)}")
    return [*left, *lengths[len(counts) :]]


class LayerCache(Protocol):
    """One layer's part: `append` differs with what the layer's mixer keeps, the rest is shared."""

    lengths: list[int]

    def reserve(
        self, rows: int, tokens: int, padding: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Make all buffers; return their bytes."""

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse what `rollback` cannot do, and change nothing."""

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of the first rows, as many as there are counts."""

    def admit(self, row: int, source: "LayerCache | None", source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row."""

    def release(self, row: int) -> None:
        """Empty a row."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once."""

    def clear(self) -> None:
        """Forget every row, and give up the buffers."""


def rounded(tokens: int) -> int:
    """A multiple of 64, so that capacities, and widths that are rounded alike, are few."""
    return -(-tokens // 64) * 64
