"""What decoding carries for a recurrent mixer: a state of constant size, and a few tokens' inputs.

A state is a tuple of tensors (rows, ...), all zeros for an empty row; the inputs of a pass are a
tuple of tensors (rows, new, ...). The mixer gives `advance(state, inputs, counts)`, a pure function
that returns the state after each row's first `counts` inputs. An input of zeros leaves a state as
it is, so the inputs behind those are set to zero.

A state cannot be cut back, so a rollback is a replay: an earlier state is kept together with the
inputs since, and those that stay are run again from it. At least the last KEPT tokens of every row
can be rolled back, and at most about twice as many are kept, so that memory does not grow with the
row. After `admit`, `release` and `select` nothing before them can be rolled back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmnorm.nn.layer_cache import KEPT, LayerCache, check_places, lengths_after_rollback
from llmnorm.nn.places import Places

State = tuple[Tensor, ...]
Inputs = tuple[Tensor, ...]
Advance = Callable[[State | None, Inputs, Tensor], State]


class _Stage:
    """A state, and the blocks of inputs (and how many of each row's are real) that came after."""

    def __init__(self, state: State | None) -> None:
        self.state = state
        self.blocks: list[tuple[Inputs, Tensor]] = []

    def width(self) -> int:
        return sum(inputs[0].shape[1] for inputs, _ in self.blocks)


class RecurrentCache:
    """One recurrent layer's states."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.lengths: list[int] = []
        self.state: State | None = None
        self._stages = [_Stage(None)]

    def clear(self) -> None:
        """Forget every row."""
        self.lengths, self.state, self._stages = [], None, [_Stage(None)]

    def reserve(
        self, rows: int, tokens: int, padding: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Refused: a recurrent layer's buffers grow as they are needed.

        Raises:
            ValueError: always.
        """
        raise ValueError("reserve: layers with a recurrent state do not know its shape beforehand")

    def before(self, places: Places) -> State | None:
        """The state of a pass's rows before it."""
        return None if self.state is None else tuple(t[: len(places.lengths)] for t in self.state)

    def append(self, inputs: Inputs, state: State, places: Places) -> None:
        """Take in a pass: its inputs, and the state after them, which the mixer has computed.

        Raises:
            ValueError: the places are for rows of other lengths (`check_places`).
        """
        check_places(self, places)
        inputs, rest = tuple(t.detach() for t in inputs), len(self.lengths) - len(places.lengths)
        if rest:  # rows behind those of the pass, which get no token
            inputs = tuple(torch.cat((t, t.new_zeros(rest, *t.shape[1:]))) for t in inputs)
            after = self.state or tuple(t.new_zeros(len(t) + rest, *t.shape[1:]) for t in state)
            state = tuple(torch.cat((t, a[len(t) :])) for t, a in zip(state, after, strict=True))
        new, counts = inputs[0].shape[1], _counts([*places.counts, *[0] * rest], inputs[0])
        if new > 2 * KEPT:
            passed = (counts - KEPT).clamp(min=0)
            start = self.advance(self.state, _take(inputs, 0 * passed, passed, new), passed)
            self._stages = [_Stage(start)]
            inputs, counts = _take(inputs, passed, counts - passed, KEPT), counts - passed
        elif self._stages[-1].width() >= KEPT:
            self._stages = [self._stages[-1], _Stage(self.state)]
        self._stages[-1].blocks.append((inputs, counts))
        self.state = tuple(t.detach() for t in state)
        counted = [*places.counts, *[0] * rest]
        self.lengths = [a + b for a, b in zip(self.lengths, counted, strict=True)]

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse more tokens than a row has, or than are kept.

        Raises:
            ValueError: says which.
        """
        lengths_after_rollback(self.lengths, counts)
        kept = [0] * len(self.lengths)
        for _, real in (block for stage in self._stages for block in stage.blocks):
            kept = [a + b for a, b in zip(kept, real.tolist(), strict=True)]
        if any(count > have for count, have in zip(counts, kept, strict=False)):
            raise ValueError(
                f"rollback of {list(counts)} tokens: of recurrent layers the last {kept} "
                "tokens of the rows are kept"
            )

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop each row's last tokens: the accepted inputs are replayed from the kept state.

        Raises:
            ValueError: more tokens than a row has, or than are kept.
        """
        self.check_rollback(counts)
        lengths = lengths_after_rollback(self.lengths, counts)
        counts = [a - b for a, b in zip(self.lengths, lengths, strict=True)]
        if not any(counts):
            return
        blocks = [block for stage in self._stages for block in stage.blocks]
        assert self.state is not None, "rows without a token were refused above"
        kept = _counts([0] * len(counts), self.state[0])
        for _, real in blocks:
            kept = kept + real
        inputs = tuple(torch.cat(parts, 1) for parts in zip(*(b for b, _ in blocks), strict=True))
        real = torch.cat([_mask(n, b[0].shape[1]) for b, n in blocks], 1)
        order = (~real).long().argsort(dim=1, stable=True)
        rows = torch.arange(len(order), device=order.device)[:, None]
        inputs = tuple(t[rows, order] for t in inputs)
        accepted = kept - _counts(counts, kept)
        inputs = _take(inputs, 0 * accepted, accepted, max(1, int(accepted.max())))
        start = self._stages[0].state
        state, now = self.advance(start, inputs, accepted), self.state
        changed = _counts(counts, now[0]) > 0
        self.state = tuple(
            torch.where(changed.view(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(state, now, strict=True)
        )
        self._stages = [_Stage(start)]
        self._stages[0].blocks.append((inputs, accepted))
        self.lengths = lengths

    def admit(self, row: int, source: LayerCache | None, source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row."""
        if row == len(self.lengths):
            self.lengths.append(0)
        assert self.lengths[row] == 0, "a row is admitted to a free slot"
        length, state = 0, None
        if source is not None:
            assert isinstance(source, RecurrentCache)
            length, state = source.lengths[source_row], source.state
        like = self.state if self.state is not None else state
        if like is None:
            return
        rows = tuple(t.new_zeros(len(self.lengths), *t.shape[1:]) for t in like)
        for kept, old in zip(rows, self.state or (), strict=False):
            kept[: len(old)] = old
        if length and state is not None:
            for kept, fresh in zip(rows, state, strict=True):
                kept[row] = fresh[source_row]
        self.lengths[row] = length
        self._begin(rows)

    def release(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = 0
        if self.state is not None:
            state = tuple(t.clone() for t in self.state)
            for kept in state:
                kept[row] = 0
            self._begin(state)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search)."""
        self.lengths = [self.lengths[row] for row in rows]
        if self.state is not None:
            index = torch.tensor(list(rows), device=self.state[0].device, dtype=torch.long)
            self._begin(tuple(t.index_select(0, index) for t in self.state))

    def _begin(self, state: State) -> None:
        self.state, self._stages = state, [_Stage(state)]


def part(state: State | None, index: int) -> Tensor | None:
    """One tensor of a state, if there is a state yet."""
    return None if state is None else state[index]


def last_inputs(window: Tensor | None, inputs: Tensor, counts: Tensor, width: int) -> Tensor:
    """The last `width` inputs of every row, (rows, width, ...), zeros where it has had fewer.

    `window` (rows, width, ...) are those before `inputs` (rows, new, ...), of which the first
    `counts` are real. What a convolution over time carries.
    """
    if window is None:
        window = inputs.new_zeros(len(inputs), width, *inputs.shape[2:])
    return _take((torch.cat((window, inputs), 1),), counts, 0 * counts + width, width)[0]


def _take(inputs: Inputs, start: Tensor, counts: Tensor, width: int) -> Inputs:
    """`counts` inputs of every row from `start` on, as (rows, width, ...), zeros behind them."""
    device = inputs[0].device
    index = start.to(device)[:, None] + torch.arange(width, device=device)
    index = index.clamp(max=inputs[0].shape[1] - 1)
    rows = torch.arange(len(index), device=device)[:, None]
    empty = ~_mask(counts.to(device), width)
    return tuple(
        t[rows, index].masked_fill(empty.view(*empty.shape, *[1] * (t.ndim - 2)), 0) for t in inputs
    )


def _mask(counts: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]


def _counts(counts: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(counts), dtype=torch.long, device=like.device)
