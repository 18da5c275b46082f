"""The law of an answer's first two tokens, drawn many times, against its exact enumeration.

    python -m tests.generation.laws COMBINATION NOISE DRAFT DRAWS SEED

Target and draft are tables: the logits of the next token are a line of a random matrix, by the last
token. So the law of two tokens is p(a) p(b | a), where p is made from the target's line by
transformers' logits processors in float64 (by their formulas for what has no processor there).
Drafts propose two tokens a round; counts of the pairs are compared by a chi-square test.

The oracle knows nothing of drafts: they may change how many rounds it takes, and not the law.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from llmnorm.generation import choosers
from llmnorm.generation.contract import Proposal, Sampling
from llmnorm.generation.sampling import RowChooser, draw, verify

VOCABULARY, END = 7, 5
PROMPT = (1, 2, 4, 1)
PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.7}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": {0: 2.0, 3: -1.5, END: -torch.inf}},
    "min_tokens": {"min_tokens": 1},
    "allowed": {"allowed": [0, 2, 3, END]},
    "further": {"processors": True},
    "cuts": {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "penalties": PENALTIES,
    "all": {
        **PENALTIES,
        "logit_bias": {0: 1.0, 6: -0.5},
        "allowed": [0, 1, 2, 3, 4, END],
        "min_tokens": 2,
        "temperature": 1.2,
        "top_k": 4,
        "top_p": 0.95,
        "min_p": 0.02,
        "processors": True,
    },
}
NOISES = ("seed", "none")
DRAFTS = ("no", "same", "near", "far", "likeliest")  # the last one proposes without a distribution


class NoRepeat:
    """A processor with a state: no token may come twice in a row."""

    def __init__(self, last: int) -> None:
        self.tokens = [last]

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[self.tokens[-1]] = -torch.inf
        return logits

    def advance(self, token: int) -> None:
        assert token != self.tokens[-1], "a token that was forbidden"
        self.tokens.append(token)

    def rollback(self, count: int) -> None:
        assert count < len(self.tokens)
        del self.tokens[len(self.tokens) - count :]


def tables(seed: int) -> dict[str, Tensor]:
    """The target's logits by last token, and the drafts'."""
    generator = torch.Generator().manual_seed(seed)
    target, other = (
        1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator) for _ in range(2)
    )
    return {"target": target, "same": target, "near": target + 0.4 * other, "far": other}


def sampling(combination: str, seed: int | None) -> Sampling:
    """The combination's settings."""
    given = {"temperature": 1.0, "seed": seed, **COMBINATIONS[combination]}
    if given.get("processors"):
        given["processors"] = (NoRepeat(PROMPT[-1]),)
    return Sampling(**given)


