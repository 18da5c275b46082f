"""Processors change logits as transformers' do, at every draft position with its own history."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmnorm.generation import truncation
from llmnorm.generation.contract import Proposal, Sampling
from llmnorm.generation.noise import NEAR, Uniforms, exponentials, key, race_of_all
from llmnorm.generation.processors import Changes, History
from llmnorm.generation.sampling import RowChooser, _Lines, _over_vocabulary, verify
from llmnorm.generation.truncation import law_of
from tests.generation.laws import END, PROMPT, law


def laws_of(sampling: Sampling, answer: list[int], drafts: list[int], lines: Tensor) -> Tensor:
    """What is drawn from at each draft position, (drafts + 1, vocabulary)."""
    row = RowChooser(sampling, PROMPT, frozenset({END}), lines.shape[1])
    for token in answer:
        row.commit(token)
    found = _Lines([(row, drafts)], lines)
    assert found.faults == [None] * len(lines)
    laws = [found.law(line) for line in range(len(lines))]
    whole = [_over_vocabulary(law, law.weights(), lines.shape[1]) for law in laws]
    return torch.from_numpy(np.stack(whole)).double()


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 3),
        "top_k": st.integers(1, 40),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.5),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 29), st.floats(-5, 5, width=32), max_size=4),
        "min_tokens": st.integers(0, 6),
        "allowed": st.lists(st.sampled_from([0, 1, 2, 7, 9, 12, 20, 29]), min_size=1),
    },
)
TOKENS = st.lists(st.integers(0, 29), max_size=4)


@settings(max_examples=60, deadline=None)
@given(given=SETTINGS, answer=TOKENS, drafts=TOKENS, seed=st.integers(0, 99))
def test_every_draft_position_has_the_law_of_transformers_processors(
    given: dict[str, Any], answer: list[int], drafts: list[int], seed: int
) -> None:
    """Oracle: transformers' processors in float64, behind the answer and the drafts before."""
    sampling = Sampling(seed=None, **given)
    generator = torch.Generator().manual_seed(seed)
    lines = 3 * torch.randn(len(drafts) + 1, 30, generator=generator, dtype=torch.float64)
    before = lines.clone()
    found = laws_of(sampling, answer, drafts, lines)
    assert torch.equal(lines, before)
    for ahead, line in enumerate(lines):
        want = law(sampling, line, [*answer, *drafts[:ahead]])
        torch.testing.assert_close(found[ahead], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "given", [{"top_p": 0.9}, {"min_p": 0.01}, {"top_p": 0.999, "min_p": 0.001}, {"top_k": 200}]
)
def test_truncation_looks_at_as_many_tokens_as_it_needs(
    given: dict[str, Any], spread: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above, over flat laws too, which need more than the first tokens."""
    generator = torch.Generator().manual_seed(1)
    lines = spread * torch.randn(3, 2000, generator=generator, dtype=torch.float64)
    lines[1] *= 8  # beside it a line that needs few
    sampling = Sampling(seed=None, temperature=1.0, **given)
    found = laws_of(sampling, [], [3, 4], lines.to(dtype))
    for line, have in zip(lines, found, strict=True):
        want = law(sampling, line, [])
        if dtype == torch.float64:
            torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
        else:  # a token at the border may fall on the other side
            torch.testing.assert_close(have, want, rtol=0, atol=1e-4)


def test_the_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: how many weights are put in order, by line; few of 30,000."""
    asked: list[int] = []
    real = truncation._border

    def border(weights: Any, mass: float) -> Any:
        asked.append(len(weights))
        return real(weights, mass)

    monkeypatch.setattr(truncation, "_border", border)
    lines = 6 * torch.randn(4, 30_000, generator=torch.Generator().manual_seed(0)).numpy()
    for rule in (Sampling(top_p=0.9, temperature=1.0), Sampling(top_k=300, top_p=0.99)):
        for line in lines:
            law_of(line, float(line.max()), rule)
    assert len(asked) >= 8 and max(asked) < 3000 and asked[-1] == 300


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300), count=st.integers(1, 9), values=st.integers(1, 500), data=st.data()
)
def test_the_largest_of_a_line(size: int, count: int, values: int, data: st.DataObject) -> None:
    """Oracle: a sort; ties at the border stay, -inf never."""
    line = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, values, size)
    line = np.where(line == 0, -np.inf, line).astype(np.float32)
    count = min(count, size)
    border = np.sort(line)[size - count]
    want = [n for n, value in enumerate(line) if value >= border and value > -np.inf]
    assert truncation.largest_of(line, count).tolist() == want


@given(
    prompt=TOKENS,
    steps=st.lists(st.one_of(st.integers(0, 9), st.integers(-4, -1)), max_size=40),
)
def test_a_history_counts_and_takes_back(prompt: list[int], steps: list[int]) -> None:
    """Oracle: a list of tokens, counted anew; negative steps take so many back."""
    history, answer = History(prompt), list[int]()
    for step in steps:
        if step >= 0:
            history.advance(step)
            answer.append(step)
        elif len(answer) >= -step:
            history.rollback(-step)
            del answer[step:]
        tokens, counts = history.counted()
        assert len(tokens) == len(set(tokens.tolist())) == len({*prompt, *answer})
        assert {t: int(n) for t, n in zip(tokens, counts, strict=True)} == {
            t: answer.count(t) for t in {*prompt, *answer}
        }


