"""What decoding carries for softmax attention: keys and values, each row's at its own length.

Buffers are (rows, kv_heads, capacity, head_dim). The slot of a token is its position in the row; in
a window, less what was dropped of the row's beginning. cache.py says what the verbs promise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmnorm.nn.layer_cache import (
    KEPT,
    PADDING,
    LayerCache,
    check_places,
    lengths_after_rollback,
    rounded,
)
from llmnorm.nn.places import Places, on_device


class KeyValues:
    """One attention layer's keys and values.

    With a `window`, tokens that no later query can see are dropped now and then, of each row by
    itself; `dropped` counts them. The last window + KEPT tokens stay, so that KEPT tokens can be
    rolled back and memory does not grow with the row.

    Args:
        window: tokens that a query sees, itself included; None: all.
        heads: heads of keys and values, which `reserve` has to know, as it has `head_dim`.
        head_dim: see there.
    """

    def __init__(
        self, window: int | None = None, *, heads: int | None = None, head_dim: int | None = None
    ) -> None:
        self.window, self.heads, self.head_dim = window, heads, head_dim
        self._needed = KEPT + (window or 0)  # tokens that stay when some are dropped
        self.clear()

    def clear(self) -> None:
        """Forget every row, and give up the buffers."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: list[int] = []
        self.dropped: list[int] = []
        self.reserved = False
        # Slots in front of each row that may hold something, which `release` zeroes.
        self._written: list[int] = []

    def reserve(
        self, rows: int, tokens: int, padding: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Make both buffers, for rows of up to `tokens` tokens; return their bytes.

        Raises:
            ValueError: the heads are not known.
        """
        if self.heads is None or self.head_dim is None:
            raise ValueError("reserve: a layer was made without heads and head_dim (KeyValues)")
        if self.window is not None:
            tokens = min(tokens, 2 * self._needed)
        shape = rows, self.heads, rounded(tokens + padding), self.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        self.reserved = True
        return 2 * self.keys.numel() * self.keys.element_size()

    def append(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Write new tokens (rows, new, kv_heads, head_dim); return all keys and values.

        The result is two views (rows, kv_heads, width, head_dim). Gradients do not flow through the
        cache; writes are cast to the dtype of the first ones.

        Raises:
            ValueError: the places are for rows of other lengths (`check_places`).
        """
        check_places(self, places)
        width = self.width(places)
        kept_keys = self._room(self.keys, keys, width)
        kept_values = self._room(self.values, values, width)
        self.keys, self.values = kept_keys, kept_values
        rows, start, new = len(places.lengths), places.start, places.new
        dropped = places.dropped(self.window)
        for kept, fresh in ((kept_keys, keys), (kept_values, values)):
            fresh = fresh.detach().to(kept.dtype)
            if start is not None and dropped is None:
                kept[:rows, :, start : start + new] = fresh.transpose(1, 2)
            else:
                kept[places.rows, :, places.slots(self.window)] = fresh
        self.extend(places)
        return kept_keys[:rows, :, :width], kept_values[:rows, :, :width]

    def buffers(self, places: Places) -> tuple[Tensor, Tensor]:
        """Both buffers (rows or more, kv_heads, width or more, head_dim), with room for a pass.

        The caller writes there what `append` would, and then calls `extend`. Some row holds tokens,
        and the places are from `RaggedCache.places`, which has looked at the rows' lengths.
        """
        assert self.keys is not None and self.values is not None
        width = self.width(places)
        if len(self.keys) < len(self.lengths) or self.keys.shape[2] < width:
            self.keys = self._room(self.keys, self.keys[:1].transpose(1, 2), width)
            self.values = self._room(self.values, self.values[:1].transpose(1, 2), width)
        return self.keys, self.values

    def extend(self, places: Places) -> None:
        """Count a pass's tokens, whose keys and values are written: the host's part of `append`.

        Who runs a captured graph calls it: the graph writes to the buffers and knows no lengths.
        """
        new = places.new
        for row, count in enumerate(places.counts):
            written = self.lengths[row] - self.dropped[row] + new
            self._written[row] = max(self._written[row], written)
            self.lengths[row] += count

    def mask(self, places: Places, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a pass's queries; None: nothing (Places.mask)."""
        return places.mask(dtype, self.window, self.width(places))

    def product_mask(
        self, places: Places, dtype: torch.dtype, heads: tuple[int, int]
    ) -> Tensor | None:
        """The same for scores that are made of a product for each head (Places.product_mask)."""
        return places.product_mask(dtype, self.window, self.width(places), heads)

    def width(self, places: Places) -> int:
        """Slots to attend over in a pass."""
        if self.window is None:
            return places.width
        used = zip(places.lengths, self.dropped, strict=False)
        width = max((a - b for a, b in used), default=0) + places.new
        if not places.fixed:
            return width
        reserved = self.keys.shape[2] if self.reserved and self.keys is not None else None
        return max(width, min(places.width, reserved or rounded(2 * self._needed + PADDING)))

    def in_use(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values (rows, kv_heads, slots in use, head_dim), views of the buffers."""
        if self.keys is None or self.values is None:
            return None, None
        rows = len(self.lengths)
        width = max((a - b for a, b in zip(self.lengths, self.dropped, strict=True)), default=0)
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def make_room(self, rows: int, new: int) -> None:
        """Before a pass of the first rows: drop what no query of a window can see.

        A row whose slots would be more than twice what it needs moves its last tokens to the front.
        """
        if self.window is None or self.keys is None or self.values is None:
            return
        for row in range(rows):
            used = self.lengths[row] - self.dropped[row]
            if used + new <= 2 * self._needed or used <= self._needed:
                continue
            start = used - self._needed
            for kept in (self.keys, self.values):
                kept[row, :, : self._needed] = kept[row, :, start:used].clone()
            self.dropped[row] += start

    def check_room(self, rows: int, new: int) -> None:
        """Refuse a pass that the reserved buffers of a window have no room for, and drop nothing.

        Raises:
            ValueError: says how many tokens there is room for.
        """
        if self.window is None or self.keys is None or not self.reserved:
            return
        used = [a - b for a, b in zip(self.lengths[:rows], self.dropped, strict=False)]
        left = [min(n, self._needed) if n + new > 2 * self._needed else n for n in used]
        most = max(left, default=0)
        if most + new > self.keys.shape[2]:
            raise ValueError(
                f"a pass of {new} tokens: layers with a window of {self.window} have reserved room "
                f"for {self.keys.shape[2] - most}; run a prompt in parts, or in a cache of its own "
                "from which the row is admitted"
            )

    def _room(self, kept: Tensor | None, fresh: Tensor, width: int) -> Tensor:
        """`kept`, or a larger copy of it, with a slot for every row and at least `width` tokens."""
        rows = len(self.lengths)
        if kept is not None and kept.shape[0] >= rows and kept.shape[2] >= width:
            return kept
        assert not self.reserved, "RaggedCache refuses what does not fit"
        old = 0 if kept is None else kept.shape[2]
        # Doubling keeps the copies of a growing row at two per token.
        capacity = old if old >= width else max(rounded(width), 2 * old)
        _, _, heads, head_dim = fresh.shape
        dtype = fresh.dtype if kept is None else kept.dtype
        larger = torch.zeros(rows, heads, capacity, head_dim, dtype=dtype, device=fresh.device)
        if kept is not None:
            larger[: kept.shape[0], :, :old] = kept
        return larger

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse more tokens than a row has, or than a window keeps of it.

        Raises:
            ValueError: says which.
        """
        lengths = lengths_after_rollback(self.lengths, counts)
        if self.window is not None:
            for length, dropped in zip(lengths, self.dropped, strict=True):
                if dropped and length - dropped < self.window - 1:
                    raise ValueError(
                        f"rollback of {list(counts)} tokens: of layers with a window the last "
                        f"{self.window + KEPT} tokens of a row are kept"
                    )

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of the first rows: the pointer moves, nothing is copied.

        Raises:
            ValueError: `check_rollback`.
        """
        self.check_rollback(counts)
        self.lengths = lengths_after_rollback(self.lengths, counts)

    def admit(self, row: int, source: LayerCache | None, source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row."""
        if row == len(self.lengths):
            self.lengths.append(0)
            self.dropped.append(0)
            self._written.append(0)
        assert self.lengths[row] == 0, "a row is admitted to a free slot"
        self._wipe(row)  # of padding of passes since its release
        if source is None or not source.lengths[source_row]:
            return
        assert isinstance(source, KeyValues) and source.window == self.window
        length, dropped = source.lengths[source_row], source.dropped[source_row]
        if self.window is not None and length - dropped > 2 * self._needed:
            dropped = length - self._needed
        first, used = dropped - source.dropped[source_row], length - dropped
        assert source.keys is not None and source.values is not None
        like = source.keys[:1].transpose(1, 2)
        self.keys = self._room(self.keys, like, used)
        self.values = self._room(self.values, like, used)
        for kept, theirs in ((self.keys, source.keys), (self.values, source.values)):
            kept[row, :, :used] = theirs[source_row, :, first : first + used].to(kept.dtype)
        self.lengths[row], self.dropped[row], self._written[row] = length, dropped, used

    def release(self, row: int) -> None:
        """Empty a row, and zero its slots; its memory stays for the next sequence."""
        self.lengths[row] = self.dropped[row] = 0
        self._wipe(row)

    def _wipe(self, row: int) -> None:
        for kept in (self.keys, self.values):
            if kept is not None and self._written[row]:
                kept[row, :, : self._written[row]] = 0
        self._written[row] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search)."""
        if self.keys is not None and self.values is not None:
            index = on_device(list(rows), self.keys.device)
            if self.reserved:
                width = max(self._written, default=0)
                for kept in (self.keys, self.values):
                    kept[: len(rows), :, :width] = kept[:, :, :width].index_select(0, index)
                    kept[len(rows) : len(self.lengths), :, :width] = 0
            else:
                like, width = self.keys[:1].transpose(1, 2), self.keys.shape[2]
                self.keys = self._room(self.keys, like, width).index_select(0, index)
                self.values = self._room(self.values, like, width).index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.dropped = [self.dropped[row] for row in rows]
        self._written = [self._written[row] for row in rows]
