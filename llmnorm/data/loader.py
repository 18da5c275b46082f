"""Packed rows as batches: what one process reads at every step.

Shape legend: b = rows of a micro batch, C = context_length. A batch holds CPU tensors, all int64:
`input_ids`, `shift_labels` (the next tokens; -100 where none counts) and `position_ids`, (b, C)
each; `sources` and `rows` (the row's number in the run), (b,) each.

What would surprise:
- There is no state to save. Row n of the run is a pure function of seed and stages (order.py), so
  how far a run has read is one number.
- The first token of a document is not a label. Positions restart at 0 where a document starts, and
  where a row does.
- No thread reads ahead: reading costs well below 1 % of a step (docs/results/data.json).
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from llmnorm.data.packed import PackedData
from llmnorm.data.shards import TokenStream

Batch = dict[str, torch.Tensor]

IGNORED = -100
AHEAD = 8192  # rows located at once: 0.2-0.4 us a row, where 1,024 at once take 1 us a row


class TrainingRows:
    """The training rows of prepared text, by their numbers in the run.

    Args:
        packed: prepared data.
        seed: seed of the order of rows.

    Attributes:
        order: where a row lies.
    """

    def __init__(self, packed: PackedData, seed: int) -> None:
        self._streams = [source.train for source in packed.sources]
        self._context = packed.context_length
        self.order = packed.order(seed)

    def batch(
        self,
        numbers: NDArray[np.int64],
        source: NDArray[np.int64],
        index: NDArray[np.int64],
    ) -> Batch:
        """The rows with these numbers, (b,), which lie where `order` says, as a batch."""
        rows = [
            (self._streams[number], int(row)) for number, row in zip(source, index, strict=True)
        ]
        batch = _read(rows, self._context, pad=0, length=len(rows))
        batch["sources"] = torch.from_numpy(source.copy())
        batch["rows"] = torch.from_numpy(numbers.copy())
        return batch


class Loader:
    """The training rows of one process.

    Args:
        packed: prepared data.
        seed: seed of the order of rows.
        global_batch: rows of a step, over all processes.
        rank, world: this process and how many there are; rank r reads the r-th part of every step.
        micro_batch: rows of one batch; it divides a process's rows of a step.
    """

    def __init__(
        self,
        packed: PackedData,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        share = global_batch // world
        self._micro_batch = share if micro_batch is None else micro_batch
        assert global_batch == share * world and share % self._micro_batch == 0
        self._global_batch, self._first, self._share = global_batch, rank * share, share
        self._rows = TrainingRows(packed, seed)

    def batches(self, first_row: int = 0) -> Iterator[list[Batch]]:
        """Yield, without end, the micro batches of each step; the first begins at `first_row`."""
        steps = -(-AHEAD // self._global_batch)
        while True:
            located = self._rows.order.locate(first_row, steps * self._global_batch)
            for start in range(self._first, steps * self._global_batch, self._global_batch):
                yield [
                    self._batch(first_row, offset, *located)
                    for offset in range(start, start + self._share, self._micro_batch)
                ]
            first_row += steps * self._global_batch

    def _batch(
        self, first: int, offset: int, source: NDArray[np.int64], index: NDArray[np.int64]
    ) -> Batch:
        part = slice(offset, offset + self._micro_batch)
        numbers = np.arange(first + part.start, first + part.stop)
        return self._rows.batch(numbers, source[part], index[part])


def evaluation_batches(
    packed: PackedData, source: int, rank: int = 0, world: int = 1, micro_batch: int = 1
) -> Iterator[Batch]:
    """Yield the validation rows of a source that this process evaluates.

    Every process yields the same number of batches, and every batch has `micro_batch` rows. Where
    there are not enough, rows without labels fill up, numbered -1.
    """
    stream, count = packed.sources[source].validation, packed.sources[source].validation_rows
    for first in range(0, count, world * micro_batch):
        start = first + rank * micro_batch
        numbers = np.arange(start, start + micro_batch)
        rows = [(stream, int(row)) for row in numbers if row < count]
        batch = _read(rows, packed.context_length, packed.pad, micro_batch)
        batch["sources"] = torch.full((micro_batch,), source)
        batch["rows"] = torch.from_numpy(np.where(numbers < count, numbers, -1))
        yield batch


def document_bounds(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Where the documents of a batch of packed rows lie, by transformers' names.

    It is made on the host, so that a model that is given it need not read `position_ids` back from
    its device.

    Args:
        position_ids: (b, C) on the CPU, 0 where a document or a row starts.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, the same (documents + 1,) int32 tensor: where each
        document starts, and where the last ends, in the rows laid end to end. `max_length_q` and
        `max_length_k`, the tokens of the longest document. [[0, 1, 0], [0, 1, 2]] -> [0, 2, 3, 6]
        and 3.
    """
    positions = position_ids.numpy().reshape(-1)
    borders = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    boundaries, longest = torch.from_numpy(borders), int(np.diff(borders).max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _read(rows: list[tuple[TokenStream, int]], context: int, pad: int, length: int) -> Batch:
    """Read rows given as (stream, index) into a batch of `length` rows; the rest is padding."""
    columns = np.arange(context)
    tokens = np.full((length, context + 1), pad, np.int64)
    positions = np.tile(columns, (length, 1))
    filled = np.zeros(length, np.int64)
    borders: list[tuple[int, int]] = []  # (row, column) of tokens that start a document
    for row, (stream, index) in enumerate(rows):
        first = index * context
        filled[row] = size = min(context + 1, stream.tokens - first)
        borders += ((row, start) for start in stream.read(first, tokens[row, :size]).tolist())
    # Padding counts as one more document: no real token sees it, and it sees no real token.
    borders += ((row, size) for row, size in enumerate(filled.tolist()) if size <= context)
    labels = tokens[:, 1:].copy()
    labels[columns >= filled[:, None] - 1] = IGNORED
    for row, start in borders:
        positions[row, start:] = columns[: max(0, context - start)]
        if start:
            labels[row, start - 1] = IGNORED
    return {
        "input_ids": torch.from_numpy(tokens[:, :-1].copy()),
        "shift_labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }
