"""Prompt lookup: drafts that are copied from the row itself, and cost nothing.

    ids     the cat sat . the cat
    drafts  sat . the                  what followed the last earlier "the cat"

The row's last n tokens are looked up for n = 3, then 2, then 1, and the tokens after their last
earlier occurrence are proposed. Where that occurrence overlaps the row's end, the drafts themselves
are read on: a row that ends in "a b a b" is proposed "a b a b ...". Hugging Face's prompt lookup
takes the first occurrence instead.

Every row has an index of its own that grows with the row, so a round costs as much as the row has
gained tokens, however long it is.
"""

from collections.abc import Sequence

from llmnorm.generation.contract import DraftedRow, Proposal

LONGEST = 3  # tokens of the longest n-gram that is looked up


class Lookup:
    """A `contract.Draft` without a model.

    A row's list of tokens is followed as it grows; another list in the same slot is indexed anew.
    Its proposals are certain, so they have no distributions, and no chooser is advanced.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Index] = {}

    def propose(self, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[Proposal]:
        """`counts` tokens for each row, or none where its last token has not come before."""
        return [
            Proposal(self._index(row).next(count) if count else [])
            for row, count in zip(rows, counts, strict=True)
        ]

    def _index(self, row: DraftedRow) -> "_Index":
        index = self._rows.get(row.slot)
        if index is None or index.ids is not row.ids or len(row.ids) < index.end:
            index = self._rows[row.slot] = _Index(row.ids)
        return index

    def move(self, source: int, row: int) -> None:
        """The row `source` has become the row `row`, which was free."""
        self.release(row)
        if source in self._rows:
            self._rows[row] = self._rows.pop(source)

    def release(self, row: int) -> None:
        """The row is free."""
        self._rows.pop(row, None)


class _Index:
    """For each n-gram of a row, where the token after its last occurrence stands.

    Attributes:
        ids: the row's own list, which grows at its end.
        end: how many of its tokens are indexed.
    """

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.end = ids, 0
        self._after: dict[tuple[int, ...], int] = {}

    def next(self, count: int) -> list[int]:
        """The `count` tokens that are proposed."""
        ids = self.ids
        # An n-gram is entered when the token after it has come, so the row's last is not found.
        for place in range(self.end, len(ids)):
            for n in range(1, min(LONGEST, place) + 1):
                self._after[tuple(ids[place - n : place])] = place
        self.end = len(ids)
        for n in range(min(LONGEST, len(ids)), 0, -1):
            start = self._after.get(tuple(ids[-n:]))
            if start is not None:
                copied = ids[start : start + count]
                period = len(copied)
                return [copied[i % period] for i in range(count)]
        return []
