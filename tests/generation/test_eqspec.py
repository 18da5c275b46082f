"""EQSPEC: tokens are those of greedy decoding by full passes, and so is every logit on the way."""

import random
from typing import Any

import pytest
from torch import Tensor

from llmnorm.generation import eqspec as module
from llmnorm.generation.contract import Verdict
from llmnorm.generation.eqspec import Costs, eqspec
from llmnorm.generation.stacks import SlotStack
from tests.generation.stacked import (
    FOREIGN,
    KINDS,
    VOCABULARY,
    Guesses,
    WrongLogitsError,
    answers,
    expected,
    rows_for,
    target,
)

LONGEST = {"softmax": 40, "softmax before nala": 20, "Llama, padded": 40}  # prompts
MOST = 12


def prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    """Uneven ones, of 1 token and of `longest` too."""
    chance = random.Random(seed)
    sizes = [longest, 1, *(chance.randint(1, longest) for _ in range(count))][:count]
    return [[chance.randrange(VOCABULARY) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_get_the_tokens_of_greedy_decoding(kind: str) -> None:
    """Oracle: full passes without a cache; logits of every pass 1e-12, with a state 1e-10.

    Batches of 1 to 8 rows, 1 to 6 drafted tokens, drafts that are right always, never, sometimes;
    an end token that ends rows inside of blocks.
    """
    of, chance = target(kind), random.Random(2)
    given = prompts(8, LONGEST.get(kind, 12), seed=1)
    texts = of.continued(given, MOST)
    ends = [texts[0][-3]]
    always, never, mostly = (lambda p=p: chance.random() < p for p in (1.1, -0.1, 0.7))
    runs = [(2, 6, 3, always), (8, 4, 8, mostly)]
    if kind in LONGEST:
        runs += [(1, 2, 2, mostly), (3, 1, 4, never), (4, 3, 8, mostly), (5, 5, 8, always)]
    for batch, tokens, rows, right in runs:
        few = given[:rows]
        draft = Guesses(texts, right, slots=batch)
        own = rows_for(few, ends, max_tokens=MOST)
        events = list(eqspec(of.stacks, draft, own, tokens, batch=batch))
        assert answers(events, few) == expected(texts[:rows], few, ends, MOST)
        assert not draft.seen, "every row's number was released"


def test_a_draft_that_is_always_right_brings_its_bonus_token() -> None:
    """Oracle: K + 1 tokens a round, all of them but one accepted (the release commits K)."""
    of = target("softmax")
    given = prompts(3, 9, seed=3)
    texts = of.continued(given, MOST)
    for tokens in (1, 4, 6):
        costs = Costs()
        rows = rows_for(given, max_tokens=3 * (tokens + 1))
        draft = Guesses(of.continued(given, 21))
        events = list(eqspec(of.stacks, draft, rows, tokens, costs=costs))
        assert [len(event.tokens) for event in events] == [tokens + 1] * 9
        assert [event.accepted for event in events] == [tokens] * 9
        assert (costs.rounds, costs.rows, costs.moved) == (3, 9, 6)
    wrong = list(eqspec(of.stacks, Guesses(texts, lambda: False), rows_for(given), 4))
    assert {len(event.tokens) for event in wrong} == {1}


def test_tokens_behind_an_end_are_dropped_at_every_place_of_a_block() -> None:
    """Oracle: the text up to its end token, whether that is drafted or the bonus token.

    What is drafted behind the end is the true text, so that it would be accepted. The text is drawn
    with a seed, as greedy ones of random models repeat a few tokens.
    """
    of, given = target("softmax"), prompts(1, 7, seed=4)
    keys = {"temperature": 1.0, "seed": 1}
    plain = rows_for(given, speculative=False, **keys)
    answer = answers(list(eqspec(of.stacks, Guesses([]), plain, 1)), given)[0]
    firsts = [n for n, token in enumerate(answer) if token not in answer[:n]]
    assert {n % 6 for n in firsts} == set(range(6))
    text = [*given[0], *answer]
    for place in firsts:
        rows = rows_for(given, [answer[place]], **keys)
        events = list(eqspec(of.stacks, Guesses([text]), rows, 5))
        assert [t for event in events for t in event.tokens] == answer[: place + 1]
        assert events[-1].finish == "stop" and rows[0].ids == text[: len(rows[0].ids)]
        assert sum(event.accepted for event in events) == rows[0].accepted <= place + 1


@pytest.mark.parametrize("kind", ["softmax", *FOREIGN])
def test_end_tokens_in_a_prompt_do_not_end_it_nor_pass_for_padding(kind: str) -> None:
    """Oracle: greedy text of prompts full of the end token, which is what blocks are padded with
    (0), and the padding token of the stock models (2)."""
    of = target(kind)
    given = [[0, 0, 5, 0], [0], [0] * 9, [2, 2, 0, 2]]
    texts = of.continued(given, MOST)
    chance = random.Random(5)
    draft = Guesses(texts, lambda: chance.random() < 0.5)
    events = list(eqspec(of.stacks, draft, rows_for(given, [0, 2]), 4))
    assert answers(events, given) == expected(texts, given, [0, 2], MOST)


def test_each_row_drafts_by_what_is_left_of_it_and_leaves_when_it_ends() -> None:
    """Oracle: min(K, tokens left - 1) counted by hand; rows that have ended are run no more."""
    of = target("softmax")
    given = prompts(3, 9, seed=6)
    draft, costs = Guesses(of.continued(given, MOST)), Costs()
    rows = [
        row
        for number, most in enumerate([1, 4, 12])
        for row in rows_for(given, max_tokens=most)[number : number + 1]
    ]
    events = list(eqspec(of.stacks, draft, rows, 4, costs=costs))
    assert draft.asked == [[0, 3, 4], [4], [1]]
    assert [len(event.tokens) for event in events] == [1, 4, 5, 5, 2]
    assert (costs.rows, costs.moved) == (5, 2)
    asked = rows_for(given[:1], speculative=False, max_tokens=3)
    assert len(list(eqspec(of.stacks, draft, asked, 4))) == 3
    assert len(draft.asked) == 3, "a request without drafts has none"


def test_costs_are_those_of_the_lengths() -> None:
    """Oracle: two rows of 9 and 3 tokens, one token a round, counted by hand."""
    of = target("softmax")
    costs, given = Costs(), [[1] * 10, [2] * 4]
    list(eqspec(of.stacks, Guesses([], slots=2), rows_for(given, max_tokens=2), 1, costs=costs))
    assert (costs.columns, costs.padding) == (2 * 9 + 2 * 10, 6 + 6)
    assert (costs.moved, costs.moved_tokens, costs.rows) == (2, 10 + 4, 4)
    assert costs.realignment_share == 0.5 and costs.padding_share == 12 / 38
    assert costs.grouping_rate == 0


def test_a_row_that_fails_ends_alone() -> None:
    """Oracle: the other rows' greedy text; a processor that raises in its third token."""

    class Failing:
        def __init__(self) -> None:
            self.tokens = 0

        def apply(self, logits: Tensor) -> Tensor:
            if self.tokens > 1:
                raise RuntimeError("no such state")
            return logits

        def advance(self, token: int) -> None:
            self.tokens += 1

        def rollback(self, count: int) -> None:
            self.tokens -= count

    of = target("softmax before nala")
    given = prompts(3, 9, seed=7)
    texts = of.continued(given, MOST)
    rows = rows_for(given, max_tokens=MOST)
    rows[1] = rows_for(given, max_tokens=MOST, processors=[Failing()])[1]
    events = list(eqspec(of.stacks, Guesses(texts), rows, 3))
    (failed,) = (event for event in events if event.finish == "error")
    assert failed.request == 1 and failed.message is not None and "no such state" in failed.message
    found = answers(events, given)
    assert [found[0], found[2]] == [t[len(p) :] for t, p in zip(texts, given, strict=True)][::2]


def test_an_iterator_that_is_closed_early_leaves_no_row_with_the_draft() -> None:
    """Oracle: none needed."""
    of = target("softmax")
    given = prompts(3, 9, seed=8)
    draft = Guesses(of.continued(given, MOST))
    events = eqspec(of.stacks, draft, rows_for(given), 3)
    next(events)
    assert len(draft.seen) == 3
    events.close()
    assert not draft.seen


@pytest.mark.parametrize("error", ["bonus dropped", "one kept", "draft taken for the target's"])
def test_a_planted_error_is_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: none needed: the checks of this file see each of them."""
    of, given = target("softmax"), prompts(4, 9, seed=9)
    texts = of.continued(given, MOST)
    right, drop = module.verify, SlotStack.drop
    chance = random.Random(0)

    def wrong(*args: Any) -> list[Verdict]:
        verdicts = right(*args)
        if error == "bonus dropped":
            return [Verdict(v.tokens[:-1] or v.tokens, v.accepted) for v in verdicts]
        drafts = [proposal.tokens for proposal in args[3]]
        return [
            Verdict([*v.tokens[:-1], *d[v.accepted : v.accepted + 1]] or v.tokens, v.accepted)
            for v, d in zip(verdicts, drafts, strict=True)
        ]

    def kept(self: SlotStack, counts: list[int]) -> None:
        drop(self, [max(0, count - 1) for count in counts])

    if error == "one kept":
        monkeypatch.setattr(SlotStack, "drop", kept)
    else:
        monkeypatch.setattr(module, "verify", wrong)
    costs = Costs()
    draft = Guesses(texts, lambda: chance.random() < 0.7)
    with pytest.raises((WrongLogitsError, AssertionError)):
        events = list(eqspec(of.stacks, draft, rows_for(given), 4, costs=costs))
        assert answers(events, given) == expected(texts, given, [], MOST)
        assert all(len(e.tokens) == e.accepted + 1 or e.finish for e in events)


def test_sampled_rows_are_those_of_plain_decoding() -> None:
    """Oracle: the same seeds, one row at a time, without drafts."""
    of, given = target("softmax"), prompts(5, 9, seed=10)
    keys = {"temperature": 1.0, "top_k": 9, "max_tokens": 12}
    alone = []
    for number, prompt in enumerate(given):
        row = rows_for([prompt], seed=number, speculative=False, **keys)
        alone += answers(list(eqspec(of.stacks, Guesses([]), row, 1)), [prompt])
    texts = [p + a for p, a in zip(given, alone, strict=True)]
    chance = random.Random(11)
    draft = Guesses(texts, lambda: chance.random() < 0.6)
    rows = [rows_for(given, seed=number, **keys)[number] for number in range(len(given))]
    assert answers(list(eqspec(of.stacks, draft, rows, 4, batch=3)), given) == alone
    assert len(set(map(tuple, alone))) == 5
