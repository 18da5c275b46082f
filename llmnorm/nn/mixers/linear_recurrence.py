"""The linear recurrence S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t, in chunks.

One engine for every mixer with one decay a head: linear attention and both halves of NaLa (g = 0),
SSD, also called Mamba-2 (g = A dt), retention (g constant). Source: Dao & Gu 2024 (arXiv
2405.21060), section 6: inside a chunk the masked matrix W = (q k^T) * D, D = exp(segment sums of
g), between chunks the state; linear in length. With f what is left of the state at a token and u
what is left of a token at the chunk's end,
  y = W v + f q S,   S' = (decay of the chunk) S + k^T (u v);
the backward pass is the same from behind, for dS. Its sums for g are those of dD * D etc.

Shapes: q (batch, length, q_heads, K), k (batch, length, groups, K), v (batch, length, v_heads, V),
log_decay g <= 0 (batch, length, v_heads), state (batch, v_heads, K, V). One of q_heads and v_heads
is `groups`, the other a multiple (grouped queries; Mamba-2's groups); head h belongs to group
h // (heads / groups). Inside: n chunk, b batch, g group, r head of the group, c or i token of the
chunk. "By head" is (n, b, g, r, c, dim); "merged" is a matrix (n, b, g, r c, dim) of the readers of
one state, or (n, b, g, c, r dim) of its writers.

Surprises. On a GPU fla's kernels may take over, in their precision (fla.py). Here documents are
isolated to the bit; only inf and nan reach other documents, within a chunk. Everything is computed
in float32 (float64 for float64 input). Padding is a token whose k (or v) and g are 0: it leaves the
state as it is. Rows are taken in blocks of a few chunks, whose temporaries stay in the processor's
cache. The backward pass computes a block's W and S again, so that only the inputs and one state a
block are kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.chunks import Documents, decays, whole_chunks, write
from llmnorm.nn.precision import wide_dtype

CHUNK = 64
BLOCK = 8  # chunks, of all rows together
GPU_BLOCK = 256  # chunks of a row


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Every y_t, and the state after the last token.

    Args:
        q: queries, which read the state.
        k: keys, under which values are written to the state.
        v: the values.
        log_decay: at most 0; None: no decay.
        segments: (batch, length) numbers of the documents, which begin with an empty state.
        boundaries: where they start (Context), if known; only fla's kernels ask.
        state: the state before the first token; None: zeros.
        chunk: tokens a chunk; changes time and memory, and numbers by rounding only.

    Returns:
        y (batch, length, max(q_heads, v_heads), V) and state, both float32 or float64.
    """
    if fla.serves(q, k, v, one_decay=True):
        return fla.linear(q, k, v, log_decay, segments=segments, boundaries=boundaries, state=state)
    wide, length = wide_dtype(v.dtype), q.shape[1]
    chunk = min(chunk, length)
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    inputs = tuple(None if t is None else t.to(wide) for t in (q, k, v, log_decay))
    *whole, segments = whole_chunks(inputs, segments, chunk)
    y, state = _Recurrence.apply(*whole, state.to(wide), segments, chunk)
    return y[:, :length], state


def flops_per_token(heads: tuple[int, int, int], width: int, value_dim: int) -> float:
    """Operations a token of a long row: scores, their sums, and the state written and read.

    heads: of q, k and v; width: K, value_dim: V. The sums of decays are not credited.
    """
    mixed = max(heads[0], heads[2])
    inside = 2.0 * CHUNK * (width * heads[0] + value_dim * mixed)
    return inside + 2.0 * width * value_dim * (mixed + heads[2])


