"""The ragged slot cache: what decoding carries, for rows with lengths of their own.

A row is a slot. An attention layer keeps keys and values in (rows, kv_heads, capacity, head_dim)
and writes a row's new tokens at the row's own length, so nothing is ever moved or padded; a
recurrent layer keeps a state (recurrent_cache.py). The verbs are the same for every mixer:
`append`, `rollback`, `admit`, `release`, `select`.

Invariants: the slot of a token is its position in the row (in a window: less what was dropped of
the row's beginning); a query at position i sees the slots up to its own and nothing else. What lies
beyond a row's length (rejected tokens, padding, tokens of a sequence that had the row before) is
overwritten before a query can see it. Buffers start as zeros, since 0 * NaN from uninitialised
memory would pass through any mask.

Shapes: new tokens (rows, new, kv_heads, head_dim), as mixers make them; `real` (rows, new), False
for padding. Example: rows of length 5 and 2, new tokens real = [[1, 1, 1], [0, 1, 1]]
-> index [[5, 6, 7], [4, 2, 3]] (padding goes behind the real ones), counts [3, 2].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

KEPT = 64  # tokens that a cache of constant size can always roll back


@dataclass(frozen=True)
class Places:
    """Where one forward pass's new tokens go; made once a pass, used by every layer."""

    lengths: list[int]
    """Tokens of each row before this pass."""
    index: Tensor
    """(rows, new) slot, and position, of every new token."""
    counts: list[int]
    """Real new tokens of each row."""
    start: int | None
    """Where all rows start if they are of one length and without padding, else None."""
    width: int
    """Slots to attend over: the longest row after this pass, padding included."""
    real: Tensor | None = None
    """(rows, new), False for padding; None: all are real."""

    @property
    def fills_empty_rows(self) -> bool:
        """Whether all rows are empty and none gets padding: attention is plain and causal then."""
        return self.start == 0

    def mask(self) -> Tensor | None:
        """(rows or 1, 1, new, width), True where a query may look; None: causality is enough."""
        if self.fills_empty_rows or (self.start is not None and self.index.shape[1] == 1):
            return None
        index = self.index[:1] if self.start is not None else self.index
        return (torch.arange(self.width, device=index.device) <= index[..., None]).unsqueeze(1)


def find_places(
    lengths: Sequence[int], new: int, device: torch.device, real: Tensor | None = None
) -> Places:
    """Where `new` more tokens go in rows of `lengths`; `real` (rows, new) is False for padding."""
    if real is not None and bool(real.all()):
        real = None
    lengths, rows = list(lengths), len(lengths)
    if real is None and len(set(lengths)) == 1:
        start = lengths[0]
        index = torch.arange(start, start + new, device=device).expand(rows, new)
        return Places(lengths, index, [new] * rows, start, start + new)
    kept = torch.ones(rows, new, dtype=torch.bool, device=device) if real is None else real
    counts = kept.sum(1)
    rank = torch.where(kept, kept.cumsum(1) - 1, counts[:, None] + (~kept).cumsum(1) - 1)
    index = torch.tensor(lengths, device=device)[:, None] + rank
    return Places(lengths, index, counts.tolist(), None, max(lengths) + new, real)


def check_places(layer: "LayerCache", places: Places) -> None:
    """Refuse places that were found for other rows than the layer has.

    Raises:
        ValueError: the rows' lengths differ: the layer would overwrite, or skip, tokens.
    """
    if layer.lengths != places.lengths:
        raise ValueError(
            f"the cache's layer has rows of {layer.lengths} tokens, and the new tokens' places are "
            f"for rows of {places.lengths}; make the places from this cache, for every pass anew "
            "(RaggedCache.places)"
        )


