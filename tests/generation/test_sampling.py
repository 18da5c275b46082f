"""What is committed follows the target's law, whatever was proposed and whoever else is there."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmnorm.generation import sampling as module
from llmnorm.generation.choosers import RowChooser
from llmnorm.generation.contract import Proposal, Sampling, Verdict
from llmnorm.generation.sampling import draw, verify
from llmnorm.part import InputError
from tests.generation.laws import (
    COMBINATIONS,
    DRAFTS,
    END,
    NOISES,
    PROMPT,
    NoRepeat,
    chi_square,
    expected,
    first_acceptance,
    fixed_noise,
    law,
    play,
    tables,
)

WAYS = [(noise, draft) for noise in NOISES for draft in DRAFTS]
DRAWS = 600


def p_value(combination: str, noise: str, draft: str, draws: int = DRAWS) -> float:
    found = play(combination, noise, draft, draws, seed=11)
    return chi_square(found.pairs, expected(combination, 11))


@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=list(COMBINATIONS))
def test_the_first_two_tokens_follow_the_targets_law(number: int) -> None:
    """Oracle: exact enumeration by transformers' processors; chi-square, fixed seeds.

    A way of drawing for each combination; tools/campaigns/sampling.py plays all, with more draws.
    """
    combination = list(COMBINATIONS)[number]
    noise, draft = WAYS[number * 3 % len(WAYS)]
    assert p_value(combination, noise, draft) > 0.001 / len(expected(combination, 11))


@pytest.mark.parametrize(("noise", "draft"), WAYS)
def test_no_draft_changes_the_law(noise: str, draft: str) -> None:
    """Oracle: as above, with all settings at once."""
    assert p_value("all", noise, draft) > 0.001 / len(expected("all", 11))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("draft", ["same", "near", "far"])
@pytest.mark.parametrize("combination", ["plain", "cuts"])
def test_drafts_are_accepted_as_often_as_theory_says(
    combination: str, draft: str, noise: str
) -> None:
    """Oracle: 1 - TV, and the formula for shared noise; within 4.5 standard errors."""
    found = play(combination, noise, draft, DRAWS, seed=5)
    share = first_acceptance(combination, noise, draft, 5)
    error = math.sqrt(max(share * (1 - share), 1e-12) / DRAWS)
    assert abs(found.accepted / found.first - share) <= 4.5 * error
    assert draft != "same" or share == pytest.approx(1)


def wrong_residual(p: Any, drafted: int, q: Any) -> Any:
    return p


def forgets_the_drafts(self: RowChooser, changes: Any, line: int, drafts: Sequence[int]) -> None:
    for ahead in range(len(drafts) + 1):
        KEPT["note"](self, changes, line + ahead, [])


def shares_noise(self: RowChooser, ahead: int) -> int:
    return KEPT["key"](self, 0) * 0 + self._prompt + len(self._answer) + ahead


def same_noise_for_each_draft(self: RowChooser, ahead: int) -> int:
    return KEPT["key"](self, 0)


KEPT: dict[str, Any] = {"note": RowChooser.note, "key": RowChooser.key}
ERRORS: dict[str, tuple[Any, str, Any, tuple[str, str, str]]] = {
    "residual": (module, "_residual", wrong_residual, ("plain", "none", "far")),
    "prefix": (RowChooser, "note", forgets_the_drafts, ("penalties", "seed", "same")),
    "noise of rows": (RowChooser, "key", shares_noise, ("plain", "seed", "no")),
    "noise of drafts": (RowChooser, "key", same_noise_for_each_draft, ("plain", "seed", "same")),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_caught(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same test fails with the error, and passes without it."""
    owner, name, wrong, way = ERRORS[error]
    bar = 0.001 / len(expected(way[0], 11))
    draws = 1500 if error == "noise of drafts" else DRAWS
    assert p_value(*way, draws) > bar
    monkeypatch.setattr(owner, name, wrong)
    assert p_value(*way, draws) < bar


def chooser(prompt: Sequence[int] = PROMPT, **given: Any) -> RowChooser:
    return RowChooser(Sampling(**given), prompt, frozenset({END}), 7)


def continued(
    rows: list[RowChooser], target: Tensor, draft: Tensor | None, tokens: int, drafts: int
) -> list[list[int]]:
    """Continue rows by tables of logits, `drafts` tokens proposed a round."""
    answers: list[list[int]] = [[] for _ in rows]
    while min(map(len, answers)) < tokens:
        last = [[(answer or PROMPT)[-1]] for answer in answers]
        for _ in range(0 if draft is None else drafts):
            found, _ = draw(rows, draft[torch.tensor([line[-1] for line in last])])
            for line, token in zip(last, found, strict=True):
                line.append(token)
        logits = target[torch.tensor(last)]
        proposals = [Proposal(line[1:]) for line in last]
        for answer, verdict in zip(
            answers, verify(rows, logits, [0] * len(rows), proposals), strict=True
        ):
            answer += verdict.tokens
    return [answer[:tokens] for answer in answers]


