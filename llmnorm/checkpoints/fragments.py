"""Fragments (ZeRO's, of elements) as the rows that a checkpoint holds, and back.

A process writes the rows that begin in its fragment; the end of the last of them, which others
hold, comes from there. Of a tensor of shape (5, 4) over three processes:

    elements   [0, 7)    [7, 14)    [14, 20)
    rows       [0, 2)    [2, 4)     [4, 5)     the first gets element 7, the second 14 and 15

It reads all rows that its fragment touches. Either way its copy is as large as the fragment and,
at most, two rows; nothing larger is ever in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmnorm.checkpoints.format import Interval
from llmnorm.optim.fragments import Fragment

# Gives memory on the CPU for a copy: its name, what it is a copy of, its elements.
Allocate = Callable[[str, Tensor, int], Tensor]
# Fills the second list's tensors of each process with what there is in the first one's for this.
Exchange = Callable[[list[list[Tensor]], list[list[Tensor]]], None]


def begun_rows(
    fragments: Mapping[str, Fragment], allocate: Allocate, exchange: Exchange
) -> dict[str, Interval]:
    """The rows that begin in this process's fragments, copied; every process makes this call.

    Args:
        fragments: of one dtype, under the same names in the same order on every process.
    """
    if not fragments:
        return {}
    world = len(next(iter(fragments.values())).cuts) - 1
    leaving: list[list[Tensor]] = [[] for _ in range(world)]
    arriving: list[list[Tensor]] = [[] for _ in range(world)]
    found = {}
    for name, fragment in fragments.items():
        cuts, rank, columns = fragment.cuts, fragment.rank, _columns(fragment)
        begins = [-(-cut // columns) * columns for cut in cuts]
        first, last = begins[rank], begins[rank + 1]
        copy = allocate(name, fragment, last - first)
        for other in range(world):
            for start, stop in _overlap(cuts, rank, begins, other):
                piece = fragment.detach()[start - cuts[rank] : stop - cuts[rank]]
                if other == rank:
                    copy[start - first : stop - first].copy_(piece)
                else:
                    leaving[other].append(piece.cpu())
            for start, stop in _overlap(cuts, other, begins, rank):
                if other != rank:
                    arriving[other].append(copy[start - first : stop - first])
        found[name] = _interval(fragment, copy, first // columns)
    exchange(leaving, arriving)
    return found


def touched_rows(fragment: Fragment) -> Interval:
    """Memory for the rows of which this process has elements."""
    columns = _columns(fragment)
    first, last = fragment.cuts[fragment.rank : fragment.rank + 2]
    start, stop = first // columns, -(-last // columns) if last > first else first // columns
    memory = torch.empty((stop - start) * columns, dtype=fragment.dtype)
    return _interval(fragment, memory, start)


def fill(fragment: Fragment, rows: Interval) -> None:
    """Take a fragment's elements out of the rows that it touches."""
    first = fragment.cuts[fragment.rank] - rows.start * _columns(fragment)
    fragment.detach().copy_(rows.tensor.reshape(-1)[first : first + fragment.numel()])


def _columns(fragment: Fragment) -> int:
    return fragment.whole[1:].numel()


def _interval(fragment: Fragment, elements: Tensor, start: int) -> Interval:
    """Elements as rows; those of a tensor without dimensions are the tensor."""
    rows = len(elements) // _columns(fragment)
    shape = (rows, *fragment.whole[1:]) if fragment.whole or not rows else ()
    return Interval(elements.view(shape), start, tuple(fragment.whole))


def _overlap(
    cuts: Sequence[int], one: int, begins: Sequence[int], other: int
) -> Iterator[tuple[int, int]]:
    """The elements of `one` that are of rows which begin in `other`; nothing, or one range."""
    start, stop = max(cuts[one], begins[other]), min(cuts[one + 1], begins[other + 1])
    if start < stop:
        yield start, stop
