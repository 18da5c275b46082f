"""Blocks of tokens, one for each row, as the ids of one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rectangle(
    blocks: Sequence[Sequence[int]], device: torch.device, width: int = 1
) -> tuple[Tensor, list[int]]:
    """Ids (rows, longest block, or `width` if that is more), and how many of each row's are real.

    Padding stands behind the real tokens, and is any token.
    """
    counts = [len(block) for block in blocks]
    new = max(width, *counts)
    ids = [[*block, *[0] * (new - len(block))] for block in blocks]
    return torch.tensor(ids, device=device), counts
