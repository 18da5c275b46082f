"""The gated delta rule: S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T, y_t = q_t S_t.

What is stored under k_t is replaced by v_t in the share b_t, after everything has decayed by a_t =
exp(g_t). Source: Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), equation 10; the chunked form is
that of Yang et al. 2024 (arXiv 2406.06484), section 3. The layer is Qwen3-Next's (transformers,
Qwen3NextGatedDeltaNet), whose parameter names and layout these are.

Shapes: q and k (batch, length, key_heads, key_dim), v (batch, length, value_heads, value_dim), b
and g (batch, length, value_heads), state (batch, value_heads, key_dim, value_dim); value head h
reads key head h // (value_heads / key_heads). Inside: b batch, n chunk, h head, i and j tokens of
the chunk.

In a chunk, with D_ij the decay from j to i, the written values u solve a triangular system,
  u = b (v - since k S) - tril(b k k^T * D, -1) u,
after which all is as in linear attention: y = since q S + (q k^T * D) u.
Surprises: q and k are normed to length 1 after convolution and silu; queries are scaled by
key_dim^-1/2; the projection is laid out by key heads, [q, k, v.., z..] for each; the norm of every
head comes before the gate. With g = 0 it is the delta rule. Padding gets b = 0 and g = 0.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.chunks import (
    Documents,
    decay_matrix,
    decays,
    in_blocks,
    whole_chunks,
)
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.heads import value_heads_per_key_head
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.ssd import initial_dt_bias
from llmnorm.nn.mixers.steps import (
    heads_in_front,
    is_few,
    repeated,
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
from llmnorm.nn.visibility import Cached, Masked, visible_pairs

CHUNK = 64
BLOCK = 32  # chunks


class DeltaParameters(NamedTuple):
    """q (scaled), k, v, the share b, log_decay, the output's gate z, what was convolved, and with a
    cache the convolution's next window."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    log_decay: Tensor
    z: Tensor
    convolved: Tensor
    window: Tensor | None = None


