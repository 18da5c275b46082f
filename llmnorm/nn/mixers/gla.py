"""Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t, a gate a channel.

Source: Yang et al. 2023 (arXiv 2312.06635), equation 3 and section 4.4, with the layer and the
defaults of fla (fla/layers/gla.py): log gates logsigmoid(low-rank map of x) / 16, queries and keys
half as wide as values, no rotary positions; the output is RMSNorm of each head, times silu(g).

Shapes: q, k and log_gate (batch, length, heads, key_dim), v (batch, length, heads, value_dim),
state (batch, heads, key_dim, value_dim). Inside: b batch, n chunk, h head, i and j in the chunk.

Surprise: a decay a channel does not factor out of q k^T; splitting exp(G_i - G_j) into two factors
overflows where gates are strong. So inside a chunk, a short one, every pair has its own sum of
gates, (i, j, key_dim); between chunks exponents are at most 0 anyway.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.chunks import Documents, in_blocks, whole_chunks
from llmnorm.nn.mixers.contract import Context, ProjectedMixer
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.steps import (
    heads_in_front,
    is_few,
    state_before,
    step_decays,
    takes_step,
    tokens_in_front,
    written,
)
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.precision import wide_dtype, without_autocast
from llmnorm.nn.projections import outputs
from llmnorm.nn.recurrent_cache import RecurrentCache
from llmnorm.nn.states import Inputs, InputShape, State, part
from llmnorm.nn.visibility import Cached, visible_pairs

CHUNK = 16
BLOCK = 64  # chunks


class GLAParameters(NamedTuple):
    """q (scaled), k, v, log_gate in float32, and the output's gate."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    gate: Tensor


