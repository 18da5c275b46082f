"""SSD, the mixer of Mamba-2: S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = C_t S_t + D x_t.

Source: Dao & Gu 2024 (arXiv 2405.21060), sections 5 to 7, and the official module
(state-spaces/mamba, mamba_ssm/modules/mamba2.py), whose parameter names these are. One projection
gives z, x, B, C and dt; x, B and C pass a causal depthwise convolution and silu, dt softplus; the
output is RMSNorm(y * silu(z)), the gate before the norm, then projected.

Shapes: inner = expand * hidden = heads * head_dim; x (batch, length, heads, head_dim), B and C
(batch, length, n_groups, state_size), dt (batch, length, heads), A and D (heads,). Head h reads
group h // (heads / n_groups). No rotary positions. The norm is per group of inner / n_groups
channels. Padding gets dt = 0: it writes nothing and nothing decays.
"""

import math
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.chunks import decay_matrix
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.heads import whole_heads
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.linear_recurrence import flops_per_token, linear_recurrence
from llmnorm.nn.mixers.linear_step import recurrence_step, state_step
from llmnorm.nn.mixers.steps import is_few, takes_step
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.recurrent_cache import RecurrentCache
from llmnorm.nn.states import Inputs, InputShape, State, part
from llmnorm.nn.visibility import Cached, Masked, visible_pairs


class SSDParameters(NamedTuple):
    """C, B, values v = x, dt and log_decay = A dt in float32, gate z, what was convolved, and the
    convolution's next window if the rows have a cache."""

    C: Tensor
    B: Tensor
    v: Tensor
    dt: Tensor
    log_decay: Tensor
    z: Tensor
    convolved: Tensor
    window: Tensor | None = None


class StateSpaceBlock(TypedDict):
    """The keyword arguments that `SSD` and `Hydra` share."""

    expand: int
    head_dim: int
    n_groups: int
    use_bias: bool
    norm_eps: float
    dt_limit: tuple[float, float] | None
    dt_range: tuple[float, float]
    dt_floor: float


