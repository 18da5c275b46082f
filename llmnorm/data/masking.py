"""Masking for masked language models: which tokens are to be guessed, and what is shown instead.

Source: Devlin et al. 2019, BERT (arXiv 1810.04805), section 3.1: a share of the tokens is to be
guessed; of these 80 % are replaced by the mask token, 10 % by a random one, 10 % stay.

Shape legend: b = rows, C = context length; ids and labels (b, C) int64. Each token has three random
words, uint64: whether it is masked, what replaces it, and which random token.

What would surprise: there is no generator. The words are hashes of (key, row number, column), so a
row has the same masks in any batch, on any process and after any resume. Row n of a run comes once,
so every epoch has masks of its own. Special tokens (bos, eos, padding, the mask itself) are neither
masked nor drawn as random tokens; Hugging Face's collator does draw them.
"""

from collections.abc import Sequence

import numpy as np
import torch

from llmnorm.data.loader import IGNORED
from llmnorm.data.order import GOLDEN, Words, mix


class Masking:
    """Masks tokens of rows.

    Args:
        vocab_size: number of token ids.
        mask: id of the mask token.
        ordinary: ids that may be masked, and from which random tokens are drawn.
        random: share of the masked tokens that are replaced by a random one.
        kept: share of the masked tokens that stay as they are.
    """

    def __init__(
        self, vocab_size: int, mask: int, ordinary: Sequence[int], *, random: float, kept: float
    ) -> None:
        self._mask, self._random, self._kept = mask, random, kept
        self._ordinary = np.asarray(ordinary, np.int64)
        self._is_ordinary = np.zeros(vocab_size, bool)
        self._is_ordinary[self._ordinary] = True

    def __call__(
        self, ids: torch.Tensor, rows: torch.Tensor, *, share: float, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask rows.

        Args:
            ids: (b, C) int64, tokens of the rows.
            rows: (b,) int64, the rows' numbers.
            share: share of the ordinary tokens that is masked.
            key: hash of seed and purpose; other keys mask other tokens.

        Returns:
            What the model is given, and the labels: -100 where nothing is to be guessed. Both
            (b, C) int64.
        """
        shown, length = ids.numpy().copy(), ids.shape[1]
        words = _random_words(key, rows.numpy(), 3 * length).reshape(-1, 3, length)
        of_masking, of_replacement, of_token = words.swapaxes(0, 1)
        masked = (_uniform(of_masking) < share) & self._is_ordinary[shown]
        labels = np.where(masked, shown, IGNORED)
        chance = _uniform(of_replacement)
        by_random = masked & (chance < self._random)
        by_mask = masked & (chance >= self._random + self._kept)
        drawn = self._ordinary[(of_token % np.uint64(len(self._ordinary))).astype(np.int64)]
        shown[by_random] = drawn[by_random]
        shown[by_mask] = self._mask
        return torch.from_numpy(shown), torch.from_numpy(labels)


def _random_words(key: int, rows: np.ndarray, count: int) -> Words:
    """(rows, count) hashes of (key, row, number of the word), uint64."""
    of_row = mix(np.array(key % 2**64, np.uint64)) ^ rows.astype(np.uint64)
    numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(mix(of_row)[:, None] + numbers)


def _uniform(words: Words) -> np.ndarray:
    """Numbers in [0, 1), float64, from the upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53
