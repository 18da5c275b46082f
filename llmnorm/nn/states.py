"""Rows of what a recurrent layer carries: states (rows, ...) and inputs (rows, new, ...)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Inputs = tuple[Tensor, ...]


class InputShape(NamedTuple):
    """One tensor of a pass's inputs, (rows, new, *shape)."""

    shape: tuple[int, ...]
    wide: bool
    """Whether it is float32 or wider in a model of any dtype; else it has the model's dtype."""


@dataclass
class RowMarks:
    """Where a row can be replayed from; all in tokens of the row."""

    newer: int = 0
    """At the newer snapshot."""
    older: int = 0
    """At the older one; the same as `newer` if there is one snapshot only."""
    plane: int = 0
    """Which plane holds the newer snapshot; the older is in 1 - plane."""
    began: int | None = None
    """Where the last pass began, if the state before it is kept by reference."""
    place: int = 0
    """The row of that state in that tensor."""


def first_inputs(inputs: Inputs, counts: list[int]) -> Inputs:
    """The first `counts` inputs of every row, (rows, largest count, ...), zeros behind them."""
    width = max(counts)
    inputs = tuple(t[:, :width] for t in inputs)
    if min(counts) == width:
        return inputs
    device = inputs[0].device
    empty = torch.arange(width, device=device) >= as_index(counts, device)[:, None]
    return tuple(t.masked_fill(empty.view(*empty.shape, *[1] * (t.ndim - 2)), 0) for t in inputs)


def rows_of(state: State, rows: list[int]) -> State:
    """These rows of a state: the state itself if they are all of its rows."""
    if not state or rows == list(range(len(state[0]))):
        return state
    index = as_index(rows, state[0].device)
    return tuple(t.index_select(0, index) for t in state)


def copy_rows(source: State, rows: list[int], target: State, places: list[int]) -> None:
    """Write rows of the source to those places of the target."""
    if not rows:
        return
    index = as_index(places, target[0].device)
    # torch refuses writes outside of inference mode to what was made inside.
    with torch.inference_mode(target[0].is_inference()):
        for old, new in zip(rows_of(source, rows), target, strict=True):
            new.index_copy_(0, index, old.to(new))


def owned(state: State) -> State:
    """Without gradient, and not as a view, which would keep alive all that it is a view of."""
    return tuple(
        t.detach() if t.untyped_storage().nbytes() <= t.nbytes else t.detach().clone()
        for t in state
    )


def as_index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers from the host as a tensor that can index one."""
    return torch.tensor(list(numbers), dtype=torch.long, device=device)


def write_inputs(rings: Inputs, inputs: Inputs, slots: Tensor) -> None:
    """Write inputs (rows, new, ...) into rings that are laid end to end, at slots (rows new,)."""
    for kept, fresh in zip(rings, inputs, strict=True):
        kept.index_copy_(0, slots, fresh.flatten(0, 1).to(kept.dtype))


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
    both = torch.cat((window, inputs), 1)
    index = counts.to(both.device)[:, None] + torch.arange(width, device=both.device)
    # The shape and not len(), which a tracer takes for a number that stays.
    return both[torch.arange(both.shape[0], device=both.device)[:, None], index]
