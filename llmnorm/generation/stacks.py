"""Rows' caches as one batch: stacked, and taken out of it again.

    stacks = SlotStacks(step)                       or PaddedStacks(model), transformers' own cache
    row = stacks.prompt(ids)                        a batch of one row that holds ids
    batch = stacks.stack([(row, 0), (other, 3)])    copies of rows of any batches, in this order
    logits = batch.feed(blocks)                     a block of tokens a row, in one pass
    batch.drop(counts)                              each row's last tokens are taken back
    row = stacks.stack([(batch, 1)])                taken out again: a batch of one row
    batch = stacks.exchange(batch, places)          as `stack`, of a batch that is needed no more

EQSPEC and EXSPEC (arXiv 2510.22876) are written once over these operations. For our cache a stack
is an admission from another cache; a row begins at slot 0, so no padding is stored. transformers'
DynamicCache has one length for all rows: they are padded on the left, so that all end at the last
column, and positions follow from the mask. After tokens were taken back, the rows end at different
columns, and they must be stacked anew before the next pass (`Stack.aligned`).

Shapes: logits (rows, longest block, vocabulary), padding behind shorter blocks; keys and values
(rows, kv_heads, columns, head_dim).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from llmnorm.generation.blocks import rectangle
from llmnorm.generation.contract import Step
from llmnorm.models.foreign_decoding import longest_row, refuse_foreign
from llmnorm.nn.cache import RaggedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stack(ABC):
    """A batch of rows with one cache.

    Attributes:
        lengths: tokens that each row holds.
    """

    lengths: list[int]

    @property
    @abstractmethod
    def aligned(self) -> bool:
        """Whether the rows can be fed where they are."""

    @abstractmethod
    def feed(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Append a block of at least one token to each row; all their logits. Rows are aligned."""

    @abstractmethod
    def drop(self, counts: Sequence[int]) -> None:
        """Take back each row's last tokens, as many as the last `feed` brought or fewer."""


Place = tuple[Stack, int]
"""A batch, and the number of a row in it."""


class Stacks(ABC):
    """Makes batches of a model's rows.

    Attributes:
        context: tokens that a row may have.
        vocabulary: tokens that the logits are of.
    """

    context: int
    vocabulary: int

    @abstractmethod
    def prompt(self, ids: Sequence[int]) -> Stack:
        """A batch of one row, in which these tokens, or none, have been run."""

    @abstractmethod
    def stack(self, places: Sequence[Place]) -> Stack:
        """A new batch with copies of these rows; those that they are of stay as they are."""

    def exchange(self, batch: Stack, places: Sequence[Place]) -> tuple[Stack, list[int]]:
        """A batch of these rows in the place of another one, which is not used again.

        Returns:
            The batch, and which of its rows have been copied.
        """
        return self.stack(places), list(range(len(places)))


class SlotStacks(Stacks):
    """Batches in our ragged cache: every model that has a `contract.Step`."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.context, self.vocabulary = step.context, step.vocabulary

    def prompt(self, ids: Sequence[int]) -> "SlotStack":
        """A batch of one row, in which these tokens, or none, have been run."""
        cache = self._step.new_cache()
        cache.admit()
        if ids:
            self._step.step(torch.tensor([ids], device=self._step.device), cache, last=True)
        return SlotStack(self._step, cache)

    def stack(self, places: Sequence[Place]) -> "SlotStack":
        """A new batch with copies of these rows."""
        cache = self._step.new_cache()
        for _ in places:  # buffers for all rows at once: each larger one would be a copy
            cache.admit()
        for row in range(len(places)):
            cache.release(row)
        for stack, row in places:
            assert isinstance(stack, SlotStack)
            cache.admit(stack.cache, row)
        return SlotStack(self._step, cache)

    def exchange(self, batch: Stack, places: Sequence[Place]) -> tuple[Stack, list[int]]:
        """Row n of the batch stays where it is as place n; only the others are copied.

        A row of the batch may come as an earlier place than it is, and not as a later one.
        """
        assert isinstance(batch, SlotStack)
        if len(places) > len(batch.lengths):
            return super().exchange(batch, places)
        cache, copied = batch.cache, []
        for number, (stack, row) in enumerate(places):
            assert isinstance(stack, SlotStack)
            if stack is batch and row == number:
                continue
            assert stack is not batch or row > number, "it has been overwritten"
            cache.release(number)
            cache.admit(stack.cache, row)  # to the first free slot, which is that one
            copied.append(number)
        for number in range(len(places), len(batch.lengths)):
            cache.release(number)
        return SlotStack(self._step, cache, len(places)), copied


class SlotStack(Stack):
    """A batch in our ragged cache: rows of any lengths are aligned, each at its own beginning.

    The batch is the first `size` rows of the cache; all of them if None.
    """

    aligned = True

    def __init__(self, step: Step, cache: RaggedCache, size: int | None = None) -> None:
        self._step, self.cache = step, cache
        self._size = len(cache.lengths) if size is None else size

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """Tokens that each row holds."""
        return self.cache.lengths[: self._size]

    def feed(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Append a block to each row; logits."""
        ids, counts = rectangle(blocks, self._step.device)
        return self._step.step(ids, self.cache, counts)

    def drop(self, counts: Sequence[int]) -> None:
        """Take back each row's last tokens."""
        self.cache.rollback(counts)


