"""Which tokens of a row are masked, and by what.

Source: Devlin et al. 2019, BERT (arXiv 1810.04805), section 3.1: a share of the tokens is to be
guessed; of these 80 % are replaced by the mask token, 10 % by a random one, 10 % stay.

Shape legend: b = rows, C = context length; ids and labels (b, C) int64; words (b, 3, C) uint64:
whether, what, by which token.

What would surprise: there is no generator. The words are hashes of (key, row number, column), so a
row has the same masks in any batch, on any process and after any resume; row n of a run comes once,
so every epoch has masks of its own. Special tokens (what stands between documents, padding) are
neither masked nor put in a token's place; Hugging Face's collator does draw them.
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
        ordinary: ids that may be masked and put in a token's place.
        random: share of the masked tokens that become a random one.
        kept: share of them that stay as they are.
    """

    def __init__(
        self, vocab_size: int, mask: int, ordinary: Sequence[int], *, random: float, kept: float
    ) -> None:
        self._mask, self._random, self._kept = mask, random, kept
        self._ordinary = np.asarray(ordinary, np.int64)
        self._may = np.zeros(vocab_size, bool)
        self._may[self._ordinary] = True

    def __call__(
        self, ids: torch.Tensor, rows: torch.Tensor, *, share: float, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model sees (b, C), and the labels (b, C), -100 where nothing is to be guessed.

        Args:
            ids: (b, C) the rows.
            rows: (b,) their numbers.
            share: of the ordinary tokens, how many are masked.
            key: seed and purpose; other keys mask other tokens.
        """
        seen, length = ids.numpy().copy(), ids.shape[1]
        whether, what, which = (
            _words(key, rows.numpy(), 3 * length).reshape(-1, 3, length).swapaxes(0, 1)
        )
        masked = (_uniform(whether) < share) & self._may[seen]
        labels = np.where(masked, seen, IGNORED)
        chance = _uniform(what)
        replaced = masked & (chance < self._random)
        gone = masked & (chance >= self._random + self._kept)
        drawn = self._ordinary[(which % np.uint64(len(self._ordinary))).astype(np.int64)]
        seen[replaced] = drawn[replaced]
        seen[gone] = self._mask
        return torch.from_numpy(seen), torch.from_numpy(labels)


def _words(key: int, rows: np.ndarray, count: int) -> Words:
    """(rows, count) hashes of (key, row, place)."""
    begin = mix(np.array(key % 2**64, np.uint64)) ^ rows.astype(np.uint64)
    places = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(mix(begin)[:, None] + places)


def _uniform(words: Words) -> np.ndarray:
    """In [0, 1), of the upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53
