"""ZeRO's fragments, which are ranges of elements, as the rows that a checkpoint holds, and back.

A process writes the rows that begin in its fragment. Other processes may hold the end of its last
row and send it. A tensor of shape (5, 4) over three processes:

    elements   [0, 7)    [7, 14)    [14, 20)
    rows       [0, 2)    [2, 4)     [4, 5)     the first gets element 7, the second 14 and 15

A process reads all rows of which its fragment has elements. The copy that it writes or reads is at
most two rows larger than the fragment.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmnorm.checkpoints.format import Interval
from llmnorm.optim.fragments import Fragment

# Gives CPU memory for a copy: the tensor's name, a tensor of the copy's dtype, its elements.
Allocate = Callable[[str, Tensor, int], Tensor]


class Ends(NamedTuple):
    """The ends of rows that processes send each other; 1-D tensors, in the order of processes.

    Attributes:
        sent: the elements that leave, `sent_counts[r]` of them for process r.
        received: memory for the elements that arrive, `received_counts[r]` of them from process r.
        missing: the places that they are for, in the same order.
    """

    sent: Tensor
    sent_counts: list[int]
    received: Tensor
    received_counts: list[int]
    missing: list[Tensor]

    def put_in_place(self) -> None:
        """Copy what was received into the rows."""
        sizes = [len(piece) for piece in self.missing]
        for piece, data in zip(self.missing, self.received.split(sizes), strict=True):
            piece.copy_(data)


def begun_rows(
    fragments: Mapping[str, Fragment], allocate: Allocate
) -> tuple[dict[str, Interval], Ends | None]:
    """Copies of the rows that begin in this process's fragments.

    They are complete after the caller has exchanged the ends of rows between the processes and
    called `put_in_place`. Nothing is sent here, so that a process that fails here can say so.

    Args:
        fragments: of one dtype, under the same names in the same order on every process.

    Returns:
        The rows by name, and what is to be exchanged; None without fragments.
    """
    if not fragments:
        return {}, None
    world = len(next(iter(fragments.values())).cuts) - 1
    leaving: list[list[Tensor]] = [[] for _ in range(world)]
    arriving: list[list[Tensor]] = [[] for _ in range(world)]
    rows = {}
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
        rows[name] = _interval(fragment, copy, first // columns)
    sent_counts, received_counts = ([sum(map(len, p)) for p in way] for way in (leaving, arriving))
    like = next(iter(fragments.values()))
    sent = torch.cat([torch.empty(0, dtype=like.dtype), *(p for ps in leaving for p in ps)])
    received = sent.new_empty(sum(received_counts))
    missing = [piece for pieces in arriving for piece in pieces]
    return rows, Ends(sent, sent_counts, received, received_counts, missing)


def touched_rows(fragment: Fragment) -> Interval:
    """Uninitialised memory for the rows of which this process has elements."""
    columns = _columns(fragment)
    first, last = fragment.cuts[fragment.rank : fragment.rank + 2]
    start, stop = first // columns, -(-last // columns) if last > first else first // columns
    memory = torch.empty((stop - start) * columns, dtype=fragment.dtype)
    return _interval(fragment, memory, start)


def fill(fragment: Fragment, rows: Interval) -> None:
    """Copy a fragment's elements out of the rows that `touched_rows` gave."""
    first = fragment.cuts[fragment.rank] - rows.start * _columns(fragment)
    fragment.detach().copy_(rows.tensor.reshape(-1)[first : first + fragment.numel()])


def _columns(fragment: Fragment) -> int:
    return fragment.whole[1:].numel()


def _interval(fragment: Fragment, elements: Tensor, start: int) -> Interval:
    """Elements as an interval of rows; of a 0-dim tensor they are the tensor itself."""
    rows = len(elements) // _columns(fragment)
    shape = (rows, *fragment.whole[1:]) if fragment.whole or not rows else ()
    return Interval(elements.view(shape), start, tuple(fragment.whole))


def _overlap(
    cuts: Sequence[int], holder: int, begins: Sequence[int], writer: int
) -> Iterator[tuple[int, int]]:
    """The elements in process `holder`, of rows that begin in `writer`: one range, or none."""
    start, stop = max(cuts[holder], begins[writer]), min(cuts[holder + 1], begins[writer + 1])
    if start < stop:
        yield start, stop