SEEDED = [
    {"seed": 3, "temperature": 1.0},
    {"seed": 4, "temperature": 0.7, "top_p": 0.9},
    {"seed": -1, "temperature": 1.3, "top_k": 3, "repetition_penalty": 1.4},
    {"seed": 2**64 - 2, "min_p": 0.1, "presence_penalty": 0.5, "min_tokens": 4},
    {"seed": 9, "temperature": 0.0, "frequency_penalty": 0.3},
    {"seed": 3, "temperature": 1.0, "logit_bias": {2: 1.0}, "ignore_end": True},
]


def test_a_seeded_text_is_the_same_alone_among_others_in_any_order_and_with_any_draft() -> None:
    """Oracle: each row alone, without a draft."""
    made = tables(8)
    target, other = made["target"], made["far"]
    alone = [continued([chooser(**s)], target, None, 24, 0)[0] for s in SEEDED]
    assert len({tuple(text) for text in alone}) == len(alone)
    for drafts in (0, 1, 4):
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 4]):
            rows = [chooser(**SEEDED[row]) for row in order]
            found = continued(rows, target, other if drafts else None, 24, drafts)
            assert found == [alone[row] for row in order]
    # A row without a seed beside them changes nothing.
    rows = [chooser(seed=None), *(chooser(**s) for s in SEEDED)]
    assert continued(rows, target, other, 24, 3)[1:] == alone


def test_noise_depends_on_the_position_in_the_text_and_on_the_seed() -> None:
    """Oracle: flat logits, so that tokens are the noise's choice alone."""
    flat = torch.zeros(7, 7)
    text = continued([chooser(seed=1, temperature=1.0)], flat, None, 200, 0)[0]
    assert all(abs(text.count(token) / 200 - 1 / 7) < 0.12 for token in range(7))
    later = continued([chooser([*PROMPT, 0], seed=1, temperature=1.0)], flat, None, 199, 0)[0]
    assert later == text[1:]
    assert continued([chooser(seed=2, temperature=1.0)], flat, None, 200, 0)[0] != text


def test_threads_change_nothing() -> None:
    """Oracle: one thread; the whole vocabulary, so that all of it is hashed."""
    logits = torch.randn(3, 1, 40_000)
    given = [{"seed": 1}, {"seed": 2, "top_p": 0.5}, {"seed": 3, "temperature": 0}]

    def tokens() -> list[list[int]]:
        rows = [RowChooser(Sampling(**s), [1], frozenset(), 40_000) for s in given]
        return [v.tokens for v in verify(rows, logits, [0] * 3, [Proposal([])] * 3)]

    kept = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tokens()
        torch.set_num_threads(4)
        assert tokens() == one
    finally:
        torch.set_num_threads(kept)


def test_greedy_rows_take_the_lowest_id_of_equals_among_sampled_rows() -> None:
    """Oracle: worked by hand."""
    logits = torch.tensor([[0.0, 2, 2, 1, 2, 0, 0], [1.0] * 7, [0.0, 0, 3, 0, 0, 0, 0]])
    rows = [chooser(temperature=0), chooser(temperature=0), chooser(seed=None, temperature=1e-6)]
    rows.append(chooser(seed=None))
    logits = torch.cat([logits, logits[:1]])
    found = verify(rows, logits[:, None], [0] * 4, [Proposal([])] * 4)
    assert [verdict.tokens for verdict in found[:3]] == [[1], [0], [2]]


@pytest.mark.parametrize("given", [{"temperature": 0}, {"seed": 4}, {"seed": None}])
def test_all_drafts_accepted_bring_the_bonus_token_too(given: dict[str, Any]) -> None:
    """Oracle: a draft that is the target; K + 1 tokens a round."""
    target = tables(2)["target"]
    row, last, q = chooser(**given), [PROMPT[-1]], []
    for _ in range(5):
        tokens, found = draw([row], target[torch.tensor([last[-1]])])
        last += tokens
        q += [one for one in found if one is not None]
    proposal = Proposal(last[1:], torch.stack(q) if q else None)
    verdict = verify([row], target[torch.tensor([last])], [0], [proposal])[0]
    assert verdict.accepted == 5 and len(verdict.tokens) == 6 and verdict.tokens[:5] == last[1:]


def test_a_draft_that_is_never_right_brings_one_token() -> None:
    """Oracle: greedy continuation of the tables, and drafts of the least likely token."""
    target = tables(2)["target"]
    row, last = chooser(temperature=0), PROMPT[-1]
    for _ in range(6):
        drafts = [int(target[last].argmin()), 0, 1]
        logits = target[torch.tensor([[last, *drafts]])]
        verdict = verify([row], logits, [0], [Proposal(drafts)])[0]
        last = int(target[last].argmax())
        assert (verdict.tokens, verdict.accepted) == ([last], 0)


