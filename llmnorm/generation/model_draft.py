"""A smaller model as a draft: some tokens for every row, in as many passes as the longest draft.

    draft = ModelDraft(Decoder(small_model), slots=8, context=512)
    proposals = draft.propose(rows, [4, 4, 0, 2])  # four passes

Its cache has a row for each row of the target's, by the same numbers. What a row of it holds is
compared with the row's committed tokens at the beginning of each round: what the target rejected is
rolled back, and what it committed is fed. That is one token, the pending one, and one more where
all drafts were accepted, since a round does not feed its last draft. Both fit in the first pass of
the round, so a round of K drafts has K passes.

A row that has fallen behind, since it rode along without drafts, catches up beside the others, 17
tokens a pass. Prompts are run in a cache of their own and copied in: in a pass of all rows every
other row would be padded to their length.

What would surprise: rows of the target that are not asked for drafts cost nothing but their place
in the passes, if they stand in front of rows that are.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmnorm.generation.blocks import rectangle
from llmnorm.generation.contract import DraftedRow, Proposal, Step
from llmnorm.generation.sampling import draw
from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.layer_cache import KEPT, PADDING, VERIFIED
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 128  # tokens of a prompt that are run at once


def check_draft(
    target: "PreTrainedTokenizerBase",
    draft: "PreTrainedTokenizerBase",
    name: str = "generation.draft",
) -> None:
    """Refuse a draft with another vocabulary. Tokens and their ids count, names and merges do not.

    Raises:
        InputError: names the draft and the first id that differs.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    by_id = [{number: token for token, number in some.items()} for some in (ours, theirs)]
    number = min(n for n in {*by_id[0], *by_id[1]} if by_id[0].get(n) != by_id[1].get(n))
    there, here = (repr(some[number]) if number in some else "no token" for some in by_id)
    raise InputError(
        f"{name}: its tokenizer has another vocabulary ({len(theirs)} tokens, the model's "
        f"{len(ours)}; id {number} is {here}, the model's is {there}); give a draft that was "
        "trained with the model's tokenizer, or lookup"
    )


