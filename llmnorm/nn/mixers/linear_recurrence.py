"""The linear recurrence S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t, in chunks.

One engine for every mixer with one decay a head: linear attention and both halves of NaLa (g = 0),
SSD, also called Mamba-2 (g = A dt), retention (g constant). Source: Dao & Gu 2024 (arXiv
2405.21060), section 6: inside a chunk the masked matrix (q k^T) * exp(segment sums of g), between
chunks the state; linear in length.

Shapes: q (batch, length, q_heads, K), k (batch, length, groups, K), v (batch, length, v_heads, V),
log_decay g <= 0 (batch, length, v_heads), state (batch, v_heads, K, V). One of q_heads and v_heads
is `groups`, the other a multiple (grouped queries; Mamba-2's groups); head h belongs to group
h // (heads / groups). Inside: b batch, n chunk, g group, r head of the group, c or i place in the
chunk.

Surprises. Sums of decays are sums of their own terms (a product with a triangle of ones), never
differences of a running sum: those lose digits where gates are strong, and let one document's
rounding leak into another's. Documents are therefore isolated to the bit; only inf and nan pass
within a chunk. All is float32 (float64 for float64 input). A token whose k (or v) and g are 0
leaves the state as it is: so padding is told. Long rows go in blocks of chunks that are recomputed
in the backward pass, which keeps the temporaries of one block in the processor's cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmnorm.nn.precision import wide_dtype

CHUNK = 64
BLOCK = 32  # chunks


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Every y_t, and the state after the last token.

    Args:
        q: what reads the state.
        k: what writes it, at which place.
        v: what is written.
        log_decay: at most 0; None: no decay.
        segments: (batch, length) numbers of the documents, which begin with an empty state.
        state: what came before the first token; None: nothing.
        chunk: tokens a chunk; changes time and memory, and numbers by rounding only.

    Returns:
        y (batch, length, max(q_heads, v_heads), V) and state, both float32 or float64.
    """
    wide = wide_dtype(v.dtype)
    length = q.shape[1]
    chunk = min(chunk, length)
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        decay = None if log_decay is None else log_decay.to(wide)
        inputs = (q.to(wide), k.to(wide), v.to(wide), decay)
        return in_blocks(_block, inputs, segments, state.to(wide), chunk, chunk * BLOCK)


def in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    segments: Tensor | None,
    state: Tensor,
    chunk: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """`block` over rows of any length, `size` tokens at a time, recomputed if there are several.

    block(*inputs, segments, last, state, chunk) -> (y, state); inputs are (batch, length, ...);
    `last` (batch, 1) is the document that `state` belongs to.
    """
    assert inputs[0] is not None
    last = None if segments is None else segments[:, :1]
    if inputs[0].shape[1] <= size:
        return block(*inputs, segments, last, state, chunk)
    outs = []
    for start in range(0, inputs[0].shape[1], size):
        *part, numbers = (
            None if t is None else t[:, start : start + size] for t in (*inputs, segments)
        )
        y, state = checkpoint(
            block,
            *part,
            numbers,
            last,
            state,
            chunk,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outs.append(y)
        last = None if numbers is None else numbers[:, -1:]
    return torch.cat(outs, 1), state


def decay_matrix(log_decay: Tensor, visible: Tensor) -> Tensor:
    """What is left of token j at token i, (batch, heads, length, length): for explicit matrices.

    log_decay (batch, length, heads); visible (batch or 1, 1, length, length), False gives 0.
    """
    length = log_decay.shape[1]
    ones = torch.ones(length, length, dtype=log_decay.dtype, device=log_decay.device)
    sums = ones.tril() @ (log_decay.transpose(1, 2)[..., None] * ones.tril(-1))
    return sums.masked_fill(~visible, -torch.inf).exp()


def flops_per_token(heads: tuple[int, int, int], width: int, value_dim: int) -> float:
    """Operations a token of a long row: scores, their sums, and the state written and read.

    heads: of q, k and v; width: K, value_dim: V. The sums of decays are not credited.
    """
    mixed = max(heads[0], heads[2])
    inside = 2.0 * CHUNK * (width * heads[0] + value_dim * mixed)
    return inside + 2.0 * width * value_dim * (mixed + heads[2])


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    segments: Tensor | None,
    last: Tensor | None,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, length, groups, _ = k.shape
    heads = max(q.shape[2], v.shape[2])
    q, k, v, decay, segments = whole_chunks((q, k, v, decay), segments, chunk)
    q, v = (_chunks(t, groups, chunk) for t in (q, v))  # (b, n, g, r, c, dim)
    k = _chunks(k, groups, chunk).squeeze(3)  # (b, n, g, c, K)
    documents = None if segments is None else Documents(segments, last, chunk)
    repeats_q, repeats_v = q.shape[3], v.shape[3]
    q = q.flatten(3, 4)

    weights = (q @ k.mT).unflatten(3, (repeats_q, chunk))
    if decay is None:
        since = until = carried = None
        weights = weights.tril() if documents is None else weights * documents.same.to(q.dtype)
    else:
        inside, since, until, carried = decays(_chunks(decay[..., None], groups, chunk), documents)
        weights = weights * inside
    if repeats_v == 1:
        y = (weights.flatten(3, 4) @ v.squeeze(3)).unflatten(3, (-1, chunk))
    else:
        y = weights @ v

    written = v if until is None else v * until[..., None]
    if decay is None and documents is not None:
        written = v * documents.reaches_the_end[..., None].to(v.dtype)
    additions = k.mT @ written.transpose(3, 4).flatten(4)
    states, state = _carry(state, additions, carried, documents, repeats_v)
    read = (q @ states).unflatten(3, (repeats_q, chunk)).unflatten(5, (repeats_v, -1))
    read = read.squeeze(3).movedim(4, 3) if repeats_q == 1 else read.squeeze(5)
    if since is not None:
        read = read * since[..., None]
    elif documents is not None:
        read = read * documents.continues[..., None].to(read.dtype)
    y = (y + read).permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, v.shape[-1])
    return y[:, :length], state