class LayerCache(Protocol):
    """One layer's part: `append` differs with what the layer's mixer keeps, the rest is shared."""

    lengths: list[int]

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop each row's last tokens."""

    def admit(self, row: int, source: "LayerCache | None", source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row."""

    def release(self, row: int) -> None:
        """Empty a row."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once."""

    def clear(self) -> None:
        """Forget every row."""


class KeyValues:
    """One attention layer's keys and values.

    With a `window`, tokens that no later query can see are dropped now and then; `dropped` counts
    them for each row. The last window + KEPT tokens stay, so that KEPT tokens can be rolled back
    and memory does not grow with the row.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: list[int] = []
        self.dropped: list[int] = []

    def append(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Write new tokens (rows, new, kv_heads, head_dim); return all keys and values.

        The result is two views (rows, kv_heads, width, head_dim). Gradients do not flow through the
        cache; writes are cast to the dtype of the first ones.

        Raises:
            ValueError: the places are for rows of other lengths (`check_places`).
        """
        check_places(self, places)
        index, width = places.index, places.width
        if self.window is not None:
            self._drop(self.window, keys.shape[1])
            dropped = torch.tensor(self.dropped, device=index.device)
            index, width = index - dropped[:, None], self._slots_in_use() + keys.shape[1]
        kept_keys = self._room(self.keys, keys, width)
        kept_values = self._room(self.values, values, width)
        self.keys, self.values = kept_keys, kept_values
        for kept, fresh in ((kept_keys, keys), (kept_values, values)):
            fresh = fresh.detach().to(kept.dtype)
            if places.start is not None and not any(self.dropped):
                kept[:, :, places.start : width] = fresh.transpose(1, 2)
            else:
                rows = torch.arange(len(self.lengths), device=fresh.device)[:, None]
                kept[rows, :, index] = fresh
        self.lengths = [a + b for a, b in zip(self.lengths, places.counts, strict=True)]
        return kept_keys[:, :, :width], kept_values[:, :, :width]

    def in_use(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values (rows, kv_heads, slots in use, head_dim), views of the buffers."""
        if self.keys is None or self.values is None:
            return None, None
        width = self._slots_in_use()
        return self.keys[:, :, :width], self.values[:, :, :width]

    def _slots_in_use(self) -> int:
        """Of the fullest row."""
        return max((a - b for a, b in zip(self.lengths, self.dropped, strict=True)), default=0)

    def _drop(self, window: int, new: int) -> None:
        """Move the rows' last tokens to the front once twice as many are there as are needed."""
        needed = window + KEPT
        if self.keys is None or self.values is None or self._slots_in_use() + new <= 2 * needed:
            return
        starts = [max(d, n - needed) for d, n in zip(self.dropped, self.lengths, strict=True)]
        shift = [a - b for a, b in zip(starts, self.dropped, strict=True)]
        self.dropped = starts
        device = self.keys.device
        slots = torch.tensor(shift, device=device)[:, None] + torch.arange(needed, device=device)
        slots = slots.clamp(max=self.keys.shape[2] - 1)
        rows = torch.arange(len(slots), device=device)[:, None]
        self.keys, self.values = (
            t[rows, :, slots].transpose(1, 2) for t in (self.keys, self.values)
        )

    def _room(self, kept: Tensor | None, fresh: Tensor, width: int) -> Tensor:
        """`kept`, or a larger copy of it, with a slot for every row and at least `width` tokens."""
        rows = len(self.lengths)
        if kept is not None and kept.shape[0] >= rows and kept.shape[2] >= width:
            return kept
        old = 0 if kept is None else kept.shape[2]
        # Doubling keeps the copies of a growing row at two per token.
        capacity = old if old >= width else max(-(-width // 64) * 64, 2 * old)
        _, _, heads, head_dim = fresh.shape
        dtype = fresh.dtype if kept is None else kept.dtype
        larger = torch.zeros(rows, heads, capacity, head_dim, dtype=dtype, device=fresh.device)
        if kept is not None:
            larger[: kept.shape[0], :, :old] = kept
        return larger

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop each row's last tokens: the pointer moves, nothing is copied."""
        lengths = [a - b for a, b in zip(self.lengths, counts, strict=True)]
        if min(counts, default=0) < 0 or min(lengths, default=0) < 0:
            raise ValueError(f"rollback of {list(counts)} tokens from rows of {self.lengths}")
        if self.window is not None:
            for length, dropped in zip(lengths, self.dropped, strict=True):
                if dropped and length - dropped < self.window - 1:
                    raise ValueError(
                        f"rollback of {list(counts)} tokens: of layers with a window the last "
                        f"{self.window + KEPT} tokens of a row are kept"
                    )
        self.lengths = lengths

    def admit(self, row: int, source: LayerCache | None, source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row."""
        if row == len(self.lengths):
            self.lengths.append(0)
            self.dropped.append(0)
        assert self.lengths[row] == 0, "a row is admitted to a free slot"
        if source is None or not source.lengths[source_row]:
            return
        assert isinstance(source, KeyValues)
        length = source.lengths[source_row] - source.dropped[source_row]
        assert source.keys is not None and source.values is not None
        like = source.keys[:1].transpose(1, 2)
        self.keys = self._room(self.keys, like, length)
        self.values = self._room(self.values, source.values[:1].transpose(1, 2), length)
        self.keys[row, :, :length] = source.keys[source_row, :, :length].to(self.keys.dtype)
        self.values[row, :, :length] = source.values[source_row, :, :length].to(self.values.dtype)
        self.lengths[row] = source.lengths[source_row]
        self.dropped[row] = source.dropped[source_row]

    def release(self, row: int) -> None:
        """Empty a row; its memory stays for the next sequence."""
        self.lengths[row] = self.dropped[row] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search)."""
        if self.keys is not None and self.values is not None:
            index = torch.tensor(list(rows), device=self.keys.device, dtype=torch.long)
            self.keys = self.keys.index_select(0, index)
            self.values = self.values.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.dropped = [self.dropped[row] for row in rows]

    def clear(self) -> None:
        """Forget every row, memory included."""
        self.keys = self.values = None
        self.lengths, self.dropped = [], []


class RaggedCache:
    """The layers' caches under one set of verbs; a number stands for layers of keys and values."""

    def __init__(self, layers: int | Sequence[LayerCache]) -> None:
        if isinstance(layers, int):
            layers = [KeyValues() for _ in range(layers)]
        self.layers = list(layers)
        self.free: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row."""
        return self.layers[0].lengths

    def places(
        self, rows: int, new: int, device: torch.device, real: Tensor | None = None
    ) -> Places:
        """Where `new` tokens a row go; an empty cache takes in `rows` rows first.

        Released rows take part in the pass but hold nothing afterwards. The layers' `append` with
        these places makes the rows longer.
        """
        if not self.lengths:
            for _ in range(rows):
                self.admit()
        if rows != len(self.lengths):
            raise ValueError(f"a batch of {rows} rows for a cache of {len(self.lengths)}")
        if self.free:
            real = torch.ones(rows, new, dtype=torch.bool, device=device) if real is None else real
            real = real.clone()
            real[self.free] = False
        return find_places(self.lengths, new, device, real)

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop each row's last tokens (rejected drafts)."""
        for layer in self.layers:
            layer.rollback(counts)

    def admit(self, source: "RaggedCache | None" = None, source_row: int = 0) -> int:
        """Give a free row, or a new one, to a sequence; return its number.

        With `source`, a cache in which the prompt was run, the row starts as a copy of that row.
        """
        row = self.free.pop(0) if self.free else len(self.lengths)
        for number, layer in enumerate(self.layers):
            layer.admit(row, None if source is None else source.layers[number], source_row)
        return row

    def release(self, row: int) -> None:
        """Free a row whose sequence has ended."""
        if row in self.free or not 0 <= row < len(self.lengths):
            raise ValueError(f"row {row} is not in use")
        self.free.append(row)
        self.free.sort()
        for layer in self.layers:
            layer.release(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search)."""
        self.free = [new for new, old in enumerate(rows) if old in self.free]
        for layer in self.layers:
            layer.select(rows)
