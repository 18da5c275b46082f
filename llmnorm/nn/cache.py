"""The ragged slot cache: what decoding carries, for rows with lengths of their own.

A row is a slot. An attention layer keeps keys and values in (rows, kv_heads, capacity, head_dim)
and writes a row's new tokens at the row's own length, so nothing is ever moved or padded; a
recurrent layer keeps a state (recurrent_cache.py). The verbs are the same for every mixer:
`append`, `rollback`, `admit`, `release`, `select`, and `reserve` before the first token.

What the verbs promise: the last KEPT real tokens of a row can be taken back, whatever other rows
do (what a verification brought, and a rollback took away, does not use them up); a pass may take
the first rows only, and the others keep what they hold; after `reserve` nothing grows or moves; a
released row holds nothing that can reach the next one; a verb changes all layers or none.

Invariants: the slot of a token is its position in the row (in a window: less what was dropped of
the row's beginning); a query at position i sees the slots up to its own and nothing else. What lies
beyond a row's length (rejected tokens, padding) is overwritten before a query can see it. It must
be finite all the same, since a mask is added and nan stays nan: buffers start as zeros, and the
slots of a released row are zeroed.

Shapes: new tokens (rows, new, kv_heads, head_dim), as mixers make them; where they go: places.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmnorm.nn.key_values import KeyValues
from llmnorm.nn.layer_cache import (
    KEPT,
    PADDING,
    LayerCache,
    check_lengths,
    check_places,
    rounded,
)
from llmnorm.nn.places import Places, check_pass, find_places

__all__ = ["KEPT", "KeyValues", "LayerCache", "Places", "RaggedCache", "check_places"]


class Reserved(NamedTuple):
    """What a cache has buffers for: rows, tokens of each, and columns of padding behind them."""

    rows: int
    tokens: int
    padding: int


class RaggedCache:
    """The layers' caches under one set of verbs; a number stands for layers of keys and values.

    Every verb looks at all layers before it changes the first one.
    """

    def __init__(self, layers: int | Sequence[LayerCache]) -> None:
        if isinstance(layers, int):
            layers = [KeyValues() for _ in range(layers)]
        self.layers = list(layers)
        self.free: list[int] = []
        self.reserved: Reserved | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row."""
        return self.layers[0].lengths

    def reserve(
        self, rows: int, tokens: int, padding: int, *, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Make all buffers before the first token; return their bytes.

        From then on nothing grows or moves, and what does not fit is refused. Layers with a window
        of w take about 2 (w + KEPT) slots a row: a longer prompt is run in parts, or in a cache of
        its own, from which the row is admitted.

        Args:
            rows: how many may be held at a time.
            tokens: how many a row may hold.
            padding: columns that a pass may have behind a full row, from 0 to PADDING: what a
                verification writes and does not keep.
            dtype: of keys and values.
            device: where they are.

        Raises:
            ValueError: rows are held already, a number is out of range, or a layer does not know
                the shape of what it keeps.
        """
        if self.reserved is not None or any(self.lengths):
            raise ValueError(
                f"reserve: the cache holds rows of {self.lengths} tokens, or buffers already; make "
                "a new cache, or clear this one"
            )
        if rows < max(1, len(self.lengths)) or tokens < 1 or not 0 <= padding <= PADDING:
            raise ValueError(
                f"reserve: {rows} rows of {tokens} tokens and {padding} columns of padding: must "
                f"be at least {max(1, len(self.lengths))}, at least 1, and from 0 to {PADDING}"
            )
        try:
            size = sum(layer.reserve(rows, tokens, padding, dtype, device) for layer in self.layers)
        except Exception:  # out of memory, say: no layer keeps its buffers, and all the empty rows
            count, free = len(self.lengths), self.free
            self.clear()
            for _ in range(count):
                self.admit()
            self.free = free
            raise
        self.reserved = Reserved(rows, tokens, padding)
        return size

    def places(
        self,
        rows: int,
        new: int,
        device: torch.device,
        counts: Sequence[int] | None = None,
        width: int | None = None,
    ) -> Places:
        """Where `new` tokens go in each of the first `rows` rows; the others keep what they hold.

        An empty cache takes in the rows first. Released rows among them take part in the pass, and
        hold nothing afterwards. The layers' `append` with these places makes the rows longer.

        Args:
            rows: as many as the cache has, or fewer.
            new: tokens a row, padding included.
            device: of the places.
            counts: how many of them are real, for each row; padding stands behind. All if None.
            width: slots to attend over, if it must not follow from the rows' lengths: a captured
                graph has one width. At least the longest of the rows and `new`.

        Raises:
            ValueError: more rows than there are, other counts, a width that is too small, more than
                was reserved, layers whose rows differ.
        """
        lengths = self.lengths[:rows] if self.lengths else [0] * rows
        if rows != len(lengths):
            raise ValueError(f"a batch of {rows} rows for a cache of {len(lengths)}")
        if counts is None:
            counts = [new] * rows
        if self.free:
            counts = [0 if row in self.free else count for row, count in enumerate(counts)]
        check_pass(lengths, new, counts, width)
        self._check_room(lengths, counts, new, width)
        if not self.lengths:
            for _ in range(rows):
                self.admit()
        windowed = [n for n in self.layers if isinstance(n, KeyValues) and n.window is not None]
        for layer in self.layers:
            check_lengths(layer, lengths)
        for layer in windowed:
            layer.check_room(rows, new)
        for layer in windowed:
            layer.make_room(rows, new)
        dropped = {n.window: n.dropped[:rows] for n in windowed if n.window is not None}
        return find_places(lengths, new, device, counts, width, dropped)

    def _check_room(
        self, lengths: Sequence[int], counts: Sequence[int], new: int, width: int | None
    ) -> None:
        """Refuse a pass that does not fit into what is reserved."""
        if self.reserved is None:
            return
        rows, tokens, padding = self.reserved
        longest = max((a + b for a, b in zip(lengths, counts, strict=False)), default=0)
        end = max(max(lengths, default=0) + new, width or 0)
        if len(lengths) > rows or longest > tokens or end > rounded(tokens + padding):
            raise ValueError(
                f"{new} more tokens in rows of {list(lengths)}, of which {list(counts)} are real: "
                f"{rows} rows of {tokens} tokens and {padding} columns behind them are reserved"
            )

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of the first rows, as many rows as there are counts.

        Raises:
            ValueError: a layer cannot; no layer is changed.
        """
        for layer in self.layers:
            layer.check_rollback(counts)
        for layer in self.layers:
            layer.rollback(counts)

    def admit(self, source: "RaggedCache | None" = None, source_row: int = 0) -> int:
        """Give the first free row, or a new one, to a sequence; return its number.

        With `source`, the row starts as a copy of that row of it, and can be taken back as far. A
        source is a cache in which a prompt was run, or this cache itself: a row behind a gap moves
        into it so, and is released then.

        Raises:
            ValueError: the source has no such row in use, or is of another model; more than was
                reserved.
        """
        row = self.free[0] if self.free else len(self.lengths)
        length = 0 if source is None else self._check_source(source, source_row)
        if self.reserved is not None and (
            row >= self.reserved.rows or length > self.reserved.tokens
        ):
            raise ValueError(
                f"a row of {length} tokens as row {row}: {self.reserved.rows} rows of "
                f"{self.reserved.tokens} tokens are reserved"
            )
        self.free = self.free[1:]
        for number, layer in enumerate(self.layers):
            layer.admit(row, None if source is None else source.layers[number], source_row)
        return row

    def _check_source(self, source: "RaggedCache", row: int) -> int:
        """The tokens of a source's row."""
        if not 0 <= row < len(source.lengths) or row in source.free:
            raise ValueError(f"source_row: row {row} of the source is not in use")
        kinds = [[(type(n), getattr(n, "window", 0)) for n in c.layers] for c in (self, source)]
        if kinds[0] != kinds[1]:
            raise ValueError("source: its layers keep other things than this cache's")
        return source.lengths[row]

    def release(self, row: int) -> None:
        """Free a row whose sequence has ended; what it held is zeroed.

        Raises:
            ValueError: it is not in use.
        """
        if row in self.free or not 0 <= row < len(self.lengths):
            raise ValueError(f"row {row} is not in use")
        self.free = sorted([*self.free, row])
        for layer in self.layers:
            layer.release(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search).

        Raises:
            ValueError: there is no such row, or fewer are reserved.
        """
        known = len(self.lengths)
        if not all(0 <= row < known for row in rows) or (
            self.reserved is not None and len(rows) > self.reserved.rows
        ):
            raise ValueError(f"select of rows {list(rows)} from a cache of {known}")
        self.free = [new for new, old in enumerate(rows) if old in self.free]
        for layer in self.layers:
            layer.select(rows)

    def clear(self) -> None:
        """Forget every row, and give up the buffers."""
        self.free, self.reserved = [], None
        for layer in self.layers:
            layer.clear()
