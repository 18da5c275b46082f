"""The two sums of normalised linear attention, in one pass over blocks of chunks.

  numerator_t = phi'(q_t) sum phi'(k_j) v_j^T,    normaliser_t = phi(q_t) sum phi(k_j),    j <= t,

phi' being the rotated features. The numerator is linear_recurrence.py's; the normaliser needs no
scores: it is phi(q_t) times the running sum of phi(k), made by a triangle of ones inside a chunk.

Shapes: q (batch, length, heads, head_dim), k and v (batch, length, groups, ...), features F wide;
states (batch, groups, F, V) of the numerator and (batch, groups, F, 1) of the normaliser. Inside: b
batch, n chunk, c token of it, g group, r head of the group.

Features are made block by block from q and k, and made again in the backward pass: they are several
times as wide as q and k, and are never held for a whole row. `sums_at_once` does the same for whole
rows at once, by fla's kernel on a GPU or for a compiler; it too makes features again in the
backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.chunks import Documents, whole_chunks
from llmnorm.nn.mixers.linear_recurrence import (
    CHUNK,
    Block,
    block_slices,
    documents_at,
    linear_recurrence,
    merged_state,
    parts,
    state_by_head,
)
from llmnorm.nn.mixers.linear_step import recurrence_step, state_step
from llmnorm.nn.states import part

# (q, k, cos, sin, real) -> phi(q), phi(k), phi'(q), phi'(k); `real` is False for padding.
Features = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def normalised_sums(
    features: Features,
    states: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    real: Tensor | None,
    segments: Tensor | None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sums at every token, and both states behind the last one.

    Args:
        features: makes features of a piece of a row; has no parameters of its own.
        states: both states before the first token.
        q: queries, float32 or float64.
        k: keys.
        v: values.
        cos: rotary table (batch or 1, length, 1, head_dim / 2).
        sin: the same for the sine.
        real: (batch, length), False for padding.
        segments: (batch, length) numbers of the documents, which begin with empty states.
        chunk: tokens a chunk; changes time and memory, and numbers by rounding only.

    Returns:
        numerator (batch, length, heads, V), normaliser (batch, length, heads, 1), and the states.
    """
    chunk = min(chunk, q.shape[1])
    segments = whole_chunks((v,), segments, chunk)[1]
    return _Sums.apply(features, chunk, q, k, v, cos, sin, real, segments, *states)


