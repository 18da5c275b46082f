"""Prompt lookup: what followed the last tokens earlier in the row."""

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmnorm.generation import draft as module
from llmnorm.generation.draft import Lookup


@dataclass
class Row:
    slot: int
    ids: list[int]
    chooser: Any = None


def scanned(ids: list[int], count: int) -> list[int]:
    """The definition: look for the longest of the last n-grams from the end on, and read on."""
    for n in (3, 2, 1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[len(ids) - n :]:
                text = list(ids)
                for i in range(count):
                    text.append(text[start + n + i])
                return text[len(ids) :]
    return []


@pytest.mark.parametrize(
    ("ids", "count", "drafts"),
    [
        ([5, 6, 7, 8, 5, 6], 3, [7, 8, 5]),
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2, [8, 1]),  # the last occurrence, not the first
        ([1, 2, 3, 4, 3, 5, 2, 3], 2, [4, 3]),  # two tokens before one
        ([4, 7, 4, 7], 5, [4, 7, 4, 7, 4]),
        ([3, 3], 4, [3, 3, 3, 3]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([1, 1], 0, []),
    ],
)
def test_what_is_proposed(ids: list[int], count: int, drafts: list[int]) -> None:
    """Oracle: examples by hand."""
    assert Lookup().propose([Row(0, ids)], [count])[0].tokens == drafts


@dataclass
class Slots:
    """Rows that come and go, beside a Lookup."""

    lookup: Lookup = field(default_factory=Lookup)
    rows: dict[int, Row] = field(default_factory=dict)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=12)
verbs = st.one_of(
    st.tuples(st.just("new"), st.integers(0, 3), tokens, st.booleans()),
    st.tuples(st.just("grow"), st.integers(0, 3), tokens, st.booleans()),
    st.tuples(st.just("move"), st.integers(0, 3), tokens, st.booleans()),
    st.tuples(st.just("propose"), st.integers(0, 5), tokens, st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(verbs, max_size=25))
def test_proposals_are_those_of_a_scan(history: list[tuple[str, int, list[int], bool]]) -> None:
    """Oracle: a scan of the whole row, whatever rows have been in a slot before."""
    run(history)


def run(history: list[tuple[str, int, list[int], bool]]) -> None:
    slots = Slots()
    for verb, number, some, told in history:
        if verb == "new":
            if told:  # a slot may be given away without a word
                slots.lookup.release(number)
            slots.rows[number] = Row(number, list(some))
        elif verb == "grow" and number in slots.rows:
            slots.rows[number].ids.extend(some)
        elif verb == "move" and number in slots.rows:
            free = next(n for n in range(9) if n not in slots.rows)
            slots.rows[free] = slots.rows.pop(number)
            slots.rows[free].slot = free
            slots.lookup.move(number, free)
        elif verb == "propose":
            rows = list(slots.rows.values())
            found = slots.lookup.propose(rows, [number] * len(rows))
            for row, proposal in zip(rows, found, strict=True):
                assert proposal.tokens == scanned(row.ids, number)
                assert proposal.distributions is None


def test_a_round_costs_what_the_row_has_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: n-grams entered, counted: at most three for each token, each token once."""
    entered = 0

    class Counted(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            nonlocal entered
            entered += 1
            super().__setitem__(key, value)

    lookup, row = Lookup(), Row(0, list(range(500)))
    lookup.propose([row], [4])
    index = lookup._index(row)
    index._after = Counted(index._after)
    for token in (5, 6, 7):
        row.ids.append(token)
        lookup.propose([row], [4])
    assert entered == 3 * module.LONGEST


@pytest.mark.parametrize("error", ["the first occurrence", "a stale row"])
def test_planted_errors_are_caught(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the scan differs from an index that keeps the first occurrence, or another row's."""
    if error == "a stale row":
        monkeypatch.setattr(Lookup, "_index", lambda s, r: s._rows.setdefault(r.slot, _of(r)))
        history = [
            ("new", 0, [1, 2, 1], False),
            ("propose", 2, [0], False),
            ("new", 0, [1, 3, 1], False),
            ("propose", 2, [0], False),
        ]
    else:

        class First(dict[Any, Any]):
            def __setitem__(self, key: Any, value: Any) -> None:
                super().setdefault(key, value)

        make = module._Index.__init__

        def init(self: Any, ids: list[int]) -> None:
            make(self, ids)
            self._after = First()

        monkeypatch.setattr(module._Index, "__init__", init)
        history = [("new", 0, [1, 2, 1, 3, 1], False), ("propose", 2, [0], False)]
    with pytest.raises(AssertionError):
        run(history)


def _of(row: Row) -> Any:
    return module._Index(row.ids)
