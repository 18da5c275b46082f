"""EXSPEC: which rows are grouped, as a pure function of lengths, and the tokens that rows get."""

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.generation import exspec as module
from llmnorm.generation.eqspec import Costs, eqspec
from llmnorm.generation.exspec import Group, Schedule, exspec, group
from tests.generation.stacked import (
    KINDS,
    CheckedStacks,
    Guesses,
    WrongLogitsError,
    answers,
    expected,
    rows_for,
    target,
)
from tests.generation.test_eqspec import prompts

MOST = 9
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Of every kind."""
    return Schedule(
        batch=draw(st.integers(1, 5)),
        window=draw(st.integers(5, 9)),
        part=draw(st.sampled_from([1.0, 0.5, 0.3])),
        page=draw(st.sampled_from([1, 2, 4])),
        patience=draw(st.integers(1, 4)),
    )


@given(LENGTHS, schedules())
def test_a_group_is_the_first_bucket_that_fills_a_batch(
    lengths: list[int], schedule: Schedule
) -> None:
    """Oracle: every prefix of the window searched for a bucket of a whole batch, by hand."""
    batch, pages = schedule.batch, [math.ceil(n / schedule.page) for n in lengths]
    found = group(lengths, [0] * len(lengths), schedule)
    first = list(range(min(batch, len(lengths))))
    for end in range(len(lengths) + 1):
        full = [page for page, count in Counter(pages[:end]).items() if count == batch]
        if full:
            rows = [row for row in range(end) if pages[row] == full[0]]
            assert found == Group(rows, True)
            return
    most = max(Counter(pages).values())
    if most < schedule.part * batch:
        assert found == Group(first, False)
    else:
        assert found.equal and len(found.rows) == most
        assert found.rows == [r for r, page in enumerate(pages) if page == pages[found.rows[0]]]


@given(st.lists(st.integers(1, 40), max_size=25), schedules(), st.randoms(use_true_random=False))
def test_no_row_starves_and_rows_come_in_order(
    lengths: list[int], schedule: Schedule, chance: random.Random
) -> None:
    """Oracle: the window simulated: nobody among the first rows is passed over for longer than
    `patience` rounds, and all rows end."""
    waiting, window, waited = list(range(len(lengths))), [], dict[int, int]()
    sizes, left = list(lengths), [chance.randint(1, 12) for _ in lengths]
    rounds, fronted = 0, dict[int, int]()  # rounds that one of the first rows was passed over
    while waiting or window:
        while waiting and len(window) < schedule.size:
            window.append(waiting.pop(0))
            waited[window[-1]] = 0
        assert window == sorted(window)
        chosen = group([sizes[n] for n in window], [waited[n] for n in window], schedule)
        assert chosen.rows == sorted(set(chosen.rows)) and 1 <= len(chosen.rows) <= schedule.batch
        front = window[: schedule.batch]
        for number in window:
            waited[number] += 1
        for number in [window[row] for row in chosen.rows]:
            waited[number] = 0
            gained = chance.randint(1, 4)
            sizes[number] += gained
            left[number] -= gained
        fronted = {n: fronted.get(n, 0) + 1 if waited[n] else 0 for n in front}
        assert all(passed <= schedule.patience for passed in fronted.values())
        window = [number for number in window if left[number] > 0]
        rounds += 1
    assert rounds <= 12 * len(lengths)


def test_schedules_that_cannot_be_are_refused() -> None:
    """Oracle: the limits that are told."""
    assert Schedule(4).size == 12
    for wrong in ({"batch": 0}, {"part": 0.0}, {"page": 0}, {"patience": 0}, {"window": 3}):
        with pytest.raises(ValueError, match="batch"):
            Schedule(**{"batch": 4} | wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_get_the_tokens_of_greedy_decoding(kind: str) -> None:
    """Oracle: full passes without a cache; logits of every pass 1e-12, with a state 1e-10."""
    of, chance = target(kind), random.Random(2)
    asked = [prompt[:3] if n % 3 else prompt for n, prompt in enumerate(prompts(6, 9, seed=1))]
    texts = of.continued(asked, MOST)
    ends = [texts[0][-3]]
    runs = [(Schedule(2, 4, part=0.5, page=2, patience=2), 3, 0.7)]
    if kind in ("softmax", "softmax before nala", "Llama, padded"):
        runs += [(Schedule(3), 3, 0.6), (Schedule(1), 6, 1.1), (Schedule(4, 4), 1, -0.1)]
        runs += [(Schedule(8, page=4), 4, 0.8)]
    for schedule, tokens, right in runs:
        draft = Guesses(texts, lambda p=right: chance.random() < p, slots=schedule.size)
        rows, costs = rows_for(asked, ends, max_tokens=MOST), Costs()
        events = list(exspec(of.stacks, draft, rows, tokens, schedule=schedule, costs=costs))
        assert answers(events, asked) == expected(texts, asked, ends, MOST)
        assert not draft.seen, "every row's number was released"
        assert costs.rows <= costs.rounds * schedule.batch


@pytest.mark.parametrize("kind", ["nala", "Llama, padded"])
def test_rows_of_one_length_stay_grouped_and_are_copied_once(kind: str) -> None:
    """Oracle: 8 prompts of one length, drafts that are always right: two batches of 4 that take
    turns in no way; each is stacked once, and EQSPEC stacks in every round."""
    of = target(kind)
    asked = [[n, 1, 2, n] for n in range(8)]
    texts = of.continued(asked, 12)
    stacks, costs = of.stacks, Costs()
    rows = rows_for(asked, max_tokens=12)
    schedule = Schedule(4, 8, patience=9)
    events = list(exspec(stacks, Guesses(texts), rows, 3, schedule=schedule, costs=costs))
    assert answers(events, asked) == expected(texts, asked, [], 12)
    assert stacks.made == [4, 4] and (costs.moved, costs.rounds) == (8, 6)
    assert (costs.grouping_rate, costs.padding_share) == (1, 0)
    assert [event.request for event in events] == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3
    again, other = of.stacks, Costs()
    list(eqspec(again, Guesses(texts), rows_for(asked, max_tokens=12), 3, batch=4, costs=other))
    assert again.made == [4, 4, 4] * 2 and other.moved == 16


@pytest.mark.parametrize(
    ("kind", "made"), [("softmax", [2, 1, 1]), ("nala", [2, 1, 1]), ("Llama, padded", [2, 2, 1])]
)
def test_who_stays_in_a_batch_keeps_its_place_where_the_cache_can(
    kind: str, made: list[int]
) -> None:
    """Oracle: by hand: rows of 3, 3 and 5 tokens, batches of 2, one token a round.

    Rows 0 and 1 are grouped until row 1 ends; then 0, of 5 tokens too, with 2; then 2 is alone.
    """
    of = target(kind)
    asked = [[1, 2, 3], [3, 2, 1], [5, 4, 3, 2, 1]]
    stacks, costs = of.stacks, Costs()
    rows = [rows_for(asked, max_tokens=most)[number] for number, most in enumerate([3, 2, 4])]
    draft = Guesses([], slots=3)
    events = list(exspec(stacks, draft, rows, 1, schedule=Schedule(2, 3), costs=costs))
    assert [event.request for event in events] == [0, 1, 0, 1, 0, 2, 2, 2, 2]
    assert stacks.made == made
    assert (costs.rounds, costs.grouped, costs.moved) == (6, 3, sum(made))


@pytest.mark.parametrize("kind", ["softmax", "softmax before nala", "Llama, padded"])
def test_who_is_left_behind_is_taken_out_of_the_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: groups by hand: rows 0 and 1, then 1 and 2 (0 is taken out, and 2 copied, or both
    where rows cannot stay in their places), then 0 and 3 (1 and 2 are taken out, both copied)."""
    of, asked = target(kind), [[1, 2, 3], [3, 2, 1], [5, 4, 3, 2, 1], [4, 4]]
    texts, chance = of.continued(asked, 9), random.Random(5)
    stacks, told, ordered = of.stacks, [[0, 1], [1, 2], [0, 3]], module.group
    monkeypatch.setattr(
        module, "group", lambda *args: Group(told.pop(0), False) if told else ordered(*args)
    )
    draft = Guesses(texts, lambda: chance.random() < 0.5)
    events = exspec(stacks, draft, rows_for(asked, max_tokens=9), 1, schedule=Schedule(2, 4))
    first = [next(events) for _ in range(6)]
    assert [event.request for event in first] == [0, 1, 1, 2, 0, 3]
    assert stacks.made == [2, 1, 2 if kind == "Llama, padded" else 1, 1, 1, 2]
    assert answers([*first, *events], asked) == expected(texts, asked, [], 9)


