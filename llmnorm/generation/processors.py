"""What changes logits before a token is chosen, for many rows and draft positions at once.

    bias -> penalties -> forbidden ends, allowed tokens -> further processors of the request
         -> temperature -> top-k -> top-p -> min-p                             (truncation.py)

This is the order of Hugging Face's `generate` (transformers 5.23), and of vLLM but for min-p, which
stands before top-k there. Repetition penalty: Keskar et al. 2019 (arXiv 1909.05858); presence and
frequency: OpenAI's API.

A line is the logits (vocabulary,) of one row at one position: in a verification the k-th line of a
row is that behind its first k drafts, and its penalties count these too. All built-in changes are
noted first and made together (`Changes`), one pass for each kind; further processors come line by
line (sampling.py).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmnorm.generation.contract import Sampling


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
