"""Mixing one token at a time, as plain loops: the oracle of the chunked engines and of the mixers.

Shapes: q (batch, length, heads, K), k (batch, length, heads, K), v (batch, length, heads, V), fewer
heads being shared by neighbours; g, the logarithm of what is left, (batch, length, heads) or a
channel's own (batch, length, heads, K); share (batch, length, heads); state (batch, heads, K, V).
"""

from typing import Any

import torch
from torch import Tensor

from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.gated_delta import GatedDeltaNet
from llmnorm.nn.mixers.gla import GatedLinearAttention
from llmnorm.nn.mixers.hydra import Direction, Hydra
from llmnorm.nn.mixers.linear import LinearAttention
from llmnorm.nn.mixers.matrix.low_rank import LowRank
from llmnorm.nn.mixers.matrix.mixer import MatrixMixer
from llmnorm.nn.mixers.matrix.quasiseparable import Quasiseparable
from llmnorm.nn.mixers.ssd import SSD
from llmnorm.nn.visibility import visible_tokens


def token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S = exp(g) S + k v^T, y = q S; with a share b of the delta rule v is b (v - k S)."""
    heads, outs = max(q.shape[2], v.shape[2]), []
    q = q.repeat_interleave(heads // q.shape[2], 2)
    k = k.repeat_interleave(v.shape[2] // k.shape[2], 2)
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3])
    for t in range(q.shape[1]):
        if segments is not None and t:
            another = segments[:, t] != segments[:, t - 1]
            state = state.masked_fill(another[:, None, None, None], 0)
        if g is not None:
            left = g[:, t].exp()
            state = state * (left[..., None] if left.ndim == 3 else left[..., None, None])
        written = v[:, t]
        if share is not None:
            stored = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            written = share[:, t, :, None] * (written - stored)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        seen = state.repeat_interleave(heads // state.shape[1], 1)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], seen))
    return torch.stack(outs, 1), state


def mixed_token_by_token(mixer: Mixer, p: Any, context: Context) -> Tensor | None:
    """What `mix` gives for these parameters; None: this mixer is no recurrence."""
    segments = context.segments
    match mixer:
        case LinearAttention():
            return _normalised(mixer, p, context)
        case SSD():
            y, _ = token_by_token(p.C, p.B, p.v * p.dt[..., None], p.log_decay, segments)
            return y + mixer.D[:, None] * p.v
        case GatedLinearAttention():
            return token_by_token(p.q, p.k, p.v, p.log_gate, segments)[0]
        case GatedDeltaNet():
            return token_by_token(p.q, p.k, p.v, p.log_decay, segments, share=p.b)[0]
        case Hydra():
            shifted = mixer.combination == "quasiseparable"
            both = _both_ways(p.forward, p.backward, p.v, segments, shifted=shifted)
            if mixer.combination == "concat":
                return torch.stack(both, 3).flatten(2, 3)
            return both[0] + both[1] + (p.delta[..., None] * p.v if shifted else 0)
        case MatrixMixer(matrix_mixer=Quasiseparable()):
            both = _both_ways(p.made.forward, p.made.backward, p.v, segments, shifted=True)
            return both[0] + both[1] + p.made.delta[..., None] * p.v
        case MatrixMixer(matrix_mixer=LowRank()):
            q, k = (t.expand(len(p.v), -1, -1, -1) for t in p.made)
            count = visible_tokens(p.v, context.visibility, causal=False)[..., None, None].to(p.v)
            return _all_of_the_document(q, k, p.v, segments) / (q.shape[3] * count).sqrt() + p.v
    return None


def _normalised(mixer: LinearAttention, p: Any, context: Context) -> Tensor:
    q, k, turned_q, turned_k = mixer.both_features(p.q, p.k, context.cos, context.sin, context.real)
    one = p.v.new_ones(*p.v.shape[:3], 1)
    count = visible_tokens(p.v, context.visibility, causal=mixer.causal)[..., None, None]
    if mixer.causal:
        total, _ = token_by_token(q, k, one, segments=context.segments)
        numerator, _ = token_by_token(turned_q, turned_k, p.v, segments=context.segments)
    else:
        total = _all_of_the_document(q, k, one, context.segments)
        numerator = _all_of_the_document(turned_q, turned_k, p.v, context.segments)
    return numerator / (total + mixer.eps * count.to(total))


def _all_of_the_document(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """Those before and the token itself, and from the end those behind it."""
    before, _ = token_by_token(q, k, v, segments=segments)
    q, k, v, segments = (None if t is None else t.flip(1) for t in (q, k, v, segments))
    k, v = _delayed(k, segments), _delayed(v, segments)
    return before + token_by_token(q, k, v, segments=segments)[0].flip(1)


def _both_ways(
    forward: Direction, backward: Direction, v: Tensor, segments: Tensor | None, *, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Hydra's two recurrences; shifted, a token gets what its neighbour has read."""

    def read(p: Direction, v: Tensor, segments: Tensor | None) -> Tensor:
        y, _ = token_by_token(p.C, p.B, v * p.dt[..., None], p.log_decay, segments)
        return _delayed(y, segments) if shifted else y

    behind = None if segments is None else segments.flip(1)
    flipped = Direction(*(t.flip(1) for t in backward))
    return read(forward, v, segments), read(flipped, v.flip(1), behind).flip(1)


def _delayed(x: Tensor, segments: Tensor | None) -> Tensor:
    """x (batch, length, ...) one token later, nothing at the first token of a document."""
    x = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    if segments is None:
        return x
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return x.masked_fill(first.view(*first.shape, *[1] * (x.ndim - 2)), 0)