@pytest.mark.parametrize("kind", ["softmax", "Llama, padded"])
def test_a_batch_that_fell_back_is_kept_while_it_needs_no_alignment(kind: str) -> None:
    """Oracle: two rows of unequal lengths. As long as both gain alike, one stack; when one row's
    drafts are right and the other's are not, our cache still needs none, and padded rows do."""
    asked, schedule = [[1, 2, 3], [3, 2, 1, 4, 5]], Schedule(2, patience=9)
    of = target(kind)
    texts = of.continued(asked, 8)
    for known, made in ((texts, [2]), (texts[:1], [2, 1] if kind == "softmax" else [2, 2, 2, 1])):
        stacks, rows = of.stacks, rows_for(asked, max_tokens=6)
        list(exspec(stacks, Guesses(known), rows, 1, schedule=schedule))
        assert stacks.made[: len(made)] == made


def test_the_first_rows_have_the_first_numbers_of_the_draft() -> None:
    """Oracle: in rounds that fall back the rows are the window's first, and so are their numbers.

    Lengths are so far apart that no two rows are grouped before the window is nearly empty.
    """
    of = target("softmax")
    asked = [[n] * (1 + 9 * n) for n in range(8)]
    texts, numbers = of.continued(asked, 8), list[list[int]]()

    class Noting(Guesses):
        def propose(self, rows: Any, counts: Any) -> Any:
            numbers.append(sorted(row.slot for row in rows))
            return super().propose(rows, counts)

    most = [3, 7, 1, 5, 2, 6, 4, 8]
    rows = [rows_for(asked, max_tokens=most[n])[n] for n in range(len(asked))]
    costs, schedule = Costs(), Schedule(3, 6)
    list(exspec(of.stacks, Noting(texts, lambda: False), rows, 1, schedule=schedule, costs=costs))
    assert costs.grouped == 0 and costs.rounds >= 12
    assert all(some == list(range(len(some))) for some in numbers)


@pytest.mark.parametrize("error", ["other rows kept", "left behind"])
def test_a_planted_error_is_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: none needed: the checks of the batches see each of them."""
    of, asked, chance = target("softmax"), prompts(7, 6, seed=3), random.Random(0)
    texts = of.continued(asked, MOST)
    right = module._gathered

    def kept(stacks: CheckedStacks, batch: Any, members: Any, window: Any, costs: Costs) -> Any:
        if error == "other rows kept" and batch and len(batch.lengths) == len(members):
            return batch, members
        found, ordered = right(stacks, batch, members, window, costs)
        for member in window:
            if error == "left behind" and member not in members:
                member.place = found, 0
        return found, ordered

    monkeypatch.setattr(module, "_gathered", kept)
    draft = Guesses(texts, lambda: chance.random() < 0.6)
    with pytest.raises((WrongLogitsError, AssertionError)):
        events = list(exspec(of.stacks, draft, rows_for(asked), 3, schedule=Schedule(2, 4)))
        assert answers(events, asked) == expected(texts, asked, [], MOST)