def sums_step(
    q: Tensor,
    k: Tensor,
    turned_q: Tensor,
    turned_k: Tensor,
    v: Tensor,
    states: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `normalised_sums`, of features, for the few new tokens of a pass with a cache (steps.py).

    Args:
        q: phi(q) (batch, new, heads, F).
        k: phi(k) (batch, new, groups, F).
        turned_q: phi'(q).
        turned_k: phi'(k).
        v: values (batch, new, groups, V).
        states: both states before the first token; None: zeros.
    """
    numerator, state = recurrence_step(turned_q, turned_k, v, None, part(states, 0))
    if k.shape[1] == 1:
        keys = k.view(k.shape[0], k.shape[2], -1, 1)
        keys = keys if states is None else keys + states[1]
        readers = q.reshape(-1, q.shape[2] // k.shape[2], q.shape[3])
        total = torch.bmm(readers, keys.flatten(0, 1))
        return numerator, total.view(*q.shape[:3], 1), state, keys
    sums = k.cumsum(1)
    if states is not None:
        sums = sums + states[1].squeeze(3).unsqueeze(1)
    apart = q.unflatten(2, (k.shape[2], -1))
    normaliser = (apart * sums.unsqueeze(3)).sum(-1, keepdim=True).flatten(2, 3)
    return numerator, normaliser, state, sums[:, -1, :, :, None]


def states_step(
    k: Tensor, turned_k: Tensor, v: Tensor, states: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor]:
    """The states of `sums_step` alone, as a replay wants them (recurrent_cache.py)."""
    keys = k.sum(1).unsqueeze(3)
    keys = keys if states is None else keys + states[1]
    return state_step(turned_k, v, None, part(states, 0)), keys


def sums_at_once(
    features: Features,
    states: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    real: Tensor | None,
    segments: Tensor | None,
    *,
    boundaries: Tensor | None = None,
    kernel: bool,
) -> tuple[Tensor, ...]:
    """As normalised_sums, in float32, in operations that a compiler can follow.

    Args:
        kernel: the numerator comes from fla's kernel, whose products are TF32. That rounds less
            than bf16 has rounded q and k already, and its gradients are right where those of bf16
            are not (fla.py). The normaliser, which divides, is ours.
    """

    def sums(q: Tensor, k: Tensor, v: Tensor, state: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(q.device.type, enabled=False):
            q, k, turned_q, turned_k = features(q, k, cos, sin, real)
            apart: dict[str, Any] = {"segments": segments, "boundaries": boundaries, "state": state}
            if kernel:
                inputs = turned_q, turned_k, v, None
                numerator, state = fla.linear(*inputs, dtype=torch.float32, **apart)
            else:
                numerator, state = linear_recurrence(turned_q, turned_k, v, **apart)
            running, keys = _running_sum(k.flatten(2), keys.flatten(1), segments)
            running = running.unflatten(2, (k.shape[2], 1, -1))
            normaliser = (q.unflatten(2, (k.shape[2], -1)) * running).sum(-1, keepdim=True)
            return numerator, normaliser.flatten(2, 3), state, keys.view(*state.shape[:3], 1)

    if torch.compiler.is_exporting():
        return sums(q, k, v, *states)
    return checkpoint(sums, q, k, v, *states, use_reentrant=False, preserve_rng_state=False)


def _running_sum(k: Tensor, before: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over each document up to each token: k (b, length, d), before (b, d) -> the same shapes.

    Documents count from where they start, the first one of a row on top of `before`.
    """
    length = k.shape[1]
    if segments is None:
        segments = torch.zeros(k.shape[:2], dtype=torch.long, device=k.device)
    k, segments = whole_chunks((k,), segments, CHUNK)
    k, number = k.unflatten(1, (-1, CHUNK)), segments.unflatten(1, (-1, CHUNK))  # (b, n, c, ..)
    last = torch.cat((segments[:, :1], number[..., -1]), 1)  # of `before`, then of every chunk
    ends = (number == number[..., -1:]).to(k.dtype).unsqueeze(2) @ k
    seen = (last[:, :, None] == last[:, None, :]).tril().to(k.dtype)
    carried = seen @ torch.cat((before[:, None], ends.squeeze(2)), 1)
    same = (number[..., :, None] == number[..., None, :]).tril().to(k.dtype)
    continues = (number == last[:, :-1, None]).to(k.dtype).unsqueeze(3)
    running = same @ k + continues * carried[:, :-1, None]
    return running.flatten(1, 2)[:, :length], carried[:, -1]


class _Sums(torch.autograd.Function):
    """Block after block; backward from the last to the first."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        real: Tensor | None,
        segments: Tensor | None,
        state: Tensor,
        keys: Tensor,
    ) -> tuple[Tensor, ...]:
        length = q.shape[1]
        shape = len(q), length + -length % chunk, q.shape[2]
        numerator, normaliser = v.new_empty(*shape, v.shape[3]), v.new_empty(*shape, 1)
        state, keys = merged_state(state, k.shape[2]), keys.flatten(1)
        kept: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            for tokens in block_slices(q, chunk):
                kept += [state, keys]
                row = parts((q, k, v, cos, sin, real), tokens)
                piece = _Piece(features, documents_at(tokens, segments, chunk), chunk, *row)
                state = piece.block.forward(state, numerator[:, tokens])
                keys = piece.normaliser(keys, normaliser[:, tokens])
        ctx.save_for_backward(q, k, v, cos, sin, real, segments, *kept)
        ctx.features, ctx.chunk = features, chunk
        after = state_by_head(state, v), keys.view(len(k), k.shape[2], -1, 1)
        return numerator[:, :length], normaliser[:, :length], *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, real, segments, *kept = ctx.saved_tensors
        chunk = ctx.chunk
        d_numerator, d_normaliser = whole_chunks(grads[:2], None, chunk)[:2]
        d_state, d_keys = merged_state(grads[2], k.shape[2]), grads[3].flatten(1)
        found = [torch.empty_like(t) for t in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for tokens in reversed(block_slices(q, chunk)):
                keys, state = kept.pop(), kept.pop()
                row = parts((q, k, v, cos, sin, real), tokens)
                leaves = [t.detach().requires_grad_() for t in row[:2]]
                with torch.enable_grad():
                    documents = documents_at(tokens, segments, chunk)
                    piece = _Piece(ctx.features, documents, chunk, *leaves, *row[2:])
                d_turned: list[Any] = [torch.empty_like(t) for t in (*piece.turned, piece.v)]
                d_state = piece.block.backward(
                    state, d_numerator[:, tokens], d_state, *(*d_turned, None)
                )
                *d_plain, d_keys = piece.normaliser_backward(keys, d_normaliser[:, tokens], d_keys)
                length = leaves[0].shape[1]
                made = torch.autograd.grad(
                    piece.made, leaves, [t[:, :length] for t in (*d_plain, *d_turned[:2])]
                )
                for whole, part in zip(found, (*made, d_turned[2]), strict=True):
                    whole[:, tokens] = part[:, :length]
        after = state_by_head(d_state, v), d_keys.view(len(k), k.shape[2], -1, 1)
        return None, None, *found, *(None,) * 4, *after


class _Piece:
    """The features of a block, and what is summed of them."""

    def __init__(
        self,
        features: Features,
        documents: Documents | None,
        chunk: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        real: Tensor | None,
    ) -> None:
        self.made = features(q, k, cos, sin, real)
        *filled, self.v, _ = whole_chunks((*(t.detach() for t in self.made), v), None, chunk)
        q, k, *self.turned = filled
        self.block = Block(documents, chunk, *(*self.turned, self.v, None))
        # (b, n, c, g, r, F) and (b, n, c, g F)
        self.q = q.unflatten(1, (-1, chunk)).unflatten(3, (k.shape[2], -1))
        self.k = k.unflatten(1, (-1, chunk)).flatten(3)
        # (b n, c, c) and (b, n, c, 1), None: 1
        self.continues = None
        if documents is None:
            triangle = torch.ones(chunk, chunk, dtype=k.dtype, device=k.device).tril()
            self.triangle = triangle.expand(self.k.shape[0] * self.k.shape[1], -1, -1)
        else:
            self.triangle = documents.same.flatten(0, 3).to(k.dtype)
            self.continues = documents.continues.flatten(2, 4)[..., None].to(k.dtype)

    def normaliser(self, keys: Tensor, out: Tensor) -> Tensor:
        """Fills out (batch, length, heads, 1); the sum of keys behind the block (b, g F)."""
        running, keys = self.running(keys)
        torch.sum(self.q * running, -1, keepdim=True, out=out.view(*self.q.shape[:-1], 1))
        return keys

    def running(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of keys at every token (b, n, c, g, 1, F), and behind the block."""
        sums = torch.bmm(self.triangle, self.k.flatten(0, 1)).view_as(self.k)
        for n in range(sums.shape[1]):
            if self.continues is None:
                sums[:, n] += keys[:, None]
            else:
                sums[:, n] += keys[:, None] * self.continues[:, n]
            keys = sums[:, n, -1]
        return sums.unflatten(3, (self.q.shape[3], 1, -1)), keys.clone()

    def normaliser_backward(
        self, keys: Tensor, d_out: Tensor, d_after: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of phi(q), phi(k) and the sum of keys before the block."""
        running, _ = self.running(keys)
        d_out = d_out.reshape(*self.q.shape[:-1], 1)
        d_q = running * d_out
        d_sums = (self.q * d_out).sum(4).flatten(3)  # (b, n, c, g F)
        for n in reversed(range(d_sums.shape[1])):
            d_sums[:, n, -1] += d_after
            reads = d_sums[:, n] if self.continues is None else d_sums[:, n] * self.continues[:, n]
            d_after = reads.sum(1)
        d_k = torch.bmm(self.triangle.mT, d_sums.flatten(0, 1))
        d_q = d_q.flatten(3, 4).flatten(1, 2)
        return d_q, d_k.view(*d_q.shape[:2], -1, d_q.shape[-1]), d_after