class PaddedStacks(Stacks):
    """Batches of a stock decoder in transformers' DynamicCache, padded on the left.

    Raises:
        InputError: the model is of a class that `ForeignStep` does not serve either.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        refuse_foreign(model.config, type(model), type(model).__name__)
        self._model = model
        self.context = longest_row(model.config)
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def prompt(self, ids: Sequence[int]) -> "PaddedStack":
        """A batch of one row, in which these tokens, or none, have been run."""
        stack = PaddedStack(self._model, DynamicCache(config=self._model.config), [0])
        if ids:
            stack.feed([ids])
        return stack

    def stack(self, places: Sequence[Place]) -> "PaddedStack":
        """A new batch with copies of these rows: one gather a tensor and batch that they are of.

        What stands in the padding is the row's own, so that it is finite; no query sees it.
        """
        lengths = [stack.lengths[row] for stack, row in places]
        width = max(lengths)
        cache = DynamicCache(config=self._model.config)
        rows_of: dict[int, list[int]] = {}  # places by their batch
        for number, (stack, _) in enumerate(places):
            if lengths[number]:
                rows_of.setdefault(id(stack), []).append(number)
        stacked: list[list[Tensor]] = []  # of each layer keys and values
        for numbers in rows_of.values():
            stack = places[numbers[0]][0]
            assert isinstance(stack, PaddedStack)
            device = stack.cache.layers[0].keys.device
            rows = torch.tensor([places[n][1] for n in numbers], device=device)[:, None]
            shifts = [stack.padding[places[n][1]] - (width - lengths[n]) for n in numbers]
            columns = (
                torch.arange(width, device=device) + torch.tensor(shifts, device=device)[:, None]
            )
            columns = columns.clamp(0, stack.width - 1)
            into = torch.tensor(numbers, device=device)
            for number, layer in enumerate(stack.cache.layers):
                old = [t.transpose(1, 2) for t in (layer.keys, layer.values)]
                if number == len(stacked):
                    shape = len(places), width
                    stacked.append([t.new_zeros(*shape, *t.shape[2:]) for t in old])
                for new, kept in zip(stacked[number], old, strict=True):
                    new[into] = kept[rows, columns]
        for number, (keys, values) in enumerate(stacked):
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), number)
        return PaddedStack(self._model, cache, lengths)


class PaddedStack(Stack):
    """A batch in transformers' DynamicCache: all rows end at its last column.

    Args:
        model: it is run as it is.
        cache: of rows of `lengths`, each behind its padding.

    Attributes:
        padding: columns in front of each row.
    """

    def __init__(
        self, model: "PreTrainedModel", cache: DynamicCache, lengths: Sequence[int]
    ) -> None:
        self._model, self.cache, self.lengths = model, cache, list(lengths)
        self._last = longest_row(model.config) - 1
        self.padding = [max(lengths) - length for length in lengths]

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return int(self.cache.get_seq_length())

    @property
    def aligned(self) -> bool:
        """Whether all rows end at one column; what stands behind it is cut off by `drop`."""
        return len({a + b for a, b in zip(self.padding, self.lengths, strict=True)}) == 1

    @torch.no_grad()
    def feed(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Append a block to each row; logits. Positions are counted by the mask (section 2.4)."""
        assert self.aligned, "rows end at different columns: stack them anew"
        device, width = self._model.device, self.width
        ids, counts = rectangle(blocks, device)
        new = ids.shape[1]
        mask = None
        if any(self.padding):
            padding = torch.tensor(self.padding, device=device)[:, None]
            mask = (torch.arange(width + new, device=device) >= padding).long()
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, width:]
        else:
            positions = torch.arange(width, width + new, device=device).expand(len(ids), -1)
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(max=self._last),  # padding may stand beyond
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        self._crop()
        return logits

    def drop(self, counts: Sequence[int]) -> None:
        """Take back each row's last tokens: they lie behind its end, and are not copied again."""
        self.lengths = [a - b for a, b in zip(self.lengths, counts, strict=True)]
        self._crop()

    def _crop(self) -> None:
        if self.aligned:
            self.cache.crop(self.padding[0] + self.lengths[0] - self.width)