class _Row:
    """What a row of the draft's cache holds.

    Attributes:
        tokens: those in the cache.
        ids: the list of the target's row that was drafted for last, None if there is none.
        sure: how many of the tokens are surely the first ones of that list, which only grows.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ids: list[int] | None = None
        self.sure = 0

    def common(self, ids: list[int]) -> int:
        """How many of the tokens are the first ones of `ids`, without its last one."""
        same, most = 0, min(len(self.tokens), len(ids) - 1)
        if ids is self.ids:
            same = min(self.sure, most)
        while same < most and self.tokens[same] == ids[same]:
            same += 1
        return same


class ModelDraft:
    """A `contract.Draft` that runs a model. Its tokens are drawn as the row's own are.

    Args:
        step: the model.
        slots: rows of the target, at most.
        context: tokens that a row of the target may have; the draft's own limit if None.
        vocabulary: tokens that the target's logits are of, the draft's own if None. Logits may have
            columns behind the last token. The draft's are cut to so many, or lengthened by tokens
            that it does not propose.

    Attributes:
        bytes: of its cache, all of which is made at once.

    Raises:
        InputError: the draft takes fewer tokens than a row may have.
    """

    def __init__(
        self,
        step: Step,
        slots: int,
        *,
        context: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.context = step.context if context is None else context
        if step.context < self.context:
            raise InputError(
                f"generation.draft: takes {step.context} tokens a row, and a row may have "
                f"{self.context}; set generation.context={step.context}, or give another draft"
            )
        self._vocabulary = step.vocabulary if vocabulary is None else vocabulary
        self._step = step
        self._cache = step.new_cache()
        self.bytes = self._cache.reserve(
            slots, self.context, PADDING, dtype=step.dtype, device=step.device
        )
        self._rows = [_Row() for _ in range(slots)]
        for _ in self._rows:  # an empty row is in use all the while, so that numbers stay
            self._cache.admit()

    def propose(self, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[Proposal]:
        """`counts` tokens for each row; every chooser is advanced over its own, hypothetically."""
        drafted = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        self._sync([row for row, _ in drafted])
        tokens: dict[int, list[int]] = {row.slot: [] for row in rows}
        laws: dict[int, list[Tensor | None]] = {row.slot: [] for row in rows}
        blocks = {row.slot: row.ids[len(self._rows[row.slot].tokens) :] for row, _ in drafted}
        for number in range(max(counts, default=0)):
            wanting = [row for row, count in drafted if count > number]
            slots = [row.slot for row in wanting]
            logits = self._feed({slot: blocks[slot] for slot in slots})[:, 0]
            if slots != list(range(len(logits))):
                logits = logits[slots]
            logits = self._fitted(logits)
            chosen, distributions = draw([row.chooser for row in wanting], logits)
            for row, token, distribution in zip(wanting, chosen, distributions, strict=True):
                tokens[row.slot].append(token)
                blocks[row.slot] = [token]
                laws[row.slot].append(distribution)
        return [Proposal(tokens[n], _together(tokens[n], laws[n])) for n in tokens]

    def move(self, source: int, row: int) -> None:
        """The row `source` has become the row `row`, which was free."""
        self._replace(row, self._cache, source)
        self._rows[row] = self._rows[source]
        self.release(source)

    def release(self, row: int) -> None:
        """The row is free."""
        self._cache.release(row)
        self._cache.admit()
        self._rows[row] = _Row()

    def _sync(self, rows: Sequence[DraftedRow]) -> None:
        """Bring the cache's rows to the committed tokens: all but the last one or two are held."""
        back = [0] * len(self._rows)
        for row in rows:
            own = self._rows[row.slot]
            back[row.slot] = len(own.tokens) - own.common(row.ids)
        if any(back):
            self._take_back(back)
        prompts = {}
        for row in rows:
            own = self._rows[row.slot]
            own.ids, own.sure = row.ids, len(row.ids)
            missing = self._missing(row)
            if len(missing) >= KEPT or (missing and not own.tokens):
                prompts[row.slot] = missing
        if prompts:
            self._run_beside(prompts)
        while late := {row.slot: missing for row in rows if len(missing := self._missing(row)) > 1}:
            self._feed({slot: missing[:VERIFIED] for slot, missing in late.items()}, VERIFIED)

    def _missing(self, row: DraftedRow) -> list[int]:
        """The committed tokens that the cache does not hold, without the pending one."""
        return row.ids[len(self._rows[row.slot].tokens) : -1]

    def _take_back(self, counts: list[int]) -> None:
        """Roll the rows back. A row whose recurrent layers do not keep so many is emptied."""
        try:
            self._cache.rollback(counts)
        except ValueError:
            for slot, count in enumerate(counts):
                try:
                    self._cache.rollback([0] * slot + [count])
                except ValueError:
                    self.release(slot)
        for own, count, length in zip(self._rows, counts, self._cache.lengths, strict=True):
            if count:
                del own.tokens[length:]

    def _run_beside(self, blocks: Mapping[int, list[int]]) -> None:
        """Append each row's block in a cache beside, CHUNK tokens a pass; copy the rows back."""
        cache = self._step.new_cache()
        # The longest first: a pass takes the first rows, as far as they have tokens.
        slots = sorted(blocks, key=lambda slot: -len(blocks[slot]))
        for slot in slots:
            if self._rows[slot].tokens:
                cache.admit(self._cache, slot)
            else:
                cache.admit()
        for start in range(0, len(blocks[slots[0]]), CHUNK):
            pieces = [blocks[slot][start : start + CHUNK] for slot in slots]
            ids, counts = rectangle([piece for piece in pieces if piece], self._step.device)
            self._step.step(ids, cache, counts, last=True)
        for place, slot in enumerate(slots):
            self._replace(slot, cache, place)
            self._rows[slot].tokens += blocks[slot]

    def _feed(self, blocks: Mapping[int, list[int]], width: int = 1) -> Tensor:
        """Append each row's block; logits (rows, 1, vocabulary) of their last tokens.

        The pass takes the first rows up to the last that has a block, and is `width` tokens wide,
        or as wide as the longest block.
        """
        of_rows = [blocks.get(slot, []) for slot in range(max(blocks) + 1)]
        ids, counts = rectangle(of_rows, self._step.device, width)
        logits = self._step.step(ids, self._cache, counts, last=True)
        for slot, block in blocks.items():
            self._rows[slot].tokens += block
        return logits

    def _fitted(self, logits: Tensor) -> Tensor:
        """Logits (rows, vocabulary of the draft) as (rows, vocabulary of the target)."""
        more = self._vocabulary - logits.shape[-1]
        if more <= 0:
            return logits[..., : self._vocabulary]
        return torch.nn.functional.pad(logits, (0, more), value=-torch.inf)

    def _replace(self, slot: int, source: RaggedCache, source_row: int) -> None:
        """Make a row of the cache a copy of a row of `source`."""
        self._cache.release(slot)
        admitted = self._cache.admit(source, source_row)
        assert admitted == slot, "all other rows are in use"


def _together(tokens: Sequence[int], laws: Sequence[Tensor | None]) -> Tensor | None:
    """The distributions (tokens, vocabulary) of a row's drafts; None if all were certain.

    One alone is certain where `draw` found no token that the row allows, and made up another.
    """
    drawn = next((law for law in laws if law is not None), None)
    if drawn is None:
        return None
    together = drawn.new_zeros(len(laws), len(drawn))
    for line, token, law in zip(together, tokens, laws, strict=True):
        if law is None:
            line[token] = 1
        else:
            line.copy_(law)
    return together
