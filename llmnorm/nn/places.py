"""Where the new tokens of a pass with a cache go, and what they see: made once, used by all layers.

A row's padding stands behind its real tokens, and how many are real is told by numbers from the
host: rows of length 5 and 2, 3 new tokens each, counts [3, 2] -> index [[5, 6, 7], [2, 3, 4]], of
which the last of the second row is padding. The next pass overwrites it.

Shapes: index and real (rows, new), masks (rows or 1, 1, new, width). Rows are the first ones of the
cache, as many as the pass has.

Surprise: with a `width` of the caller's nothing is simplified for rows of one length, so that no
number of this pass stands in a captured graph; all that differs between two passes is in tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where one forward pass's new tokens go; made once a pass, used by every layer."""

    lengths: list[int]
    """Tokens of each row before this pass."""
    counts: list[int]
    """Real new tokens of each row; padding stands behind them."""
    index: Tensor
    """(rows, new) position of every new token: the row's length and those before it."""
    counted: Tensor
    """(rows,) int64, `counts` on the device."""
    start: int | None
    """Where all rows start if they are of one length and without padding, else None."""
    width: int
    """Slots to attend over: at least the longest row after this pass, padding included."""
    real: Tensor | None = None
    """(rows, new), False for padding; None: all are real."""
    dropped: Mapping[int, Tensor | None] = field(default_factory=dict)
    """For each window of the cache's layers, (rows,) tokens that they have dropped of the rows'
    beginnings, by which a token's slot is less than its position; None: no tokens."""
    fixed: bool = False
    """Whether the caller gave the width: no shape may then depend on the rows' lengths."""
    _made: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def fills_empty_rows(self) -> bool:
        """Whether all rows are empty: attention is plain and causal then, as padding is behind."""
        return not self.fixed and not any(self.lengths)

    def last(self, width: int) -> Tensor:
        """(rows width,), where each row's last `width` real tokens stand, among its new tokens with
        `width` earlier ones in front, all rows laid end to end.

        width 3, 2 new tokens, counts [2, 1] -> [2, 3, 4, 6, 7, 8].
        """

        def make() -> Tensor:
            among = self.counted[:, None] + torch.arange(width, device=self.index.device)
            return (among + self.rows * (width + self.index.shape[1])).flatten()

        return self._once(("last", width), make)

    @property
    def rows(self) -> Tensor:
        """(rows, 1), the rows' numbers."""
        rows, device = self.index.shape[0], self.index.device
        return self._once("rows", lambda: torch.arange(rows, device=device)[:, None])

    def slots(self, window: int | None = None) -> Tensor:
        """(rows, new), the slot of every new token in layers of this window."""
        dropped = None if window is None else self.dropped[window]
        if dropped is None:
            return self.index
        return self._once(("slots", window), lambda: self.index - dropped[:, None])

    def mask(
        self, dtype: torch.dtype, window: int | None = None, width: int | None = None
    ) -> Tensor | None:
        """(rows or 1, 1, new, width), 0 where a query may look and -inf elsewhere, to be added.

        None: each query may look at all slots, or at all before it (`fills_empty_rows`). Of layers
        with a window, `width` is the number of slots that they have in use, if it is not that of
        the others.
        """
        if self.fills_empty_rows:
            return None
        width = self.width if width is None else width
        dropped = None if window is None else self.dropped[window]
        equal = self.start is not None and dropped is None
        if equal and self.index.shape[1] == 1 and (window is None or width <= window):
            return None

        def make() -> Tensor:
            index = (self.index[:1] if equal else self.index)[..., None]
            position = torch.arange(width, device=index.device)
            if dropped is not None:
                position = (position + dropped[:, None]).unsqueeze(1)
            hidden = position > index
            if window is not None:
                hidden = hidden | (position <= index - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=index.device)
            return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)

        return self._once((dtype, window, width), make)

    def _once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes, made by the first layer that asks for it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def find_places(
    lengths: Sequence[int],
    new: int,
    device: torch.device,
    counts: Sequence[int] | None = None,
    width: int | None = None,
    dropped: Mapping[int, Sequence[int]] | None = None,
) -> Places:
    """Where `new` more tokens go in rows of `lengths`.

    Args:
        counts: the real ones of each row; all if None.
        width: slots to attend over, where that must not follow from the lengths.
        dropped: for each window, tokens dropped of the rows' beginnings.

    Raises:
        ValueError: counts of other rows, or beyond the new tokens; a width that is too small.
    """
    lengths, rows = list(lengths), len(lengths)
    counts = [new] * rows if counts is None else list(counts)
    if len(counts) != rows or not all(0 <= count <= new for count in counts):
        raise ValueError(
            f"counts: must have the real ones of {new} new tokens for each of {rows} rows, got "
            f"{counts}"
        )
    needed, fixed = max(lengths, default=0) + new, width is not None
    if width is None:
        width = needed
    elif width < needed:
        raise ValueError(
            f"width: must be at least {needed}, the longest row and {new} new tokens, got {width}"
        )
    dropped = {} if dropped is None else dropped
    # One copy to the device for all numbers of the pass.
    numbers = torch.tensor([lengths, counts, *dropped.values()], dtype=torch.long, device=device)
    beginnings = {
        window: numbers[2 + number] if fixed or any(some) else None
        for number, (window, some) in enumerate(dropped.items())
    }
    behind = torch.arange(new, device=device)
    index, counted, start, real = numbers[0][:, None] + behind, numbers[1], None, None
    if fixed or any(count < new for count in counts):
        real = behind < counted[:, None]
    elif len(set(lengths)) == 1:
        start = lengths[0]
    return Places(lengths, counts, index, counted, start, width, real, beginnings, fixed)