class GatedLinearAttention(ProjectedMixer[GLAParameters, RecurrentCache]):
    """The layer; projections carry fla's names."""

    same_input: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "gk_proj.0", "g_proj")
    causal = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        gate_rank: int,
        gate_logit_normalizer: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.gate_logit_normalizer = gate_logit_normalizer
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.q_proj = Linear(hidden_size, keys, bias=False)
        self.k_proj = Linear(hidden_size, keys, bias=False)
        self.v_proj = Linear(hidden_size, values, bias=False)
        self.g_proj = Linear(hidden_size, values, bias=False)
        self.gk_proj = nn.Sequential(
            Linear(hidden_size, gate_rank, bias=False), Linear(gate_rank, keys, bias=True)
        )
        self.g_norm = RMSNorm(value_dim, eps=norm_eps)
        self.o_proj = Linear(values, hidden_size, bias=False)

    def new_cache(self) -> RecurrentCache:
        """The state."""
        keys, values = (self.heads, self.key_dim), (self.heads, self.value_dim)
        inputs = InputShape(keys, wide=False), InputShape(values, wide=False)
        return RecurrentCache(self.advance, (*inputs, InputShape(keys, wide=True)))

    def prepare(
        self, x: Tensor, context: Context, cache: RecurrentCache | None = None
    ) -> GLAParameters:
        """Project; padding gets keys and gates of zero."""
        heads = (*x.shape[:-1], self.heads, -1)
        to_rank, from_rank = self.gk_proj
        *qkv, low, gate = outputs(x, self.q_proj, self.k_proj, self.v_proj, to_rank, self.g_proj)
        q, k, v = (t.view(heads) for t in qkv)
        wide = wide_dtype(x.dtype)
        logits = from_rank(low).view(heads).to(wide)
        log_gate = F.logsigmoid(logits) / self.gate_logit_normalizer
        if context.padding is not None:
            padding = context.padding[..., None, None]
            k, log_gate = k.masked_fill(padding, 0), log_gate.masked_fill(padding, 0)
        return GLAParameters(q * self.key_dim**-0.5, k, v, log_gate, gate)

    def mix(
        self, parameters: GLAParameters, context: Context, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The recurrence."""
        q, k, v, log_gate, _ = parameters
        kept = None if cache is None else cache.before(context.places)
        if takes_step(v, context):
            y, state = channel_step(q, k, v, log_gate, part(kept, 0))
        else:
            y, state = channel_recurrence(
                *(q, k, v, log_gate),
                segments=context.segments,
                boundaries=context.boundaries,
                state=part(kept, 0),
            )
        if isinstance(context.visibility, Cached):
            assert cache is not None
            cache.append((k, v, log_gate), (state,), context.visibility.places)
        return y.to(v.dtype)

    def advance(self, state: State | None, inputs: Inputs, counts: Tensor) -> State:
        """The state after more inputs (RecurrentCache)."""
        k, v, log_gate = inputs
        if is_few(v):
            return (channel_state_step(k, v, log_gate, part(state, 0)),)
        return (channel_recurrence(k, k, v, log_gate, state=part(state, 0))[1],)

    def materialize(self, parameters: GLAParameters, context: Context) -> Tensor:
        """sum over channels of q_i k_j times the product of the gates after j up to i."""
        q, k, v, log_gate, _ = (t.transpose(1, 2) for t in parameters)
        decay = _pairs(log_gate, visible_pairs(parameters.v, context.visibility, causal=True))
        return torch.einsum("bhid,bhjd,bhijd->bhij", q.to(decay), k.to(decay), decay)

    def finish(self, y: Tensor, x: Tensor, parameters: GLAParameters) -> Tensor:
        """Norm, gate, project."""
        return self.o_proj(self.g_norm(y).flatten(2) * F.silu(parameters.gate))

    def health(self, parameters: GLAParameters, context: Context) -> dict[str, Tensor]:
        """Mean decay."""
        return {"decay": mean_over_tokens(parameters.log_gate.exp(), context)}

    def flops_per_token(self, context_length: int) -> float:
        """Scores and their sums inside a chunk, the state written and read."""
        inside = 2.0 * CHUNK * (self.key_dim + self.value_dim)
        return self.heads * (inside + 4.0 * self.key_dim * self.value_dim)


def channel_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As linear_recurrence, with a decay for each channel of the key.

    Returns:
        y (batch, length, heads, value_dim) and the state after the last token, float32 or float64.
    """
    if fla.serves(q, k, v):
        return fla.channel(q, k, v, log_gate, segments=segments, boundaries=boundaries, state=state)
    wide = wide_dtype(v.dtype)
    chunk = min(chunk, q.shape[1])
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        inputs = [t.to(wide) for t in (q, k, v, log_gate)]
        return in_blocks(_block, inputs, segments, state.to(wide), chunk, chunk * BLOCK)


def channel_step(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `channel_recurrence`, for the few new tokens of a pass with a cache (steps.py).

    Several tokens are one chunk; one token's y is q times the new state.
    """
    (batch, new), state = v.shape[:2], state_before(k, v, state)
    q, k, v, g = (heads_in_front(t.to(state.dtype)) for t in (q, k, v, log_gate))
    before = state.flatten(0, 1)
    with without_autocast(v.device.type):
        if new == 1:
            after = (before * g.mT.exp()).addcmul_(k.mT, v)
            y = torch.bmm(q, after)
        else:
            left = step_decays(g.mT)  # (heads, K, i, 1 + j)
            pairs = left[..., 1:] * k.mT[..., None, :] * q.mT[..., None]
            read = torch.bmm(q * left[..., 0].mT, before)
            y = torch.baddbmm(read, pairs.sum(1).tril_(), v)
            after = written(k, v, left[..., -1, :], before)
    return tokens_in_front(y, batch), after.view_as(state)


def channel_state_step(k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None) -> Tensor:
    """The state of `channel_step` alone, as a replay wants it (recurrent_cache.py)."""
    state = state_before(k, v, state)
    k, v, g = (heads_in_front(t.to(state.dtype)) for t in (k, v, log_gate))
    with without_autocast(v.device.type):
        left = step_decays(g.mT)[..., -1, :]
        return written(k, v, left, state.flatten(0, 1)).view_as(state)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    segments: Tensor | None,
    last: Tensor | None,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    *inputs, segments = whole_chunks((q, k, v, g), segments, chunk)
    q, k, v, g = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in inputs)  # (b, n, h, i, dim)
    ones = torch.ones(chunk, chunk, dtype=g.dtype, device=g.device)
    visible = ones.tril().bool()
    since, until = ones.tril() @ g, ones.triu(1) @ g
    carried = since[..., -1:, :]
    if segments is not None:
        documents = Documents(segments, last, chunk)
        visible = documents.same.squeeze(2)
        continues, ends, stays = (
            t.squeeze(2)[..., None]
            for t in (documents.continues, documents.ends, documents.carried)
        )
        since = since.masked_fill(~continues, -torch.inf)
        until = until.masked_fill(~ends, -torch.inf)
        carried = carried.masked_fill(~stays, -torch.inf)

    weights = ((_pairs(g, visible) * k[..., None, :, :]) @ q[..., None]).squeeze(-1)
    additions = (k * until.exp()).mT @ v
    states = []
    for added, kept in zip(additions.unbind(1), carried.exp().mT.unbind(1), strict=True):
        states.append(state)
        state = state * kept + added
    y = weights @ v + (q * since.exp()) @ torch.stack(states, 1)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state


def _pairs(g: Tensor, visible: Tensor) -> Tensor:
    """exp of the sum of g over j < l <= i, 0 where not visible: (..., i, key) -> (..., i, j, key).

    visible (..., i, j).
    """
    length = g.shape[-2]
    ones = torch.ones(length, length, dtype=g.dtype, device=g.device)
    after = g[..., None, :] * ones.tril(-1)[..., None]  # [l, j]: g_l where l > j
    sums = (ones.tril() @ after.flatten(-2)).unflatten(-1, (length, -1))
    return sums.masked_fill(~visible[..., None], -torch.inf).exp()
