"""Where the new tokens of a pass with a cache go, and what they see: made once, used by all layers.

A row's padding stands behind its real tokens, and how many are real is told by numbers from the
host: rows of length 5 and 2, 3 new tokens each, counts [3, 2] -> index [[5, 6, 7], [2, 3, 4]], of
which the last of the second row is padding. The next pass overwrites it.

Shapes: index and real (rows, new), masks (rows or 1, 1, new, width). Rows are the first ones of the
cache, as many as the pass has.

Surprise: with a `width` of the caller's nothing is simplified for rows of one length, so that no
number of this pass stands in a captured graph. All that differs between two passes is then in
`numbers` and in the shapes of tensors; what is made of them, the graph makes again for itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where one forward pass's new tokens go; made once a pass, used by every layer.

    The tensors are made when the first layer asks for them.
    """

    lengths: list[int]
    """Tokens of each row before this pass."""
    counts: list[int]
    """Real new tokens of each row; padding stands behind them."""
    new: int
    """New tokens of each row, padding included."""
    numbers: Tensor
    """(2 + windows, rows) int64 on the device: lengths, counts, and tokens that the layers of each
    window have dropped of the rows' beginnings."""
    start: int | None
    """Where all rows start if they are of one length and without padding, else None."""
    width: int
    """Slots to attend over: at least the longest row after this pass, padding included."""
    padded: bool = False
    """Whether some new tokens may be padding."""
    windows: Mapping[int, int | None] = field(default_factory=dict)
    """For each window of the cache's layers, which of `numbers` it is; None: nothing is dropped."""
    fixed: bool = False
    """Whether the caller gave the width: no shape may then depend on the rows' lengths."""
    _made: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def fills_empty_rows(self) -> bool:
        """Whether all rows are empty: attention is plain and causal then, as padding is behind."""
        return not self.fixed and not any(self.lengths)

    @property
    def index(self) -> Tensor:
        """(rows, new), the position of every new token: the row's length and those before it."""
        return self._once("index", lambda: self.numbers[0].unsqueeze(1) + self._behind())

    @property
    def counted(self) -> Tensor:
        """(rows,) int64, `counts` on the device."""
        return self.numbers[1]

    @property
    def real(self) -> Tensor | None:
        """(rows, new), False for padding; None: all are real."""
        if not self.padded:
            return None
        return self._once("real", lambda: self._behind() < self.counted[:, None])

    @property
    def padding(self) -> Tensor | None:
        """(rows, new), True for padding; None: all are real."""
        real = self.real
        return None if real is None else self._once("padding", lambda: ~real)

    @property
    def seen(self) -> Tensor:
        """(rows, new), how many tokens each one sees, itself included."""
        return self._once("seen", lambda: self.index + 1)

    def _behind(self) -> Tensor:
        return self._once("behind", lambda: torch.arange(self.new, device=self.numbers.device))

    def dropped(self, window: int | None) -> Tensor | None:
        """(rows,), by which a token's slot is less than its position in layers of this window;
        None: by nothing."""
        number = None if window is None else self.windows[window]
        return None if number is None else self.numbers[number]

    def last(self, width: int) -> Tensor:
        """(rows width,), where each row's last `width` real tokens stand, among its new tokens with
        `width` earlier ones in front, all rows laid end to end.

        width 3, 2 new tokens, counts [2, 1] -> [2, 3, 4, 6, 7, 8].
        """

        def make() -> Tensor:
            among = self.counted[:, None] + torch.arange(width, device=self.numbers.device)
            return (among + self.rows * (width + self.new)).flatten()

        return self._once(("last", width), make)

    @property
    def rows(self) -> Tensor:
        """(rows, 1), the rows' numbers."""
        rows, device = self.numbers.shape[1], self.numbers.device
        return self._once("rows", lambda: torch.arange(rows, device=device)[:, None])

    def slots(self, window: int | None = None) -> Tensor:
        """(rows, new), the slot of every new token in layers of this window."""
        dropped = self.dropped(window)
        if dropped is None:
            return self.index
        return self._once(("slots", window), lambda: self.index - dropped[:, None])

    def ring(self, size: int) -> Tensor:
        """(rows new,), the slots of all new tokens in rings of `size` slots, one a row, end to end.

        A ring is followed by a slot for padding, which is not read (recurrent_cache.py).
        """

        def make() -> Tensor:
            slots = self.index % size
            if self.padding is not None:
                slots = slots.masked_fill(self.padding, size)
            return (slots + self.rows * (size + 1)).flatten()

        return self._once(("ring", size), make)

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
        dropped = self.dropped(window)
        equal = self.start is not None and dropped is None
        if equal and self.new == 1 and (window is None or width <= window):
            return None

        def make() -> Tensor:
            index = (self.index[:1] if equal else self.index)[..., None]
            position = self._made.get(("columns", window))
            if position is None:
                position = torch.arange(width, device=index.device)
            if dropped is not None:
                position = (position + dropped[:, None]).unsqueeze(1)
            hidden = position > index
            if window is not None:
                hidden = hidden | (position <= index - window)
            visible = torch.zeros((), dtype=dtype, device=index.device)
            return visible.masked_fill(hidden, -torch.inf).unsqueeze(1)

        return self._once((dtype, window, width), make)

    def product_mask(
        self,
        dtype: torch.dtype,
        window: int | None,
        width: int | None,
        heads: tuple[int, int],
    ) -> Tensor | None:
        """`mask` for scores (rows kv_heads, group new, width), with rows kv_heads or 1 in front.

        `heads`: of keys, and of queries for each of them.
        """
        mask = self.mask(dtype, window, width)
        if mask is None:
            return None
        kv_heads, group = heads

        def make() -> Tensor:
            of_group = (
                mask.expand(-1, group, -1, -1).flatten(1, 2) if group > 1 else mask.squeeze(1)
            )
            return of_group if mask.shape[0] == 1 else of_group.repeat_interleave(kv_heads, 0)

        return self._once((dtype, window, width, heads), make)

    def with_columns(self, columns: Mapping[int | None, Tensor]) -> "Places":
        """These places, with (width,) numbers from 0 for layers of each window.

        For a graph that is being captured: they are inputs of it, whose shapes are the widths.
        """
        self._made.update({("columns", window): given for window, given in columns.items()})
        return self

    def columns(self, window: int | None) -> Tensor:
        """(width,), as they were given."""
        return self._made["columns", window]

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
        ValueError: `check_pass`.
    """
    lengths = list(lengths)
    counts = [new] * len(lengths) if counts is None else list(counts)
    needed, fixed = check_pass(lengths, new, counts, width), width is not None
    dropped = {} if dropped is None else dropped
    numbers = on_device([lengths, counts, *dropped.values()], device)  # one copy for all of them
    windows = {
        window: 2 + number if fixed or any(some) else None
        for number, (window, some) in enumerate(dropped.items())
    }
    padded = fixed or any(count < new for count in counts)
    start = lengths[0] if not padded and len(set(lengths)) == 1 else None
    width = needed if width is None else width
    return Places(lengths, counts, new, numbers, start, width, padded, windows, fixed)


def check_pass(
    lengths: Sequence[int], new: int, counts: Sequence[int], width: int | None = None
) -> int:
    """The slots that a pass needs: the longest row and the new tokens.

    Raises:
        ValueError: counts of other rows, or beyond the new tokens; a width that is too small.
    """
    rows, needed = len(lengths), max(lengths, default=0) + new
    if len(counts) != rows or not all(0 <= count <= new for count in counts):
        raise ValueError(
            f"counts: must have the real ones of {new} new tokens for each of {rows} rows, got "
            f"{list(counts)}"
        )
    if width is not None and width < needed:
        raise ValueError(
            f"width: must be at least {needed}, the longest row and {new} new tokens, got {width}"
        )
    return needed


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers of the host as int64, without waiting for what the device still has to do."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