def law(s: Sampling, logits: Tensor, answer: Sequence[int]) -> Tensor:
    """What transformers would draw from, (vocabulary,) of float64, behind the prompt and answer."""
    ids = torch.tensor([[*PROMPT, *answer]])
    steps: list[Any] = []
    if s.logit_bias:
        steps.append(hf.SequenceBiasLogitsProcessor([[[t], v] for t, v in s.logit_bias.items()]))
    if s.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    counts = torch.bincount(
        torch.tensor([*answer], dtype=torch.long), minlength=len(logits)
    ).double()
    taken = s.frequency_penalty * counts + s.presence_penalty * (counts > 0).double()
    steps.append(lambda _, scores: scores - taken)
    if s.min_tokens:
        steps.append(hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), s.min_tokens, END))
    if s.allowed is not None:
        others = [t for t in range(len(logits)) if t not in s.allowed]
        steps.append(hf.SuppressTokensLogitsProcessor(others))
    if s.processors:
        steps.append(hf.SuppressTokensLogitsProcessor([int(ids[0, -1])]))
    if s.temperature != 1:
        steps.append(hf.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(hf.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(hf.TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(hf.MinPLogitsWarper(s.min_p))
    scores = logits.double()[None]
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


class Played(NamedTuple):
    """How often each pair came, and how often a first draft was accepted, of how many."""

    pairs: Counter[tuple[int, int]]
    accepted: int
    first: int


@contextmanager
def fixed_noise(seed: int) -> Iterator[None]:
    """Rows without a seed get noise that is the same in every run."""
    kept, numbers = choosers.fresh_seed, itertools.count(seed << 32)
    choosers.fresh_seed = lambda: next(numbers)
    try:
        yield
    finally:
        choosers.fresh_seed = kept


def play(combination: str, noise: str, draft: str, draws: int, seed: int) -> Played:
    """Draw the first two tokens of `draws` rows, 250 at a time."""
    logits, pairs, accepted = tables(seed), Counter[tuple[int, int]](), 0
    with fixed_noise(seed):
        for start in range(0, draws, 250):
            rows = [
                RowChooser(
                    sampling(combination, start + row if noise == "seed" else None),
                    PROMPT,
                    frozenset({END}),
                    VOCABULARY,
                )
                for row in range(min(250, draws - start))
            ]
            answers: list[list[int]] = [[] for _ in rows]
            accepted += _round(logits, rows, answers, draft, [2] * len(rows))
            short = [number for number, answer in enumerate(answers) if len(answer) < 2]
            if short:
                later = [answers[number] for number in short]
                chosen = [rows[number] for number in short]
                _round(logits, chosen, later, draft, [1] * len(short))
            pairs.update((answer[0], answer[1]) for answer in answers)
    return Played(pairs, accepted, draws)


def _round(
    logits: dict[str, Tensor],
    rows: list[RowChooser],
    answers: list[list[int]],
    draft: str,
    counts: list[int],
) -> int:
    """One round of the rows; how many of them accepted their first draft."""
    last = [[(answer or PROMPT)[-1]] for answer in answers]
    given: list[list[Tensor | None]] = [[] for _ in rows]
    for _ in range(0 if draft == "no" else counts[0]):
        at = torch.tensor([tokens[-1] for tokens in last])
        if draft == "likeliest":
            tokens = logits["near"][at].argmax(-1).tolist()
            found: list[Tensor | None] = [None] * len(rows)
        else:
            tokens, found = draw(rows, logits[draft][at])
        for row, token in enumerate(tokens):
            last[row].append(token)
            given[row].append(found[row])
    proposals = []
    for tokens, q in zip(last, given, strict=True):
        known = [one for one in q if one is not None]
        proposals.append(Proposal(tokens[1:], torch.stack(known) if known else None))
    verdicts = verify(rows, logits["target"][torch.tensor(last)], [0] * len(rows), proposals)
    for answer, verdict in zip(answers, verdicts, strict=True):
        assert verdict.fault is None, verdict.fault
        # What comes behind an end token is dropped by the row; its law is not asked for.
        answer += [*verdict.tokens, END] if verdict.tokens[-1] == END else verdict.tokens
        if END in answer:
            answer[:] = [*answer[: answer.index(END) + 1], END]
    return sum(verdict.accepted > 0 for verdict in verdicts)


def expected(combination: str, seed: int) -> dict[tuple[int, int], float]:
    """The pairs' probabilities; behind an end token comes nothing, told as an end token."""
    s, target = sampling(combination, 0), tables(seed)["target"]
    pairs = {}
    for a, p in enumerate(law(s, target[PROMPT[-1]], ()).tolist()):
        after = torch.eye(VOCABULARY)[END] if a == END else law(s, target[a], (a,))
        for b, q in enumerate(after.tolist()):
            if p * q > 0:
                pairs[a, b] = p * q
    return pairs


def chi_square(counts: Counter[tuple[int, int]], law: dict[tuple[int, int], float]) -> float:
    """The p-value; 0 where a pair came that cannot. Pairs expected under five times are one."""
    draws = sum(counts.values())
    if any(pair not in law for pair in counts):
        return 0.0
    rare = [pair for pair, p in law.items() if p * draws < 5]
    cells = [(counts[pair], p * draws) for pair, p in law.items() if pair not in rare]
    if rare:
        cells.append((sum(counts[p] for p in rare), draws * sum(law[p] for p in rare)))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])) if len(cells) > 1 else 1.0


def first_acceptance(combination: str, noise: str, draft: str, seed: int) -> float:
    """The share of first drafts that theory says are accepted.

    Rejection: sum of min(p, q). Shared noise: sum over x of 1 / sum over y of max(p_y / p_x, q_y /
    q_x) (the two races have one winner: Daliri et al. 2024, arXiv 2408.07978).
    """
    s, made = sampling(combination, 0), tables(seed)
    p, q = (law(s, made[name][PROMPT[-1]], ()) for name in ("target", draft))
    if noise == "none":
        return float(torch.minimum(p, q).sum())
    both = (p > 0) & (q > 0)
    share = torch.maximum(p[None] / p[both][:, None], q[None] / q[both][:, None])
    return float((1 / share.sum(-1)).sum())


def main(words: list[str]) -> int:
    """One combination; the exit code is 1 where the counts do not follow the law."""
    combination, noise, draft = words[:3]
    draws, seed = int(words[3]), int(words[4])
    found = play(combination, noise, draft, draws, seed)
    pairs = expected(combination, seed)
    p = chi_square(found.pairs, pairs)
    told = f"{combination}, {noise}, draft {draft}: {len(pairs)} pairs, {draws} draws: p = {p:.4f}"
    print(f"{told}, first drafts accepted {found.accepted / found.first:.3f}")
    return int(p <= 0.001 / len(pairs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
