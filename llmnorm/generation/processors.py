"""What changes logits before a token is chosen, for many rows and draft positions at once.

    bias -> penalties -> forbidden ends, allowed tokens -> further processors of the request
         -> temperature -> top-k -> top-p -> min-p

This is the order of Hugging Face's `generate` (transformers 5.23), and of vLLM but for min-p, which
stands before top-k there. Repetition penalty: Keskar et al. 2019 (arXiv 1909.05858); presence and
frequency: OpenAI's API; top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen et al. 2024
(arXiv 2407.01082).

A line is the logits (vocabulary,) of one row at one position: in a verification the k-th line of a
row is that behind its first k drafts, and its penalties count these too. All built-in changes are
noted first and made together (`Changes`), one pass for each kind; further processors come line by
line (sampling.py).

What would surprise: where several tokens have the k-th largest logit, top-k keeps k of them (which
ones is torch.topk's choice), and Hugging Face keeps all. The vocabulary is never sorted: of each
line the likeliest tokens are taken, more of them where they do not hold the mass of top-p.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmnorm.generation.contract import Sampling

FIRST = 64  # tokens of a line that are looked at before more of them are
WIDER = 4  # times as many, each time that they are too few


class History:
    """A row's tokens as penalties see them: which ones there are, and how often in the answer."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._slot = {token: slot for slot, token in enumerate(distinct)}
        self._prompt = len(distinct)
        self._tokens = np.array(distinct, np.int64)
        self._counts = np.zeros(len(distinct), np.float64)
        self._answer: list[int] = []

    def advance(self, token: int) -> None:
        """The answer's next token."""
        self._answer.append(token)
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._tokens):
            room = max(16, slot)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room)])
        self._tokens[slot] = token
        self._counts[slot] += 1

    def rollback(self, count: int) -> None:
        """Take the answer's last `count` tokens back."""
        for _ in range(count):
            token = self._answer.pop()
            slot = self._slot[token]
            self._counts[slot] -= 1
            if slot >= self._prompt and not self._counts[slot]:  # so it was the last one to come
                del self._slot[token]

    def counted(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Distinct tokens of prompt and answer, and how often each is in the answer; copies."""
        size = len(self._slot)
        return self._tokens[:size].copy(), self._counts[:size].copy()


class Changes:
    """What is to be changed in lines (lines, vocabulary), collected, and then made at once."""

    def __init__(self) -> None:
        self._bias: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = []
        self._penalties: list[tuple[int, Sampling, History, tuple[NDArray, NDArray]]] = []
        self._forbidden: list[tuple[int, NDArray[np.int64]]] = []
        self._allowed: list[tuple[int, NDArray[np.int64]]] = []

    def __bool__(self) -> bool:
        return bool(self._bias or self._penalties or self._forbidden or self._allowed)

    def bias(self, line: int, tokens: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Add values to tokens' logits."""
        self._bias.append((line, tokens, values))

    def penalties(self, line: int, sampling: Sampling, history: History) -> None:
        """The penalties of a row whose tokens are now those of `history`."""
        self._penalties.append((line, sampling, history, history.counted()))

    def forbid(self, line: int, tokens: NDArray[np.int64]) -> None:
        """These tokens cannot come."""
        self._forbidden.append((line, tokens))

    def allow(self, line: int, tokens: NDArray[np.int64]) -> None:
        """No other tokens than these can come."""
        self._allowed.append((line, tokens))

    def make(self, lines: Tensor) -> None:
        """Change lines (lines, vocabulary) in place; on a CPU, contiguous."""
        logits = lines.numpy()
        width = lines.shape[1]
        flat = logits.reshape(-1)
        if self._bias:
            index = np.concatenate([line * width + tokens for line, tokens, _ in self._bias])
            flat[index] += np.concatenate([values for *_, values in self._bias])
        if self._penalties:
            sizes = [len(tokens) for *_, (tokens, _) in self._penalties]
            index = np.concatenate(
                [line * width + tokens for line, _, _, (tokens, _) in self._penalties]
            )
            counts = np.concatenate([counts for *_, (_, counts) in self._penalties])
            each = [
                (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
                for _, s, _, _ in self._penalties
            ]
            repetition, presence, frequency = np.repeat(np.array(each).T, sizes, axis=1)
            old = flat[index].astype(np.float64)
            new = np.where(old < 0, old * repetition, old / repetition)
            flat[index] = new - frequency * counts - presence * (counts > 0)
        for line, tokens in self._forbidden:
            logits[line, tokens] = -np.inf
        for line, tokens in self._allowed:
            kept = logits[line, tokens]
            logits[line] = -np.inf
            logits[line, tokens] = kept


class Candidates(NamedTuple):
    """Tokens that may be drawn in some of the lines, the likeliest first.

    Attributes:
        lines: numbers of the lines.
        tokens: ids (lines, tokens); None: the whole vocabulary, in its order.
        scores: (lines, tokens), logits over temperature, less the largest; -inf: cannot be drawn.
    """

    lines: NDArray[np.int64]
    tokens: NDArray[np.int64] | None
    scores: NDArray[np.floating]


def candidates(
    lines: Tensor, numbers: Sequence[int], samplings: Sequence[Sampling]
) -> Iterator[Candidates]:
    """Apply temperature, top-k, top-p and min-p to lines (lines, vocabulary) on a CPU.

    Args:
        lines: changed logits; the largest of each is finite.
        numbers: which of them; the others are not looked at.
        samplings: of each of these; temperatures above 0.

    Yields:
        Each of the numbers once, in groups that need the same number of tokens.
    """
    whole = [i for i, s in enumerate(samplings) if not _truncates(s, lines.shape[1])]
    if whole:
        at = np.array([numbers[i] for i in whole])
        temperature = np.array([[samplings[i].temperature] for i in whole], _numpy_type(lines))
        scores = lines.numpy()[at]
        scores -= scores.max(-1, keepdims=True)
        scores /= temperature
        yield Candidates(at, None, scores)
    cut = [i for i, s in enumerate(samplings) if _truncates(s, lines.shape[1])]
    if cut:
        yield from _truncated(lines, [numbers[i] for i in cut], [samplings[i] for i in cut], FIRST)


def _truncates(sampling: Sampling, vocabulary: int) -> bool:
    top_k = sampling.top_k or vocabulary
    return top_k < vocabulary or sampling.top_p < 1 or sampling.min_p > 0


def _truncated(
    lines: Tensor, numbers: Sequence[int], samplings: Sequence[Sampling], width: int
) -> Iterator[Candidates]:
    vocabulary = lines.shape[1]
    limits = np.array([[s.top_k or vocabulary] for s in samplings])
    top_p = np.array([[s.top_p] for s in samplings])
    min_p = np.array([[s.min_p] for s in samplings])
    temperature = np.array([[s.temperature] for s in samplings])
    width = min(vocabulary, max([width, *(s.top_k for s in samplings if s.top_k)]))
    at = np.array(numbers)
    chosen = lines if len(numbers) == len(lines) else lines[torch.from_numpy(at)]
    top, tokens = (found.numpy() for found in chosen.topk(width))
    with np.errstate(over="ignore"):  # a cold row's far tokens: -inf
        scores = (top.astype(np.float64) - top[:, :1]) / temperature
    scores[np.arange(width) >= limits] = -np.inf
    weights = np.exp(scores)
    # Sums one after another: the same whatever the width is.
    mass = np.cumsum(weights, axis=1)
    limited = limits[:, 0] <= width
    total = mass[:, -1:].copy()
    for i, sampling in enumerate(samplings):
        if sampling.top_p < 1 and not limited[i]:
            total[i] = _mass(chosen[i].numpy(), sampling.temperature)
    enough = (mass[:, -1] >= (top_p * total)[:, 0]) & (top_p < 1)[:, 0]
    enough |= limited | (weights[:, -1] < min_p[:, 0]) | (width == vocabulary)
    outside = (mass - weights >= top_p * total) & (top_p < 1)
    outside[:, 0] = False
    scores[outside | (weights < min_p)] = -np.inf
    if enough.any():
        yield Candidates(at[enough], tokens[enough], scores[enough])
    if not enough.all():
        rest = np.flatnonzero(~enough).tolist()
        yield from _truncated(
            lines, [numbers[i] for i in rest], [samplings[i] for i in rest], width * WIDER
        )


def _mass(line: NDArray[np.floating], temperature: float) -> float:
    """The sum of a whole line's weights, the largest of which is 1, summed in one thread."""
    weights = line - line.max()
    weights /= temperature
    return float(np.exp(weights, out=weights).sum())


def _numpy_type(lines: Tensor) -> type[np.floating]:
    return np.float64 if lines.dtype == torch.float64 else np.float32
