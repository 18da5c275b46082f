"""One document a row, for models that mix the documents of a packed row.

    apart([batch, batch], parallel)      -> [batch, batch, batch]

The documents of a process's micro-batches of a step are sorted by length and laid into new ones,
padded on the right to the longest of each, so that documents of similar length stand together. A
micro-batch has no more tokens than the largest before, padding counted. Documents without labels
are left out. No mask is given: a decoder's tokens do not see what is behind them.

What would surprise: how many micro-batches come of it depends on the documents of each process, and
every process must run equally many. So with several processes they ask each other once a step; who
has fewer runs some without labels.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmnorm.data.loader import IGNORED
from llmnorm.models.foreign import Foreign
from llmnorm.objectives.contract import MicroBatch
from llmnorm.parallel.processes import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Document(NamedTuple):
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]


def as_asked(
    model: "PreTrainedModel", batches: list[MicroBatch], parallel: Parallel
) -> list[MicroBatch]:
    """The micro-batches of a step as the model wants them: as they are, or `apart`.

    Those of a mixture of experts say besides what each row is of (`with_row_sizes`).
    """
    if not isinstance(model, Foreign):
        return batches
    if model.apart:
        batches = apart(batches, parallel)
    return [with_row_sizes(batch) for batch in batches] if model.is_mixture else batches


def with_row_sizes(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch, telling a mixture of experts the tokens and labels of each row.

    `row_tokens` are those in front of a row's padding (all, without `spans`); a row without labels
    has none. They are numbers of the host, since the model cuts its rows by them and a device would
    be waited for.
    """
    labels = batch.inputs["shift_labels"]
    assert isinstance(labels, Tensor)
    counts = (labels.numpy() != IGNORED).sum(1)
    length = labels.shape[1]
    tokens = np.full(len(counts), 0 if batch.spans else length)
    for _, stop in batch.spans:
        row = (stop - 1) // length
        tokens[row] = max(tokens[row], stop - row * length)
    sizes = {
        "row_tokens": tuple(np.where(counts > 0, tokens, 0).tolist()),
        "row_labels": tuple(counts.tolist()),
    }
    return batch._replace(inputs={**batch.inputs, **sizes})


def apart(batches: Sequence[MicroBatch], parallel: Parallel) -> list[MicroBatch]:
    """The same labels, with a document a row; every process must call it.

    Args:
        batches: this process's of a step, of a causal language model, on the CPU.
    """
    room = max(_ids(batch).numel() for batch in batches)
    found = sorted(
        (document for batch in batches for document in _documents(batch)),
        key=lambda document: -len(document.ids),
    )
    groups: list[list[_Document]] = []
    for document in found:
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0].ids) > room:
            groups.append([])
        groups[-1].append(document)
    if parallel.world > 1:
        counts = parallel.gather(torch.tensor([len(groups)], device=parallel.device))
        nothing = _Document(np.zeros(1, np.int64), np.full(1, IGNORED, np.int64))
        groups += [[nothing]] * (int(counts.max()) - len(groups))
    if not groups:  # a step whose rows have no label at all
        groups = [[_Document(np.zeros(1, np.int64), np.full(1, IGNORED, np.int64))]]
    rows = torch.cat([batch.rows for batch in batches])
    tokens = sum(batch.tokens for batch in batches)
    first, *others = [_laid_out(group) for group in groups]
    return [first._replace(rows=rows, tokens=tokens), *others]


def padding(batches: Iterable[MicroBatch]) -> tuple[int, int]:
    """The padded tokens of micro-batches that `apart` has made, and all tokens."""
    parts = list(batches)
    every = sum(_ids(batch).numel() for batch in parts)
    return every - sum(stop - start for batch in parts for start, stop in batch.spans), every


def _ids(batch: MicroBatch) -> Tensor:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    return ids


def _documents(batch: MicroBatch) -> list[_Document]:
    """The documents of a micro-batch that have labels."""
    named = [batch.inputs[name] for name in ("input_ids", "shift_labels", "position_ids")]
    ids, labels, positions = (t.numpy().reshape(-1) for t in named if isinstance(t, Tensor))
    starts = np.flatnonzero(positions == 0)
    parts = zip(np.split(ids, starts[1:]), np.split(labels, starts[1:]), strict=True)
    return [_Document(*part) for part in parts if (part[1] != IGNORED).any()]


def _laid_out(group: Sequence[_Document]) -> MicroBatch:
    """A micro-batch with each document a row; tokens and rows of the run are counted elsewhere."""
    longest = max(len(document.ids) for document in group)
    ids = np.zeros((len(group), longest), np.int64)
    labels = np.full((len(group), longest), IGNORED, np.int64)
    spans = []
    for row, document in enumerate(group):
        ids[row, : len(document.ids)] = document.ids
        labels[row, : len(document.ids)] = document.labels
        spans.append((row * longest, row * longest + len(document.ids)))
    positions = np.flatnonzero(labels != IGNORED)
    inputs: dict[str, Tensor | int | tuple[int, ...]] = {
        "input_ids": torch.from_numpy(ids),
        "shift_labels": torch.from_numpy(labels),
        "label_positions": torch.from_numpy(positions),
        "loss_only": True,
    }
    return MicroBatch(inputs, len(positions), 0, torch.zeros(0, dtype=torch.int64), spans)