def test_changes_are_of_their_line_alone() -> None:
    """Oracle: worked by hand."""
    lines = torch.tensor([[1.0, -1, 2], [1, -1, 2], [0, 0, 0]], dtype=torch.float64)
    changes = Changes()
    assert not changes
    history = History([1, 2])
    history.advance(2)
    rule = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    changes.bias(0, np.array([0, 1]), np.array([3.0, 0.5]))
    changes.penalties(1, rule, history)
    changes.forbid(2, np.array([0]))
    changes.allow(0, np.array([0, 2]))
    assert changes
    changes.make(lines)
    inf = torch.inf
    assert lines.tolist() == [[4.0, -inf, 2.0], [1.0, -2.0, 0.25], [-inf, 0.0, 0.0]]


def test_stop_tokens_cannot_come_before_min_tokens_and_ignored_ends_can() -> None:
    """Oracle: worked by hand; the likeliest tokens are ends."""
    line = torch.tensor([0.0, 1, 2, 3, 0, 9, 8])
    given = {"temperature": 0, "min_tokens": 2, "stop_tokens": frozenset({6})}
    row = RowChooser(Sampling(**given), [1], frozenset({END}), 7)
    ignoring = RowChooser(Sampling(**given, ignore_end=True), [1], frozenset({END}), 7)
    block = line.expand(2, 3, 7)
    verdicts = verify([row, ignoring], block, [0, 0], [Proposal([3, 3]), Proposal([5, 5])])
    assert [verdict.tokens for verdict in verdicts] == [[3, 3, 5], [5, 5, 5]]


def test_noise_is_uniform_and_independent() -> None:
    """Oracle: moments of the exponential law; correlations of neighbours within 4.5 errors."""
    keys = [key(seed, position) for seed in range(8) for position in range(8)]
    found = noise(keys, np.arange(8192)).astype(np.float64)
    count = found.size
    assert found.min() > 0
    for power, mean in ((1, 1), (2, 2), (3, 6), (4, 24)):
        spread = (found**power).std() / count**0.5
        assert abs((found**power).mean() - mean) < 4.5 * spread
    uniform = np.exp(-found) - 0.5
    shifts = (uniform[:, 1:] * uniform[:, :-1], uniform[1:] * uniform[:-1])
    more = (uniform[8:] * uniform[:-8], uniform[:, 2:] * uniform[:, :-2])
    for product in (*shifts, *more):
        assert abs(product.mean()) < 4.5 / 12 / product.size**0.5
    for bits in range(8):  # the lowest ones too
        bit = (np.exp(-found) * 2 ** (bits + 1)).astype(np.int64) % 2
        assert abs(bit.mean() - 0.5) < 4.5 * 0.5 / count**0.5
    numbers = np.array([Uniforms(3)() for _ in range(1)] + [u for u in _uniforms(5, 20_000)])
    assert abs(numbers[1:].mean() - 0.5) < 4.5 * 12**-0.5 / 20_000**0.5
    assert abs(np.corrcoef(numbers[2:], numbers[1:-1])[0, 1]) < 4.5 / 20_000**0.5


def _uniforms(seed: int, count: int) -> list[float]:
    draw = Uniforms(seed)
    return [draw() for _ in range(count)]


def noise(keys: list[int], tokens: Any) -> Any:
    """A line for each key."""
    repeated = np.repeat(np.array(keys, np.uint64), len(tokens))
    return exponentials(repeated, np.tile(tokens, len(keys))).reshape(len(keys), -1)


def test_noise_of_a_token_is_the_same_in_any_company() -> None:
    """Oracle: the whole vocabulary's noise, some of it, another order."""
    keys = [key(1, 2), key(1, 3), key(-1, 2)]
    whole = noise(keys, np.arange(5000))
    some = np.array([4, 4999, 17, 0])
    assert (noise(keys, some) == whole[:, some]).all()
    assert (noise(keys[1:2], some[:1]) == whole[1, 4]).all()
    assert len(np.unique(whole)) > 14_900
    assert key(-1, 2) == key(2**64 - 1, 2)


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_a_race_of_the_whole_vocabulary_looks_at_few_tokens_and_misses_no_winner(
    spread: float,
) -> None:
    """Oracle: the largest of all scores with their noise."""
    generator, far = np.random.default_rng(0), 0
    lines = (spread * generator.standard_normal((300, 700))).astype(np.float32)
    largest, keys = lines.max(-1).tolist(), [key(number, 3) for number in range(300)]
    temperatures = [0.5, 1.0, 1.0] * 100
    found = race_of_all(list(lines), largest, temperatures, keys)
    for number, token in enumerate(found):
        scores = (lines[number].astype(np.float64) - largest[number]) / temperatures[number]
        places = scores - np.log(noise([keys[number]], np.arange(700))[0].astype(np.float64))
        assert token == places.argmax()
        far += scores[token] < -NEAR
    assert far > 0 or spread == 0