def whole_chunks(
    inputs: Sequence[Tensor | None], segments: Tensor | None, chunk: int
) -> tuple[Any, ...]:
    """The inputs, and behind them the segments, filled up with zeros to a multiple of `chunk`."""
    assert inputs[0] is not None
    tail = -inputs[0].shape[1] % chunk
    if not tail:
        return (*inputs, segments)
    if segments is not None:
        segments = torch.cat((segments, segments[:, -1:].expand(-1, tail)), 1)
    padded = (None if t is None else F.pad(t, (0, 0) * (t.ndim - 2) + (0, tail)) for t in inputs)
    return (*padded, segments)


class Documents:
    """Who belongs to whom, for chunks that several documents may share."""

    def __init__(self, segments: Tensor, last: Tensor | None, chunk: int) -> None:
        assert last is not None
        number = segments.unflatten(1, (-1, chunk))  # (b, n, c)
        ends = number[..., -1:]
        before = torch.cat((last, ends[:, :-1, 0]), 1)[..., None]
        same = (number[..., :, None] == number[..., None, :]).tril()
        self.same = same[:, :, None, None]  # (b, n, 1, 1, i, j)
        self.continues = (number == before)[:, :, None, None]  # (b, n, 1, 1, c)
        self.reaches_the_end = (number == ends)[:, :, None, None]
        self.carried = (ends == before)[:, :, None, None]  # (b, n, 1, 1, 1)


def decays(g: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of token j at i, of the state at i, of j at the chunk's end, of the state there.

    g (b, n, g, r, c, 1) -> (..., i, j), (..., c), (..., c) and (..., 1). Exponents are sums over
    j < l <= i of terms that are at most 0, so nothing overflows.
    """
    chunk = g.shape[4]
    ones = torch.ones(chunk, chunk, dtype=g.dtype, device=g.device)
    visible = ones.tril().bool()
    sums = ones.tril() @ (g * ones.tril(-1))  # sum over l of [l <= i] g_l [l > j]
    since = g.squeeze(-1) @ ones.triu()
    until = g.squeeze(-1) @ ones.tril(-1)
    carried = since[..., -1:]
    if documents is not None:
        visible = documents.same
        since = since.masked_fill(~documents.continues, -torch.inf)
        until = until.masked_fill(~documents.reaches_the_end, -torch.inf)
        carried = carried.masked_fill(~documents.carried, -torch.inf)
    inside = sums.masked_fill(~visible, -torch.inf).exp()
    return inside, since.exp(), until.exp(), carried.exp()


def _carry(
    state: Tensor,
    additions: Tensor,
    carried: Tensor | None,
    documents: Documents | None,
    repeats: int,
) -> tuple[Tensor, Tensor]:
    """The states before the chunks (b, n, g, K, r V), the one after the last (b, heads, K, V)."""
    batch, chunks, groups, width, _ = additions.shape
    if documents is not None and carried is None:
        carried = documents.carried.to(additions.dtype)
    now = state.unflatten(1, (groups, repeats)).movedim(2, 3).flatten(3)
    states = [now]
    if carried is not None and carried.shape[3] > 1:  # (b, n, g, r, 1) -> (b, n, g, 1, r V)
        carried = carried.repeat_interleave(additions.shape[4] // repeats, 3).mT
    # `unbind`, not indices: its backward is one stack.
    kept = [None] * chunks if carried is None else carried.unbind(1)
    for added, share in zip(additions.unbind(1), kept, strict=True):
        now = added + (now if share is None else now * share)
        states.append(now)
    after = now.unflatten(3, (repeats, -1)).movedim(3, 2).flatten(1, 2)
    return torch.stack(states[:-1], 1), after


def _chunks(x: Tensor, groups: int, chunk: int) -> Tensor:
    """(batch, length, heads, dim) -> (b, n, g, r, c, dim)."""
    return x.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