class _Recurrence(torch.autograd.Function):
    """Block after block; backward from the last to the first."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        state: Tensor,
        segments: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y = v.new_empty(*v.shape[:2], max(q.shape[2], v.shape[2]), v.shape[3])
        state, states = merged_state(state, k.shape[2]), []
        with torch.autocast(q.device.type, enabled=False):
            for tokens in block_slices(q, chunk):
                states.append(state)
                documents = documents_at(tokens, segments, chunk)
                block = Block(documents, chunk, *parts((q, k, v, decay), tokens))
                state = block.forward(state, y[:, tokens])
        ctx.save_for_backward(q, k, v, decay, segments, *states)
        ctx.chunk = chunk
        return y, state_by_head(state, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, segments, *states = ctx.saved_tensors
        dy, d_state = grads[0], merged_state(grads[1], k.shape[2])
        found = [None if t is None else torch.empty_like(t) for t in (q, k, v, decay)]
        with torch.autocast(q.device.type, enabled=False):
            for tokens in reversed(block_slices(q, ctx.chunk)):
                documents = documents_at(tokens, segments, ctx.chunk)
                block = Block(documents, ctx.chunk, *parts((q, k, v, decay), tokens))
                into = parts(found, tokens)
                d_state = block.backward(states.pop(), dy[:, tokens], d_state, *into)
        return (*found, state_by_head(d_state, v), None, None)


def block_slices(q: Tensor, chunk: int) -> list[slice]:
    """The tokens of each block, for rows like q (batch, length, ...)."""
    chunks = max(1, BLOCK // len(q)) if q.device.type == "cpu" else GPU_BLOCK
    size = chunk * chunks
    return [slice(start, start + size) for start in range(0, q.shape[1], size)]


def documents_at(tokens: slice, segments: Tensor | None, chunk: int) -> Documents | None:
    """The documents of a block of whole chunks."""
    if segments is None:
        return None
    last = segments[:, max(0, tokens.start - 1)][:, None]
    return Documents(segments[:, tokens], last, chunk)


def parts(tensors: Sequence[Tensor | None], tokens: slice) -> list[Any]:
    """The tokens of one block, of each tensor (batch, length, ...)."""
    return [None if t is None else t[:, tokens] for t in tensors]


def merged_state(state: Tensor, groups: int) -> Tensor:
    """(b, heads, K, V) -> (b, g, K, r V)."""
    return state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def state_by_head(state: Tensor, v: Tensor) -> Tensor:
    """(b, g, K, r V) -> (b, heads, K, V), heads and V as in v."""
    return state.unflatten(3, (-1, v.shape[3])).transpose(2, 3).flatten(1, 2)


class Block:
    """A few chunks of every row: what the forward and the backward pass both need."""

    def __init__(
        self,
        documents: Documents | None,
        chunk: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
    ) -> None:
        self.groups, self.chunk = k.shape[2], chunk
        self.readers, self.writers = q.shape[2] // self.groups, v.shape[2] // self.groups
        self.q = self.by_head(q).contiguous().flatten(3, 4)  # (n, b, g, r c, K)
        self.k = self.by_head(k).contiguous().flatten(3, 4)  # (n, b, g, c, K)
        self.v = self.by_head(v).contiguous()
        self.values = self.merging(v)
        # What is left: of j at i (.., c, c), of the state at i (.., c), of j at the end (.., c),
        # of the state at the end (.., 1); all of it if None.
        self.inside = self.since = self.until = self.carried = None
        self.has_decay = decay is not None
        if decay is not None:
            g = self.by_head(decay[..., None]).transpose(0, 1)
            left = decays(g, documents)
            self.inside, self.since, self.until, self.carried = (t.transpose(0, 1) for t in left)
        elif documents is not None:
            left = documents.same, documents.continues, documents.ends, documents.carried
            self.inside, self.since, self.until, self.carried = (
                t.transpose(0, 1).to(q.dtype) for t in left
            )
        self.weights = self.masked((self.q @ self.k.mT).unflatten(3, (self.readers, -1)))
        self.written = self.matrix(self.left(self.values, self.until))

    def forward(self, state: Tensor, y: Tensor) -> Tensor:
        """Fills y (batch, length, heads, V); the state behind the block."""
        states = self.states(state)
        read = self.merging_of(self.q @ states[:-1], self.readers)
        if self.writers == 1:
            inside = (self.weights.flatten(3, 4) @ self.v.squeeze(3)).view_as(read)
        else:
            inside = (self.weights @ self.v).transpose(3, 4)
        out = self.merging(y)
        if self.since is None:
            write(torch.add, inside, read, out=out)
        else:
            write(torch.addcmul, inside, read, self.factor(self.since), out=out)
        return states[-1].clone()

    def states(self, state: Tensor) -> Tensor:
        """The states before every chunk, and behind the last: (n + 1, b, g, K, r V)."""
        states = state.new_empty(len(self.k) + 1, *state.shape)
        states[0] = state
        _bmm(self.k.mT, self.written, states[1:])
        for n in range(len(self.k)):
            self.carry(n, states[n], states[n + 1])
        return states

    def carry(self, n: int, state: Tensor, to: Tensor) -> None:
        """Adds to `to` what chunk n leaves of the state (or of its gradient, from behind)."""
        if self.carried is None:
            to.add_(state)
            return
        share = self.carried[n].unsqueeze(2)  # (b, g, 1, r, 1)
        apart = (-1, share.shape[3], to.shape[3] // share.shape[3])
        to.unflatten(3, apart[1:]).addcmul_(state.unflatten(3, apart[1:]), share)

    def backward(
        self,
        state: Tensor,
        dy: Tensor,
        d_after: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        d_decay: Tensor | None,
    ) -> Tensor:
        """Fills the gradients; the one of the state before the block."""
        states = self.states(state)
        d_read = self.left(self.merging(dy), self.since)
        d_states = torch.empty_like(states)
        d_states[-1] = d_after
        _bmm(self.q.mT, self.matrix(d_read), d_states[:-1])
        for n in reversed(range(len(self.k))):
            self.carry(n, d_states[n + 1], d_states[n])

        dy = self.by_head(dy).contiguous()
        if self.writers == 1:
            rows = dy.flatten(3, 4)
            d_weights = (rows @ self.v.squeeze(3).mT).view_as(self.weights)
            d_inside = (self.weights.flatten(3, 4).mT @ rows).unsqueeze(3)
        else:
            d_weights = dy @ self.v.mT
            d_inside = (self.weights.mT @ dy).transpose(3, 4)
        d_written = self.merging_of(self.k @ d_states[1:], 1)
        if self.until is None:
            write(torch.add, d_inside, d_written, out=self.merging(dv))
        else:
            write(torch.addcmul, d_inside, d_written, self.factor(self.until), out=self.merging(dv))
        if d_decay is not None:
            d_decay.copy_(self.decay_gradient(d_weights, d_read, d_written, states, d_states))
        d_scores = self.masked(d_weights)
        if self.writers > 1:
            d_scores = d_scores.sum(3, keepdim=True)
        d_scores = d_scores.flatten(3, 4)
        found = _plus(d_scores @ self.k, self.matrix(d_read), states[:-1].mT)
        self.by_head(dq).copy_(found.unflatten(3, (self.readers, -1)))
        found = _plus(d_scores.mT @ self.q, self.written, d_states[1:].mT)
        self.by_head(dk).squeeze(3).copy_(found)
        return d_states[0].clone()

    def decay_gradient(
        self, d_weights: Tensor, d_read: Tensor, d_written: Tensor, states: Tensor, d_states: Tensor
    ) -> Tensor:
        """(batch, length, v_heads): each factor's gradient times the factor, summed over all that
        the decay of a token has a share in."""
        assert self.until is not None and self.carried is not None
        of_weights = d_weights * self.weights
        read = self.merging_of(self.q @ states[:-1], self.readers)
        of_read, of_written = (read * d_read).sum(-1), (d_written * self.values).sum(-1)
        if self.writers > 1:
            of_read, of_written = of_read.transpose(3, 4), of_written.transpose(3, 4)
        if self.readers > 1:
            of_weights, of_read = (t.sum(3, keepdim=True) for t in (of_weights, of_read))
        of_state = (states[:-1] * d_states[1:]).unflatten(4, (self.writers, -1)).sum((3, 5))
        ones = torch.ones(self.chunk, self.chunk, dtype=read.dtype, device=read.device)
        found = (ones.triu() @ of_weights).mul_(ones.tril(-1)).sum(-1)
        found += of_read @ ones.tril() + (of_written * self.until) @ ones.triu(1)
        found += of_state[..., None] * self.carried
        return found.permute(1, 0, 4, 2, 3).flatten(3, 4).flatten(1, 2)

    def masked(self, weights: Tensor) -> Tensor:
        """Times what is left of j at i."""
        return weights.tril_() if self.inside is None else weights * self.inside

    def left(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """Times what is left, for what `merging` made."""
        return x if factor is None else x * self.factor(factor)

    def factor(self, left: Tensor) -> Tensor:
        """(n, b, g, r, c), in the order of what `merging` made."""
        return left[..., None] if self.writers == 1 else left.transpose(3, 4)[..., None]

    def by_head(self, x: Tensor) -> Tensor:
        """(batch, length, heads, dim) -> (n, b, g, r, c, dim), a view."""
        return self.by_token(x).permute(1, 0, 3, 4, 2, 5)

    def merging(self, x: Tensor) -> Tensor:
        """(batch, length, heads, dim) -> a view whose matrix is the merged one."""
        return self.by_head(x) if self.writers == 1 else self.by_token(x).permute(1, 0, 3, 2, 4, 5)

    def by_token(self, x: Tensor) -> Tensor:
        """(batch, length, heads, dim) -> (b, n, c, g, r, dim)."""
        return x.unflatten(1, (-1, self.chunk)).unflatten(3, (self.groups, -1))

    def matrix(self, x: Tensor) -> Tensor:
        """What `merging` made -> (n, b, g, r c, dim) or (n, b, g, c, r dim)."""
        return x.flatten(3, 4) if self.writers == 1 else x.flatten(4, 5)

    def merging_of(self, x: Tensor, readers: int) -> Tensor:
        """The result of a product with what `matrix` made, back in the order of `merging`."""
        if self.writers == 1:
            return x.unflatten(3, (readers, -1))
        return x.unflatten(4, (self.writers, -1))


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    write(torch.bmm, a.flatten(0, 2), b.flatten(0, 2), out=out.view(-1, *out.shape[3:]))


def _plus(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in x's memory."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x
