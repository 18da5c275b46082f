"""Held-out text in a form that any causal decoder can read: every document of a row by itself.

A packed row holds several documents that must not see each other. Models differ in how they are
told so (positions, masks, boundaries). But every causal decoder reads a single document from
position 0 on, with padding behind it, which no real token sees. So a row is taken apart into its
documents, each a line of a batch; the figures of a row are the sums over its lines.

Shapes: ids, labels, real (lines, length), row (lines,).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmnorm.data.loader import IGNORED, evaluation_batches
from llmnorm.data.packed import PackedData


class Batch(NamedTuple):
    """Documents of some rows.

    Attributes:
        ids: tokens; 0 in the padding.
        labels: the next tokens; -100 where there is none to predict.
        real: which tokens are not padding.
        row: the row that each line belongs to, counted from 0 over the whole text.
    """

    ids: Tensor
    labels: Tensor
    real: Tensor
    row: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def positions(self) -> Tensor:
        """(lines, length): the position of every token in its document, counted from 1."""
        return torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device).expand_as(self.ids)


class Text(NamedTuple):
    """The rows to measure on.

    Attributes:
        batches: the rows' documents, some rows a batch.
        rows: the number of rows by source.
        tokens: the number of labels.
    """

    batches: list[Batch]
    rows: dict[str, int]
    tokens: int

    @property
    def total(self) -> int:
        """The number of rows of all sources."""
        return sum(self.rows.values())


def held_out(packed: PackedData, rows: int, *, at_once: int) -> Text:
    """Validation rows, evenly spread over the rows of all sources.

    Args:
        packed: prepared data.
        rows: how many; all of them, if there are fewer.
        at_once: the most rows of a batch. Batches are smaller if there would not be eight of them
            otherwise, since some figures are means over batches.
    """
    total = sum(source.validation_rows for source in packed.sources)
    count = min(rows, total)
    at_once = max(1, min(at_once, count // 8))
    chosen = {i * total // count for i in range(count)}
    number, first, lines = 0, 0, []
    by_source: dict[str, int] = {}
    for index, source in enumerate(packed.sources):
        for batch in evaluation_batches(packed, index):
            if number in chosen:
                by_source[source.name] = by_source.get(source.name, 0) + 1
                lines += [(first, *piece) for piece in documents(batch)]
                first += 1
            number += 1
    batches = [
        _batch([line for line in lines if start <= line[0] < start + at_once])
        for start in range(0, first, at_once)
    ]
    return Text(batches, by_source, sum(int((b.labels != IGNORED).sum()) for b in batches))


def documents(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document in the rows of a loader's batch, padding left out."""
    for ids, labels, positions in zip(
        batch["input_ids"], batch["shift_labels"], batch["position_ids"], strict=True
    ):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if bool((labels[start:end] != IGNORED).any()):
                yield ids[start:end], labels[start:end]


def _batch(lines: list[tuple[int, Tensor, Tensor]]) -> Batch:
    shape = len(lines), max(len(ids) for _, ids, _ in lines)
    batch = Batch(
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, IGNORED),
        torch.zeros(shape, dtype=torch.bool),
        torch.tensor([row for row, _, _ in lines]),
    )
    for line, (_, ids, labels) in enumerate(lines):
        batch.ids[line, : len(ids)] = ids
        batch.labels[line, : len(ids)] = labels
        batch.real[line, : len(ids)] = True
    return batch