class GatedDeltaNet(Mixer[DeltaParameters, RecurrentCache]):
    """The layer."""

    same_input: ClassVar[tuple[str, ...]] = ("in_proj_qkvz", "in_proj_ba")
    causal = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        conv_kernel: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        value_heads_per_key_head(num_value_heads, num_key_heads)
        self.key_heads, self.value_heads = num_key_heads, num_value_heads
        self.key_dim, self.value_dim = key_head_dim, value_head_dim
        keys, values = num_key_heads * key_head_dim, num_value_heads * value_head_dim
        self.widths = [keys, keys, values]
        self.in_proj_qkvz = Linear(hidden_size, 2 * (keys + values), bias=False)
        self.in_proj_ba = Linear(hidden_size, 2 * num_value_heads, bias=False)
        self.conv1d = ShortConvolution(2 * keys + values, conv_kernel, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads))
        self.A_log = nn.Parameter(torch.empty(num_value_heads))
        self.norm = RMSNorm(value_head_dim, eps=norm_eps)
        self.out_proj = Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As fla's: time steps log-uniform in (0.001, 0.1), A uniform in (-16, 0)."""
        with torch.no_grad():
            self.dt_bias.copy_(initial_dt_bias(self.dt_bias, (1e-3, 0.1), 1e-4))
            self.A_log.uniform_(1e-4, 16).log_()

    @property
    def output(self) -> Linear:
        """out_proj."""
        return self.out_proj

    def new_cache(self) -> RecurrentCache:
        """The state and the convolution's last inputs."""
        keys, values = (self.key_heads, self.key_dim), (self.value_heads, self.value_dim)
        each = InputShape((self.value_heads,), wide=True)
        inputs = (
            InputShape((sum(self.widths),), wide=False),
            InputShape(keys, wide=True),
            InputShape(values, wide=False),
            each,
            each,
        )
        return RecurrentCache(self.advance, inputs)

    def prepare(
        self, x: Tensor, context: Context, cache: RecurrentCache | None = None
    ) -> DeltaParameters:
        """Project, convolve, norm q and k."""
        group = self.value_heads // self.key_heads
        qkvz, ba = outputs(x, self.in_proj_qkvz, self.in_proj_ba)
        by_head = qkvz.unflatten(-1, (self.key_heads, -1))
        values = group * self.value_dim
        *qkv, z = by_head.split([self.key_dim, self.key_dim, values, values], -1)
        if group == 1 and self.key_dim == self.value_dim:
            convolved = torch.cat(qkv, 2).flatten(2)
        else:
            convolved = torch.cat([t.flatten(2) for t in qkv], -1)
        b, a = ba.unflatten(-1, (self.key_heads, -1)).split(group, -1)
        wide = wide_dtype(x.dtype)
        b = b.flatten(2).to(wide).sigmoid()
        step = F.softplus(a.flatten(2).to(wide) + self.dt_bias.to(wide))
        log_decay = -self.A_log.to(wide).exp() * step
        if context.padding is not None:
            padding = context.padding[..., None]
            b, log_decay = b.masked_fill(padding, 0), log_decay.masked_fill(padding, 0)
            if isinstance(context.visibility, Masked):  # behind a cache, no real token sees padding
                convolved = convolved.masked_fill(padding, 0)
        before = None if cache is None else part(cache.before(context.places), 1)
        mixed, window = self.conv1d.in_pass(convolved, context, before)
        mixed = F.silu(mixed)
        if takes_step(x, context):  # of q and k at once
            both, v = mixed.split([sum(self.widths[:2]), self.widths[2]], -1)
            q, k = _unit(both.unflatten(-1, (2, self.key_heads, -1)).to(wide)).unbind(2)
        else:
            q, k, v = mixed.split(self.widths, -1)
            q, k = (_unit(t.unflatten(-1, (self.key_heads, -1)).to(wide)) for t in (q, k))
        v = v.unflatten(-1, (self.value_heads, -1))
        z = z.unflatten(-1, (group, -1)).flatten(2, 3)
        return DeltaParameters(q * self.key_dim**-0.5, k, v, b, log_decay, z, convolved, window)

    def mix(
        self, parameters: DeltaParameters, context: Context, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The recurrence."""
        p = parameters
        kept = None if cache is None else cache.before(context.places)
        if takes_step(p.v, context):
            y, state = delta_step(p.q, p.k, p.v, p.b, p.log_decay, part(kept, 0))
        else:
            y, state = delta_recurrence(
                *(p.q, p.k, p.v, p.b, p.log_decay),
                segments=context.segments,
                boundaries=context.boundaries,
                state=part(kept, 0),
            )
        if isinstance(context.visibility, Cached):
            assert cache is not None and p.window is not None
            inputs = (p.convolved, p.k, p.v, p.b, p.log_decay)
            cache.append(inputs, (state, p.window), context.visibility.places)
        return y.to(p.v.dtype)

    def advance(self, state: State | None, inputs: Inputs, counts: Tensor) -> State:
        """The state after more inputs (RecurrentCache)."""
        convolved, k, v, b, log_decay = inputs
        if is_few(v):
            after = delta_state_step(k, v, b, log_decay, part(state, 0))
        else:
            after = delta_recurrence(k, k, v, b, log_decay, state=part(state, 0))[1]
        return after, self.conv1d.carried(part(state, 1), convolved, counts)

    def materialize(self, parameters: DeltaParameters, context: Context) -> Tensor:
        """(q k^T * D) (1 + tril(b k k^T * D, -1))^-1 b."""
        p = parameters
        visible = visible_pairs(p.v, context.visibility, causal=True)
        group = self.value_heads // self.key_heads
        q, k = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (p.q, p.k))
        decay, b = decay_matrix(p.log_decay, visible), p.b.transpose(1, 2)
        system = (b[..., None] * (k @ k.mT) * decay).tril(-1)
        solved = _solve(system, torch.diag_embed(b))
        return (q @ k.mT * decay) @ solved

    def finish(self, y: Tensor, x: Tensor, parameters: DeltaParameters) -> Tensor:
        """Norm, gate, project."""
        return self.out_proj((self.norm(y) * F.silu(parameters.z)).flatten(2))

    def health(self, parameters: DeltaParameters, context: Context) -> dict[str, Tensor]:
        """Mean decay."""
        return {"decay": mean_over_tokens(parameters.log_decay.exp(), context)}

    def flops_per_token(self, context_length: int) -> float:
        """Products of keys and the system inside a chunk, the state read twice and written."""
        keys, values = self.key_dim, self.value_dim
        inside = 2.0 * CHUNK * (2 * keys + values) + CHUNK * (keys + values)
        convolution = 2.0 * self.conv1d.kernel * sum(self.widths)
        return self.value_heads * (inside + 6.0 * keys * values) + convolution


def delta_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Every y_t, and the state after the last token, both float32 or float64."""
    if log_decay is None:
        log_decay = torch.zeros_like(b)
    if fla.serves(q, k, v, widest=fla.WIDEST_DELTA_KEY, one_decay=True):
        return fla.delta(
            q, k, v, b, log_decay, segments=segments, boundaries=boundaries, state=state
        )
    wide = wide_dtype(v.dtype)
    chunk, group = min(chunk, q.shape[1]), v.shape[2] // k.shape[2]
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    with torch.autocast(q.device.type, enabled=False):
        inputs = [t.to(wide) for t in (q, k, v, b, log_decay)]
        return in_blocks(_block, inputs, segments, state.to(wide), chunk, chunk * BLOCK)


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `delta_recurrence`, for the few new tokens of a pass with a cache (steps.py).

    Several tokens are one chunk; one token's y is q times the new state.
    """
    batch, new, heads, _ = v.shape
    k, v, b, g, before = _heads_in_front(k, v, b, log_decay, state)
    q = heads_in_front(repeated(q, heads).to(before.dtype))
    with without_autocast(v.device.type):
        if new == 1:
            after = before * g.exp()
            after.addcmul_(k.mT, (v - torch.bmm(k, after)).mul_(b))
            y = torch.bmm(q, after)
        else:
            left = step_decays(g.squeeze(2))
            both = torch.cat((k, q), 1)
            scores, read = (torch.bmm(both, t).unflatten(1, (2, new)) for t in (k.mT, before))
            scores, read = scores * left[:, None, :, 1:], read * left[:, None, :, :1]
            u = _replacing(scores[:, 0], read[:, 0], v, b)
            y = torch.baddbmm(read[:, 1], scores[:, 1].tril(), u)
            after = written(k, u, left[:, -1:], before)
    return tokens_in_front(y, batch), after.unflatten(0, (batch, heads))


def delta_state_step(
    k: Tensor, v: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None
) -> Tensor:
    """The state of `delta_step` alone, as a replay wants it (recurrent_cache.py)."""
    rows_and_heads = v.shape[0], v.shape[2]
    k, v, b, g, before = _heads_in_front(k, v, b, log_decay, state)
    with without_autocast(v.device.type):
        left = step_decays(g.squeeze(2))
        scores, read = torch.bmm(k, k.mT) * left[..., 1:], torch.bmm(k, before) * left[..., :1]
        u = _replacing(scores, read, v, b)
        return written(k, u, left[:, -1:], before).unflatten(0, rows_and_heads)


def _heads_in_front(
    k: Tensor, v: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    """Each (heads of all rows, new, dim), and the state (heads of all rows, K, V), all wide."""
    wide, heads = wide_dtype(v.dtype), v.shape[2]
    before = state_before(k, v, state).flatten(0, 1)
    inputs = repeated(k, heads), v, b[..., None], log_decay[..., None]
    return (*(heads_in_front(t.to(wide)) for t in inputs), before)


def _replacing(scores: Tensor, read: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The written values u (heads, new, V), from decayed k k^T and what decayed keys read."""
    return _solve((scores * b).tril(-1), (v - read).mul_(b))


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    g: Tensor,
    segments: Tensor | None,
    last: Tensor | None,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    *inputs, segments = whole_chunks((q, k, v, b[..., None], g[..., None]), segments, chunk)
    q, k, v, b, g = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in inputs)  # (b, n, h, i, .)
    documents = None if segments is None else Documents(segments, last, chunk)
    inside, since, until, carried = (t.squeeze(3) for t in decays(g[:, :, :, None], documents))
    system = (b * (k @ k.mT) * inside).tril(-1)
    read = k * since[..., None]
    written, erased = _solve(system, b * torch.cat((v, read), -1)).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    keys = (k * until[..., None]).mT
    states, news = [], []
    chunks = (t.unbind(1) for t in (written, erased, keys, carried[..., None]))
    for write, erase, key, kept in zip(*chunks, strict=True):
        states.append(state)
        news.append(write - erase @ state)
        state = state * kept + key @ news[-1]
    y = (q @ k.mT * inside) @ torch.stack(news, 1)
    y = y + (q * since[..., None]) @ torch.stack(states, 1)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """(1 + system)^-1 right, for a strictly lower triangular system."""
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
