"""The step form of linear_recurrence.py: few new tokens behind a state, no gradients (steps.py).

Several tokens are one chunk, with W, D, f and u as there: y = W v + f q S, S' = left S + k^T (u v).
One token's y is q times the new state. Both forms differ by rounding only (tests/nn/test_steps.py).

Shapes: q (batch, new, q_heads, K), k (batch, new, groups, K), v (batch, new, v_heads, V), log_decay
(batch, new, v_heads), state (batch, v_heads, K, V); `wide` is float32, or float64 for float64. In
the private functions for several tokens, "heads" are the v_heads of all rows, in front.
"""

import torch
from torch import Tensor

from llmnorm.nn.mixers.steps import (
    heads_in_front,
    repeated,
    state_before,
    step_decays,
    tokens_in_front,
    written,
)
from llmnorm.nn.precision import without_autocast


def recurrence_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every y_t (batch, new, max(q_heads, v_heads), V), and the state after the last token.

    Args:
        q: queries, which read the state.
        k: keys, under which values are written to the state.
        v: the values.
        log_decay: at most 0; None: no decay.
        state: the state before the first token; None: zeros.
    """
    state = state_before(k, v, state)
    batch, new, heads, _ = v.shape
    with without_autocast(v.device.type):
        if new == 1:
            y, after = _one_token(q, k, v, log_decay, state)
            return y.unsqueeze(1), after
        q = repeated(q, heads).to(state.dtype)
        q = heads_in_front(q).reshape(batch * heads, -1, q.shape[3])  # readers of a state together
        k, v, decay = _heads_in_front(k, v, log_decay, state)
        before = state.flatten(0, 1)
        left = None if decay is None else step_decays(decay)
        y = _read(q, k, v, left, before)
        after = _written(k, v, None if left is None else left[:, -1], before)
    return tokens_in_front(y.reshape(-1, new, y.shape[2]), batch), after.view_as(state)


def state_step(k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> Tensor:
    """The state of `recurrence_step` alone, as a replay wants it (recurrent_cache.py)."""
    state = state_before(k, v, state)
    with without_autocast(v.device.type):
        k, v, decay = _heads_in_front(k, v, log_decay, state)
        left = None if decay is None else step_decays(decay)[:, -1]
        return _written(k, v, left, state.flatten(0, 1)).view_as(state)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y (batch, heads, V) and the state, which keeps its shape and dtype."""
    batch, groups, width = v.shape[0], k.shape[2], v.shape[3]
    by_group = state.contiguous().unflatten(1, (groups, -1))  # (b, g, r, K, V)
    key = k.to(state.dtype).view(batch, groups, 1, -1, 1)
    value = v.to(state.dtype).view(batch, groups, -1, 1, width)
    if log_decay is None:
        after = torch.addcmul(by_group, key, value)
    else:
        left = log_decay.to(state.dtype).exp().view(batch, groups, -1, 1, 1)
        after = (by_group * left).addcmul_(key, value)
    after = after.view(-1, *state.shape[2:])
    q = q.to(state.dtype).view(batch, groups, -1, q.shape[3])
    writers = v.shape[2] // groups
    if writers > 1:  # every head of values is read by its group's query
        q = q.expand(-1, -1, writers, -1)
    y = torch.bmm(q.reshape(after.shape[0], -1, q.shape[3]), after)
    return y.view(batch, -1, width), after.view_as(state)


def _read(q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, state: Tensor) -> Tensor:
    """y (heads, readers new, V), from q (heads, readers new, K), k (heads, new, K), v (heads, new,
    V), what is left (heads, new, 1 + new) or None, and the state before (heads, K, V)."""
    weights, read = (torch.bmm(q, t).unflatten(1, (-1, k.shape[1])) for t in (k.mT, state))
    if left is not None:
        weights, read = weights * left[:, None, :, 1:], read * left[:, None, :, :1]
    return torch.baddbmm(read.flatten(1, 2), weights.tril().flatten(1, 2), v)


def _written(k: Tensor, v: Tensor, left: Tensor | None, state: Tensor) -> Tensor:
    """The state after the last token, of which `left` (heads, 1 + new) of the state before and of
    every token is left: all if None."""
    if left is None:
        return torch.baddbmm(state, k.mT, v)
    return written(k, v, left[:, None], state)


def _heads_in_front(
    k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys (heads, new, K), values (heads, new, V) and decays (heads, new)."""
    k, v = (heads_in_front(t.to(state.dtype)) for t in (repeated(k, v.shape[2]), v))
    if log_decay is None:
        return k, v, None
    return k, v, log_decay.to(state.dtype).transpose(1, 2).flatten(0, 1)