def test_the_pending_token_may_stand_anywhere_and_rows_may_have_other_numbers_of_drafts() -> None:
    """Oracle: each row by itself, its block at the beginning."""
    target, alone = tables(6)["target"], []
    blocks = [[1, 2, 3], [4], [1, 6, 2, 2], [3, 3]]
    for number, block in enumerate(blocks):
        row = chooser(seed=number, logprobs=2)
        alone += verify([row], target[torch.tensor([block])], [0], [Proposal(block[1:])])
    first, padded = [0, 3, 0, 1], torch.zeros(4, 4, dtype=torch.long)
    for number, block in enumerate(blocks):
        padded[number, first[number] : first[number] + len(block)] = torch.tensor(block)
    rows = [chooser(seed=number, logprobs=2) for number in range(4)]
    proposals = [Proposal(block[1:]) for block in blocks]
    assert verify(rows, target[padded], first, proposals) == alone


def test_log_probabilities_are_the_targets_before_any_processor() -> None:
    """Oracle: log_softmax of the raw logits; the chosen token's is the same number there."""
    target = tables(4)["target"]
    row = chooser(
        seed=1, logprobs=3, repetition_penalty=5.0, logit_bias={3: 4.0}, top_k=2, temperature=0.3
    )
    seen, last = 0, PROMPT[-1]
    for _ in range(12):
        drafts = [int(target[last].argmax()), 2]
        before = target.clone()
        logits = target[torch.tensor([[last, *drafts]])]
        verdict = verify([row], logits, [0], [Proposal(drafts)])[0]
        assert torch.equal(target, before)
        raw = target[torch.tensor([last, *verdict.tokens[:-1]])].double().log_softmax(-1)
        assert verdict.chosen is not None and len(verdict.chosen) == len(verdict.tokens)
        for line, token, chosen in zip(raw, verdict.tokens, verdict.chosen, strict=True):
            assert chosen.logprob == pytest.approx(float(line[token]), abs=1e-6)
            assert [token for token, _ in chosen.top] == line.topk(3).indices.tolist()
            assert dict(chosen.top).get(token, chosen.logprob) == chosen.logprob
            seen += token in dict(chosen.top)
        last = verdict.tokens[-1]
    assert seen
    none = chooser(seed=1, logprobs=0)
    verdict = verify([none], target[None, None, 0], [0], [Proposal([])])[0]
    assert verdict.chosen is not None and verdict.chosen[0].top == []


class Raises(NoRepeat):
    """A processor that breaks at a token."""

    def apply(self, logits: Tensor) -> Tensor:
        if self.tokens[-1] == 3:
            raise KeyError("no rule for 3")
        return logits


def test_a_fault_costs_its_row_alone() -> None:
    """Oracle: the other rows' tokens are those of a batch without the faulty ones."""
    target = tables(9)["target"]
    logits = target[torch.tensor([[1, 3]] * 5)].clone()
    logits[1, 0, 4] = torch.nan
    logits[2, 1, 0] = torch.inf

    def rows() -> list[RowChooser]:
        broken = Sampling(seed=6, processors=(Raises(1),), logit_bias={3: 100.0})
        return [
            chooser(seed=1),
            chooser(seed=2),
            chooser(seed=3, logit_bias={3: 100.0}),  # so that the second line counts
            RowChooser(broken, PROMPT, frozenset(), 7),
            chooser(seed=4, allowed=[END], min_tokens=9),
        ]

    found = verify(rows(), logits, [0] * 5, [Proposal([3])] * 5)
    assert (
        found[0]
        == verify([chooser(seed=1)], target[torch.tensor([[1, 3]])], [0], [Proposal([3])])[0]
    )
    assert [verdict.fault for verdict in found] == [
        None,
        "the model's logits are not finite numbers",
        None,  # of the token after the next one
        "a processor of the request has failed: KeyError: 'no rule for 3'",
        "no token is left that the row's limits allow",
    ]
    assert [verdict.tokens for verdict in found[1:]] == [[], [3], [], []]
    # Drafts that were accepted before a fault are committed; the next round has the fault.
    row, block = chooser(temperature=0), tables(9)["target"][torch.tensor([[1, 0, 0, 0]])].clone()
    drafts = block[0, :2].argmax(-1).tolist()
    block[0, 2] = torch.nan
    verdict = verify([row], block, [0], [Proposal([*drafts, 1])])[0]
    assert verdict == Verdict(drafts, 1)
    assert verify([row], block[:, 2:3], [0], [Proposal([])])[0].fault is not None
    # A draft's own faults cost nothing but its proposal.
    tokens, laws = draw([chooser(seed=None), chooser(seed=1)], torch.full((2, 7), torch.nan))
    assert tokens == [0, 0] and laws == [None, None]