class SSD(Mixer[SSDParameters, RecurrentCache]):
    """Mamba-2's mixer; `dt_range` and `dt_floor` are those of the initial time steps."""

    causal = True

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: int,
        head_dim: int,
        state_size: int,
        n_groups: int,
        conv_kernel: int,
        use_conv_bias: bool,
        use_bias: bool,
        norm_eps: float,
        dt_limit: tuple[float, float] | None,
        dt_range: tuple[float, float],
        dt_floor: float,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        self.heads, self.head_dim = whole_heads(inner, head_dim, n_groups), head_dim
        self.groups, self.state_size = n_groups, state_size
        self.dt_limit, self.dt_range, self.dt_floor = dt_limit, dt_range, dt_floor
        both = 2 * n_groups * state_size
        self.parts = [inner, inner + both, self.heads]
        self.in_proj = Linear(hidden_size, sum(self.parts), bias=use_bias)
        self.conv1d = ShortConvolution(inner + both, conv_kernel, bias=use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GroupedRMSNorm(inner, groups=n_groups, eps=norm_eps)
        self.out_proj = Linear(inner, hidden_size, bias=use_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform in dt_range, A uniform in (-16, -1), D one."""
        with torch.no_grad():
            self.dt_bias.copy_(initial_dt_bias(self.dt_bias, self.dt_range, self.dt_floor))
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1)

    @property
    def output(self) -> Linear:
        """out_proj."""
        return self.out_proj

    def new_cache(self) -> RecurrentCache:
        """The state and the convolution's last inputs."""
        keys, values = (self.groups, self.state_size), (self.heads, self.head_dim)
        inputs = (
            InputShape((len(self.conv1d.weight),), wide=False),
            InputShape(keys, wide=False),
            InputShape(values, wide=True),
            InputShape((self.heads,), wide=True),
        )
        return RecurrentCache(self.advance, inputs)

    def prepare(
        self, x: Tensor, context: Context, cache: RecurrentCache | None = None
    ) -> SSDParameters:
        """Project, convolve, make time steps."""
        z, convolved, dt = self.in_proj(x).split(self.parts, -1)
        dt = time_steps(dt, self.dt_bias, self.dt_limit, context.real)
        if isinstance(context.visibility, Masked):  # behind a cache, no real token sees padding
            convolved = convolved.masked_fill(~context.visibility.real[..., None], 0)
        before = None if cache is None else part(cache.before(context.places), 1)
        mixed, window = self.conv1d.in_pass(convolved, context, before)
        mixed = F.silu(mixed)
        both = self.groups * self.state_size
        v, B, C = mixed.split([self.heads * self.head_dim, both, both], -1)
        groups = (*x.shape[:-1], self.groups, self.state_size)
        v = v.unflatten(-1, (self.heads, self.head_dim))
        log_decay = -self.A_log.to(dt.dtype).exp() * dt
        return SSDParameters(C.view(groups), B.view(groups), v, dt, log_decay, z, convolved, window)

    def mix(
        self, parameters: SSDParameters, context: Context, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The recurrence, and D x."""
        p = parameters
        kept = None if cache is None else cache.before(context.places)
        written = p.v * p.dt[..., None]
        if takes_step(p.v, context):
            y, state = recurrence_step(p.C, p.B, written, p.log_decay, part(kept, 0))
        else:
            y, state = linear_recurrence(
                *(p.C, p.B, written, p.log_decay),
                segments=context.segments,
                boundaries=context.boundaries,
                state=part(kept, 0),
            )
        if isinstance(context.visibility, Cached):
            assert cache is not None and p.window is not None
            inputs = (p.convolved, p.B, written, p.log_decay)
            cache.append(inputs, (state, p.window), context.visibility.places)
        return torch.addcmul(y, self.D.to(y.dtype)[:, None], p.v.to(y.dtype)).to(p.v.dtype)

    def advance(self, state: State | None, inputs: Inputs, counts: Tensor) -> State:
        """The state after more inputs (RecurrentCache)."""
        convolved, B, written, log_decay = inputs
        if is_few(B):
            after = state_step(B, written, log_decay, part(state, 0))
        else:
            after = linear_recurrence(B, B, written, log_decay, state=part(state, 0))[1]
        return after, self.conv1d.carried(part(state, 1), convolved, counts)

    def materialize(self, parameters: SSDParameters, context: Context) -> Tensor:
        """The semiseparable matrix, and D on the diagonal."""
        p = parameters
        visible = visible_pairs(p.v, context.visibility, causal=True)
        diagonal = torch.eye(p.v.shape[1], device=p.v.device) * self.D[:, None, None]
        return semiseparable_matrix(p.C, p.B, p.dt, p.log_decay, visible) + diagonal

    def finish(self, y: Tensor, x: Tensor, parameters: SSDParameters) -> Tensor:
        """Gate, norm, project."""
        return self.out_proj(self.norm(y.flatten(2) * F.silu(parameters.z)))

    def health(self, parameters: SSDParameters, context: Context) -> dict[str, Tensor]:
        """Mean decay."""
        return {"decay": mean_over_tokens(parameters.log_decay.exp(), context)}

    def flops_per_token(self, context_length: int) -> float:
        """The recurrence and the convolution."""
        heads = self.groups, self.groups, self.heads
        convolution = 2.0 * self.conv1d.kernel * (self.parts[1])
        return flops_per_token(heads, self.state_size, self.head_dim) + convolution


def initial_dt_bias(like: Tensor, between: tuple[float, float], floor: float) -> Tensor:
    """Offsets whose softplus is log-uniform `between` two time steps and at least `floor`."""
    low, high = (math.log(value) for value in between)
    dt = torch.empty_like(like).uniform_(low, high).exp_().clamp_(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def time_steps(
    raw: Tensor, offset: Tensor, limit: tuple[float, float] | None, real: Tensor | None
) -> Tensor:
    """dt = softplus(raw + offset) within `limit`, in float32 or float64; 0 for padding.

    raw (batch, length, ..., heads); real (batch, length) is False for padding.
    """
    wide = wide_dtype(raw.dtype)
    dt = F.softplus(raw.to(wide) + offset.to(wide))
    if limit is not None:
        dt = dt.clamp(*limit)
    return dt if real is None else dt.masked_fill(~real.view(*real.shape, *[1] * (dt.ndim - 2)), 0)


def semiseparable_matrix(
    C: Tensor, B: Tensor, dt: Tensor, log_decay: Tensor, visible: Tensor
) -> Tensor:
    """(C_i . B_j) * decay from j to i * dt_j, (batch, heads, length, length); 0 if not visible."""
    repeats = dt.shape[2] // C.shape[2]
    C, B = (t.repeat_interleave(repeats, 2).to(dt.dtype) for t in (C, B))
    weights = torch.einsum("bihn,bjhn->bhij", C, B) * decay_matrix(log_decay, visible)
    return weights * dt.transpose(1, 2)[:, :, None]


class GroupedRMSNorm(RMSNorm):
    """RMS norm of each of `groups` equal parts of the last axis."""

    def __init__(self, hidden_size: int, *, groups: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        if self.groups == 1:
            return super().forward(x)
        wide = wide_dtype(x.dtype)
        parts = x.to(wide).unflatten(-1, (self.groups, -1))
        r = torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return ((parts * r).flatten(-2) * self.weight.to(wide)).to(x.dtype)
