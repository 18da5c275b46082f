"""What the figures of `Mixer.health` are made of: numbers that tell whether a mixer still mixes.

A name that begins with min_ or max_ is the smallest or largest over real tokens and heads, any
other a mean over them:
  entropy          of a token's weights over the logarithm of the tokens it sees: 1 looks at all of
                   them alike, 0 at one; tokens that see only themselves are left out
  max_logit        softmax: the largest q_i k_j / sqrt(head_dim)
  min_denominator  sums of weights over the number of tokens summed, what `eps` is added to: near it
                   or below, outputs fall to 0
  row_sum          |sum of a row of the matrix|, rotated weights over unrotated ones
  saturation       NaLa: share of queries whose power is within 1e-3 of its largest, so that their
                   norm has no say any more
  decay            what a step leaves of the state: 1 keeps all of it, 0 nothing
  delta            Hydra: the diagonal

Entropies need every pair of tokens: a few queries of a row at a time, so that memory is linear in
the length, as is fit for a look every some hundred steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.precision import wide_dtype

QUERIES = 128


def queries(
    like: Tensor, context: Context, *, causal: bool, window: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A row's number, indices (n,) of some of its real tokens, and what they see, (n, length).

    like (batch, length, ...); together the pieces are all real tokens of all rows.
    """
    batch, length = like.shape[:2]
    everywhere = torch.arange(length, device=like.device)
    for row in range(batch):
        real = None if context.real is None else context.real[row]
        tokens = everywhere if real is None else everywhere[real]
        for some in tokens.split(QUERIES):
            behind = some[:, None] - everywhere
            visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
            if window is not None:
                visible = visible & (behind < window)
            if context.segments is not None:
                visible = visible & (context.segments[row, some, None] == context.segments[row])
            if real is not None:
                visible = visible & real
            yield row, some, visible


def entropies(weights: Tensor, visible: Tensor) -> Tensor:
    """Entropies, over that of equal weights, of the tokens that see more than one.

    weights (heads, n, length), at least 0, their sums 1; visible (n, length) -> (heads, m).
    """
    count = visible.sum(-1)
    found = torch.special.entr(weights).sum(-1) / count.to(weights.dtype).log()
    return found[:, count > 1]


def mean(parts: list[Tensor]) -> Tensor:
    """The mean of all entries; 0 if there is none."""
    total = torch.cat([part.flatten() for part in parts])
    return total.sum() / max(total.numel(), 1)


def mean_over_tokens(x: Tensor, context: Context) -> Tensor:
    """The mean of x (batch, length, ...) over real tokens, in float32 or float64."""
    x = x.to(wide_dtype(x.dtype))
    return (x if context.real is None else x[context.real]).mean()
