"""The rows of a cache and what stands in them: which run, which have finished, which are free.

    slots = Slots(step, rows=8, context=512)
    slots.begin(ids)                        # a prompt, in a cache of one row beside
    while slots.left: slots.run(128)        # in pieces, between the rounds of the other rows
    slot = slots.admit(ids)                 # by copy, behind the running rows
    logits = slots.feed(blocks)             # a block of tokens for each running row, in one pass
    slots.rollback(counts)
    moved = slots.finish(slot, keep=True)   # the last running row has moved into the gap

Slots in order: rows that run (a pass takes those alone), then rows that have finished and are kept,
and free ones. A finished row stays until its slot is needed. A prompt that begins as some row does
gets that row's copy, taken back to the common beginning, and only its rest is run.

A pass over a prompt would pad every other row to its width, so prompts have a cache of their own,
and short ones that are run in one pass have a cache that lasts as long as it (`run_together`). All
other buffers are made at the start and nothing grows. The last token of a row is pending: no cache
holds it.

What would surprise: `ids` lists are kept by reference, and grow as their rows do; how much of a
list its slot holds is what the cache says (`lengths`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmnorm.generation.blocks import rectangle
from llmnorm.generation.contract import Step
from llmnorm.nn.cache import KEPT, KeyValues, RaggedCache

# Common tokens from which on a row's copy is taken. Of 26M weights a row of 1,000 tokens is copied
# in 13.4 ms by one thread of a CPU, and a token of a prompt is run in 0.88.
WORTH = 16


class Slots:
    """A target's cache, and a side cache of one row in which prompts are run.

    Args:
        step: the model.
        rows: how many slots there are.
        context: tokens that a row may hold.
        padding: columns that a pass may have behind a full row.
        reuse: False: every prompt is run from its beginning, and no finished row is kept.

    Attributes:
        running: rows that run; they stand in front.
        bytes: of both caches.
        copies: rows that were copied, from cache to cache or into a gap.
        lost: prompts that began as a row does, whose state could not be taken back so far.
    """

    def __init__(
        self, step: Step, rows: int, context: int, *, padding: int, reuse: bool = True
    ) -> None:
        self.step, self.rows, self.context = step, rows, context
        self._padding, self._reuse = padding, reuse
        self.copies = self.lost = 0
        self._cache, self._side = step.new_cache(), step.new_cache()
        self.clear()
        windows = [n.window for n in self._side.layers if isinstance(n, KeyValues) and n.window]
        # What the reserved buffers of a window take in one pass (RaggedCache.reserve).
        self._widest = min((window + KEPT for window in windows), default=context)

    def clear(self) -> None:
        """Forget all rows and make all buffers anew, also where a fault has torn the layers."""
        self.bytes = 0
        self._side.clear()  # before the other one's new buffers are made
        for cache, rows in ((self._cache, self.rows), (self._side, 1)):
            cache.clear()
            self.bytes += cache.reserve(
                rows, self.context, self._padding, dtype=self.step.dtype, device=self.step.device
            )
            for _ in range(rows):
                cache.admit()
            for row in range(rows):
                cache.release(row)
        self.running = 0
        self._ids: dict[int, list[int]] = {}  # of running and finished rows, by slot
        self._finished: list[int] = []  # slots, the oldest first
        self._side_ids: list[int] = []
        self._prompt: list[int] | None = None  # what is being run, without its pending token
        self._within: int | None = None  # the finished row that the prompt continues
        self._beside: RaggedCache | None = None  # prompts that were run together

    @property
    def lengths(self) -> list[int]:
        """Tokens that the running rows hold."""
        return self._cache.lengths[: self.running]

    @property
    def spare(self) -> int:
        """Slots that no running row has."""
        return self.rows - self.running

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be run."""
        return 0 if self._prompt is None else len(self._prompt) - self._side.lengths[0]

    def begin(self, ids: list[int], *, whole: bool = False) -> int:
        """Start a prompt in the side cache; how many of its tokens an earlier row has saved.

        Args:
            whole: all of it is to be run; no row saves any.
        """
        assert self._prompt is None, "one prompt at a time"
        self._prompt, self._within = ids[:-1], None
        found = None if whole else self._source(self._prompt)
        if found is None:
            self._empty_side()
            self._side.admit()
            return 0
        slot, common = found
        if slot is None:
            back = self._side.lengths[0] - common
        else:
            back = self._cache.lengths[slot] - common
            self._to_side(slot)
            if slot in self._finished and not back:
                self._within = slot
        if back:
            self._side.rollback([back])
        self._side_ids = self._prompt
        return common

    def _source(self, prompt: list[int]) -> tuple[int | None, int] | None:
        """The row with the longest beginning in common with the prompt that can be taken back to
        it, and the length of that; None in its place for the side cache's own."""
        if not prompt:
            return None
        if self._is_in_side(prompt):
            return None, len(prompt)  # another row of the same request: nothing is copied
        found = sorted(self._alike(prompt), key=_longest)
        for common, place in found:
            cache = self._side if place is None else self._cache
            row = 0 if place is None else place
            if _reaches(cache, row, cache.lengths[row] - common):
                return place, common
        self.lost += bool(found)
        return None

    def _is_in_side(self, prompt: list[int]) -> bool:
        return not self._side.free and self._side_ids[: self._side.lengths[0]] == prompt

    def _alike(self, prompt: list[int]) -> list[tuple[int, int | None]]:
        """The rows that begin as the prompt does, by slot, None for the side cache's own, each
        behind the number of common tokens; those with too few of them are left out."""
        if not self._reuse:
            return []
        found: list[tuple[int, int | None]] = [
            (_common(ids, prompt, self._cache.lengths[slot]), slot)
            for slot, ids in self._ids.items()
        ]
        if not self._side.free:
            found.append((_common(self._side_ids, prompt, self._side.lengths[0]), None))
        enough = min(WORTH, len(prompt))
        return [pair for pair in found if pair[0] >= enough]

    def begins_as_a_row_does(self, ids: list[int], beside: Sequence[list[int]]) -> bool:
        """Whether a row, or a prompt beside it, has so much in common with a prompt that a copy
        would be taken, as far as their layers can be taken back."""
        prompt = ids[:-1]
        if self._is_in_side(prompt) or self._alike(prompt):
            return True
        enough = min(WORTH, len(prompt))
        return any(_common(other, prompt, len(other) - 1) >= enough for other in beside)

    def run_together(self, prompts: Sequence[list[int]]) -> Tensor:
        """Run whole prompts, each without its pending token, in one pass; `admit` gives them slots.

        Returns:
            Logits (prompts, 1, vocabulary) of each one's last token that was run.
        """
        assert self._prompt is None, "one pass of prompts at a time"
        self._beside = self.step.new_cache()
        ids, counts = rectangle([prompt[:-1] for prompt in prompts], self.step.device)
        return self.step.step(ids, self._beside, counts, last=True)

    def run(self, most: int, *, every: bool = False) -> Tensor:
        """Run the next piece of the prompt, at most so many tokens.

        Returns:
            Logits (1, tokens, vocabulary) of `every` token, or (1, 1, vocabulary) of the last one.
        """
        assert self._prompt is not None and self.left
        start = self._side.lengths[0]
        self._side_ids = self._prompt
        ids = torch.tensor([self._prompt[start : start + self.piece(most)]])
        return self.step.step(ids.to(self.step.device), self._side, last=not every)

    def piece(self, most: int) -> int:
        """Tokens that `run(most)` would run: what is left, in as few pieces of one size.

        A short last piece would cost nearly as much as a whole one, and on a CPU be captured.
        """
        pieces = -(-self.left // min(most, self._widest))
        return -(-self.left // pieces) if pieces else 0

    def drop(self) -> None:
        """Give the prompt up, and those that were run together; what was run of the one stays in
        the side cache."""
        self._prompt = self._within = self._beside = None

    def forget(self) -> None:
        """Empty the side cache, if no prompt is being run in it: it may hold nan."""
        if self._prompt is None:
            self._empty_side()

    def admit(self, ids: list[int], beside: int | None = None) -> int:
        """Give the prompt's row a slot behind the running ones; `ids` are its tokens, and grow.

        The side cache keeps its copy, which the next row of the same prompt starts from.

        Args:
            beside: the prompt's number among those that were run together.
        """
        assert self.spare
        if beside is not None:
            source, row = self._beside, beside
        else:
            assert self._prompt is not None and not self.left
            source, row = self._side if self._prompt else None, 0
            if self._within is not None:  # all that it holds stands in the new row as well
                self._let_go(self._within)
            self._prompt = self._within = None
        if not self._cache.free:
            self._let_go(self._finished[0])
        slot = self.running
        if slot in self._finished:
            self._move(slot)
        if source is None:
            given = self._cache.admit()
        else:
            self.copies += 1
            given = self._cache.admit(source, row)
        assert given == slot, "rows in use stand in front"
        self._ids[slot] = ids
        self.running += 1
        return slot

    def feed(self, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Append a block to each running row; logits (rows, longest block, vocabulary)."""
        assert len(blocks) == self.running
        ids, counts = rectangle(blocks, self.step.device)
        return self.step.step(ids, self._cache, counts)

    def rollback(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of the running rows."""
        if any(counts):
            self._cache.rollback(counts)

    def finish(self, slot: int, *, keep: bool) -> int | None:
        """A row runs no more; the slot of the running row that has moved into its place, if any.

        Args:
            slot: of the row.
            keep: whether it stays for prompts that begin as it does. Nothing of a row that has
                failed may stay: with `keep` False its slots are zeroed.
        """
        last = self.running - 1
        self.running = last
        ids = self._ids.pop(slot)
        if not (keep and self._reuse):
            self._cache.release(slot)
        elif slot == last:
            self._ids[slot] = ids
            self._finished.append(slot)
        else:
            self._keep_behind(slot, last, ids)
            return last
        if slot == last:
            return None
        self._fill(slot, last)
        return last

    def _keep_behind(self, slot: int, last: int, ids: list[int]) -> None:
        """Change places: the finished row stands behind, the last running one in the gap."""
        if not self._cache.free and self._prompt is not None:
            self._let_go(self._finished[0])  # the prompt that is being run needs a slot anyway
        if self._cache.free:
            behind = self._cache.admit(self._cache, slot)
            self.copies += 1
            self._cache.release(slot)
            self._fill(slot, last)
        else:
            self._to_side(slot)
            self._side_ids = ids
            self._cache.release(slot)
            self._fill(slot, last)
            behind = self._cache.admit(self._side)
            self.copies += 1
        self._ids[behind] = ids
        self._finished.append(behind)

    def _fill(self, gap: int, last: int) -> None:
        """Move the last running row into a gap in front."""
        given = self._cache.admit(self._cache, last)
        assert given == gap, "the gap is the first free slot"
        self.copies += 1
        self._cache.release(last)
        self._ids[gap] = self._ids.pop(last)

    def _move(self, slot: int) -> None:
        """Move a finished row to the first free slot."""
        given = self._cache.admit(self._cache, slot)
        self.copies += 1
        self._cache.release(slot)
        self._ids[given] = self._ids.pop(slot)
        self._finished[self._finished.index(slot)] = given

    def _let_go(self, slot: int) -> None:
        self._cache.release(slot)
        self._finished.remove(slot)
        del self._ids[slot]
        if slot == self._within:
            self._within = None

    def _empty_side(self) -> None:
        if not self._side.free:
            self._side.release(0)
        self._side_ids = []

    def _to_side(self, slot: int) -> None:
        self._empty_side()
        self._side.admit(self._cache, slot)
        self.copies += 1


def _common(ids: list[int], prompt: list[int], held: int) -> int:
    """How many of the first `held` ids are the prompt's beginning."""
    common, most = 0, min(held, len(prompt))
    while common < most:  # by halves: whole lists are compared without Python
        middle = (common + most + 1) // 2
        if ids[common:middle] == prompt[common:middle]:
            common = middle
        else:
            most = middle - 1
    return common


def _longest(found: tuple[int, int | None]) -> tuple[int, bool]:
    """The most common tokens first; of equals the side cache's, from which nothing is copied."""
    common, slot = found
    return -common, slot is not None


def _reaches(cache: RaggedCache, row: int, count: int) -> bool:
    """Whether the last `count` tokens of a row can be taken back, in all layers."""
    try:
        for layer in cache.layers:
            layer.check_rollback([*[0] * row, count])
    except ValueError:
        return False
    return True
