"""Passes of few tokens, as in decoding: when a recurrent mixer takes them in one step, and decays.

A chunk's machinery (autograd's wrappers, blocks, documents) costs more than the arithmetic of one
token. So beside its chunked form each recurrence has a step form: plain operators, no gradients, no
documents, one masked (new, new) block and one update of the state: `recurrence_step`
(linear_step.py), `sums_step` (normalised_sums.py), `channel_step` (gla.py), `delta_step`
(gated_delta.py) and `ShortConvolution.step`. A replay wants the state alone, and has a function of
its own beside each. Both forms differ by rounding only: 1e-12 in float64 (tests/nn/test_steps.py).

Only passes with a cache take it. Training, and evaluation of short rows, keep the chunked form and
so keep their bits. Nothing in a step depends on a value, so torch.jit.trace can follow it.
"""

import torch
from torch import Tensor

from llmnorm.nn.layer_cache import VERIFIED
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.places import Places
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Cached

MOST = VERIFIED  # tokens


def is_few(inputs: Tensor) -> bool:
    """Whether inputs (batch, new, ...), of which no gradient is wanted, are taken in one step."""
    return inputs.shape[1] <= MOST


def takes_step(x: Tensor, context: Context) -> bool:
    """Whether a mixer takes the new tokens x (batch, new, ...) of this pass in one step."""
    cached = isinstance(context.visibility, Cached)
    return cached and is_few(x) and not torch.is_grad_enabled()


def counts_of(places: Places) -> Tensor | None:
    """(rows,) real new tokens of each row, on the device; None: all are real."""
    return None if places.real is None else places.counted


def state_before(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The state (batch, heads, K, V) before a pass of k (batch, new, ..., K) and v (batch, new,
    heads, V), in the dtype that states have; zeros if None."""
    wide = wide_dtype(v.dtype)
    if state is None:
        return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=wide)
    return state.to(wide)


def repeated(x: Tensor, heads: int) -> Tensor:
    """A group's keys or queries (batch, new, groups, K) for each of its `heads` of values."""
    groups = x.shape[2]
    return x if groups >= heads else x.repeat_interleave(heads // groups, 2)


def written(k: Tensor, v: Tensor, left: Tensor, state: Tensor) -> Tensor:
    """The state (heads, K, V) after keys (heads, new, K) wrote values (heads, new, V).

    `left` (heads, K or 1, 1 + new) is what is left of the state before, and of every token.
    """
    return (state * left[..., :1]).baddbmm_(k.mT * left[..., 1:], v)


def heads_in_front(x: Tensor) -> Tensor:
    """(batch, new, heads, dim) -> (batch heads, new, dim), the batches of torch.bmm."""
    if x.shape[1] == 1:
        return x.reshape(-1, 1, x.shape[3])
    return x.transpose(1, 2).flatten(0, 1)


def tokens_in_front(x: Tensor, batch: int) -> Tensor:
    """(batch heads, new, dim) -> (batch, new, heads, dim)."""
    if x.shape[1] == 1:
        return x.view(batch, 1, -1, x.shape[2])
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def step_decays(g: Tensor) -> Tensor:
    """What is left at token i, (..., new) -> (..., new, 1 + new), for log decays g.

    [..., i, 0] of the state before, [..., i, 1 + j] of token j; 1 for j > i, which a mask removes.
    So the last i has what is left behind the pass. Sums are of their own terms (chunks.py):
    g = [a, b] -> exp of [[a, 0, 0], [a + b, b, 0]].
    """
    new = g.shape[-1]
    terms = g[..., None].expand(*g.shape, new + 1).tril()  # [l, j]: g_l where l >= j
    return terms.cumsum(-2).exp_()