def test_further_processors_are_not_asked_behind_an_end_or_what_they_forbid() -> None:
    """Oracle: NoRepeat itself refuses a token that it has forbidden; its tokens are the row's."""
    target = tables(3)["target"]
    for drafts in ([2, 2, 3], [END, END, 1], [0, END, END]):
        rule = NoRepeat(PROMPT[-1])
        row = RowChooser(Sampling(temperature=0, processors=(rule,)), PROMPT, frozenset({END}), 7)
        committed = list(PROMPT[-1:])
        for _ in range(4):
            logits = target[torch.tensor([[committed[-1], *drafts]])]
            logits[..., END] -= 9 * (END not in drafts)
            verdict = verify([row], logits, [0], [Proposal(drafts)])[0]
            committed += verdict.tokens
            if END in verdict.tokens:
                committed = committed[: committed.index(END)]
                break
        assert rule.tokens == committed


def test_hypothetical_tokens_are_taken_back_by_count() -> None:
    """Oracle: a chooser that was never advanced; the next verdicts are equal."""
    target = tables(5)["target"]
    given: dict[str, Any] = {"seed": 2, "repetition_penalty": 1.7, "frequency_penalty": 0.5}
    for way in ("rollback", "verify"):
        rule, other = NoRepeat(1), NoRepeat(1)
        row, fresh = chooser(**given, processors=(rule,)), chooser(**given, processors=(other,))
        for _ in range(3):
            draw([row], tables(1)["far"][:1])
        if way == "rollback":
            row.rollback(2)
            row.rollback(1)
            assert rule.tokens == other.tokens
        for token in (3, 0, 6):
            logits = target[None, None, token]
            a, b = (verify([one], logits, [0], [Proposal([])]) for one in (row, fresh))
            assert a == b
        assert rule.tokens == other.tokens
    with pytest.raises(ValueError, match="rollback of 1 tokens: 0 are hypothetical"):
        fresh.rollback(1)


def test_distributions_of_a_draft_are_those_of_the_rows_processors() -> None:
    """Oracle: transformers' processors, behind the hypothetical tokens too."""
    given = {"seed": None, "top_p": 0.8, "repetition_penalty": 1.6, "temperature": 0.9}
    row, logits = chooser(**given), tables(7)["far"]
    answer: list[int] = []
    with fixed_noise(3):
        for _ in range(4):
            tokens, found = draw([row], logits[len(answer)][None])
            assert found[0] is not None
            want = law(row.sampling, logits[len(answer)], answer)
            torch.testing.assert_close(found[0].double(), want, rtol=0, atol=1e-6)
            assert want[tokens[0]] > 0
            answer += tokens


def test_a_residual_without_mass_is_the_targets_law() -> None:
    """Oracle: Hugging Face draws from nan there; p = q up to rounding is p."""
    p = np.array([0.25, 0.75])
    assert module._residual(p, 0, p.copy()).tolist() == [0.25, 0.75]
    assert module._residual(np.array([1.0, 0.0]), 0, None).tolist() == [1.0, 0.0]
    assert module._residual(p, 1, None).tolist() == [0.25, 0]
    assert module._residual(p, 1, np.array([0.0, 1.0])).tolist() == [0.25, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0: must be a number from 0 on"),
        ({"temperature": math.nan}, "temperature: nan: must be a number from 0 on"),
        ({"top_k": 0}, "top_k: 0: must be at least 1, or None"),
        ({"top_p": 0.0}, "top_p: 0.0: must be above 0 and at most 1"),
        ({"min_p": 1.0}, "min_p: 1.0: must be at least 0 and below 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0: must be above 0"),
        ({"logprobs": -1}, "logprobs: -1: must be at least 0, or None"),
        ({"allowed": []}, "allowed: no token is allowed"),
        ({"allowed": [3, 7]}, "allowed: there is no token 7: the model has 7, from 0 on"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: there is no token -1"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: token 1: nan: must be a number, or -inf"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(InputError) as raised:
        chooser(**given)
    assert str(raised.value).startswith(message)


def test_bfloat16_logits_and_few_tokens_left() -> None:
    """Oracle: float32 of the same numbers; a single token that may come, comes."""
    logits = tables(1)["target"].bfloat16()

    def tokens(numbers: Tensor) -> list[Verdict]:
        rows = [chooser(seed=7), chooser(seed=8, allowed=[6]), chooser(temperature=0)]
        return verify(rows, numbers[:3, None], [0] * 3, [Proposal([])] * 3)

    assert tokens(logits) == tokens(logits.float())
    assert tokens(logits)[1].tokens == [6]
