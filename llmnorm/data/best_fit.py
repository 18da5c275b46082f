"""Examples of unequal length laid into rows of one length, by best fit decreasing.

Source: Johnson, Demers, Ullman, Garey and Graham 1974, "Worst-case performance bounds for simple
one-dimensional packing algorithms" (SIAM Journal on Computing 3, 4): the longest first, each into
the row that it fills best, so that rows are at most 11/9 of the fewest possible and 4 more.

Shape legend: C = tokens that a row predicts from. An example of n tokens takes n - 1 of them: its
last token is a label alone. Example lengths 5, 3, 2 and 2 in rows of C = 6 take 4, 2, 1 and 1:

    row 0     a a a a b b
    row 1     c d . . . .      . padding: one more document, without labels

What would surprise: rows are a pure function of the lengths, in the order in which they are given.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmnorm.data.loader import IGNORED, Batch

Example = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (n,) and which of them are labels (n,), n >= 2."""


def best_fit(sizes: Sequence[int] | NDArray[np.int64], room: int) -> list[list[int]]:
    """The rows of examples that take `sizes` tokens, each a list of their numbers.

    >>> best_fit([4, 2, 1, 1], room=6)
    [[0, 1], [2, 3]]

    Among rows with equally little room the first is taken; of examples of one size the first comes
    first.

    Args:
        sizes: none more than `room`.
        room: tokens that a row takes.
    """
    taken = np.asarray(sizes)
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (tokens left, row), in ascending order
    for example in np.argsort(-taken, kind="stable").tolist():
        size = int(taken[example])
        assert 0 < size <= room, (size, room)
        place = bisect_left(left, (size, -1))
        if place < len(left):
            free, row = left.pop(place)
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(left, (free - size, row))
    return rows


def lay_out(rows: Sequence[Sequence[Example]], room: int, pad: int) -> Batch:
    """Rows of examples as a batch of the model's inputs, all on the CPU and int64.

    Positions restart at 0 with every example, and with the padding behind the last one. The next
    token is a label where it belongs to the same example and is trained.

    Args:
        rows: each row's examples, which fit into `room`; a row may have none.
        room: tokens of a row.
        pad: the padding token's id.

    Returns:
        `input_ids`, `position_ids` and `shift_labels` (rows, room); `label_positions` (labels,),
        where labels are in the rows laid end to end.
    """
    tokens = np.full((len(rows), room), pad, np.int64)
    labels = np.full((len(rows), room), IGNORED, np.int64)
    positions = np.empty((len(rows), room), np.int64)
    columns = np.arange(room)
    for row, examples in enumerate(rows):
        start = 0
        for ids, trained in examples:
            stop = start + len(ids) - 1
            tokens[row, start:stop] = ids[:-1]
            labels[row, start:stop] = np.where(trained[1:], ids[1:], IGNORED)
            positions[row, start:stop] = columns[: stop - start]
            start = stop
        positions[row, start:] = columns[: room - start]
    return {
        "input_ids": torch.from_numpy(tokens),
        "position_ids": torch.from_numpy(positions),
        "shift_labels": torch.from_numpy(labels),
        "label_positions": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
    }
