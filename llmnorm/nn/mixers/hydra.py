"""Hydra: two SSDs, one a direction, and a free diagonal: a quasiseparable matrix.

Source: Hwang, Lahoti, Dao, Gu 2024 (arXiv 2407.09941), proposition 3.7, and the official module
(goombalab/hydra, hydra/modules/hydra.py), whose parameter names these are:
  y = shift(SSD(x)) + flip(shift(SSD(flip x))) + delta x,
where shift delays by one token and delta = fc_D(x) + D. Both directions share the projection of x
and z, the convolution, A and the offset of dt; B, C and dt are each one's own.

Shapes: as ssd.py's; B and C (batch, length, n_groups, state_size), dt (batch, length, heads).
Surprises: through the shift row i reads C of its neighbour (C_{i-1} forward, C_{i+1} backward),
which is what the official code does and equation 3 does not. The norm comes before the gate, the
opposite of Mamba-2, and over all channels. It looks at later tokens and serves encoders only.
`add` and `concat` are the ablations of table 3. `add` is SSD(x) + flip(SSD(flip x)), whose diagonal
is the sum of C_i B_i dt_i of both directions, without a free part. `concat` puts both side by side,
[forward, backward] of head 0, then of head 1, ..., and has a norm, a gate (z twice) and an output
projection of twice the width.
Documents are kept apart, and padding is kept out, in the convolution, both scans and both shifts;
the official code leaks in all of them.
"""

from typing import Literal, NamedTuple, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.masks import causal_mask
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.fla import flipped
from llmnorm.nn.mixers.heads import whole_heads
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.linear_recurrence import flops_per_token, linear_recurrence
from llmnorm.nn.mixers.ssd import initial_dt_bias, semiseparable_matrix, time_steps
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.visibility import visible_pairs


class Direction(NamedTuple):
    """C, B, dt and log_decay = A dt of one direction, in the order of the text."""

    C: Tensor
    B: Tensor
    dt: Tensor
    log_decay: Tensor


class HydraParameters(NamedTuple):
    """Both directions, the values v = x, their diagonal delta (batch, length, heads), gate z.

    Only the quasiseparable form has a delta.
    """

    forward: Direction
    backward: Direction
    v: Tensor
    delta: Tensor | None
    z: Tensor


class Hydra(Mixer[HydraParameters, Never]):
    """The layer; `dt_range` and `dt_floor` are those of the initial time steps."""

    causal = False

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
        combination: Literal["quasiseparable", "add", "concat"] = "quasiseparable",
    ) -> None:
        super().__init__()
        self.combination = combination
        inner = expand * hidden_size
        self.heads, self.head_dim = whole_heads(inner, head_dim, n_groups), head_dim
        self.groups, self.state_size = n_groups, state_size
        self.dt_limit, self.dt_range, self.dt_floor = dt_limit, dt_range, dt_floor
        four = 4 * n_groups * state_size
        self.parts = [inner, inner + four, 2 * self.heads]
        self.in_proj = Linear(hidden_size, sum(self.parts), bias=use_bias)
        self.conv1d = ShortConvolution(inner + four, conv_kernel, bias=use_conv_bias, causal=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        if combination == "quasiseparable":
            self.fc_D = Linear(inner, self.heads, bias=False)
            self.D = nn.Parameter(torch.empty(self.heads))
        self.copies = 2 if combination == "concat" else 1
        self.norm = RMSNorm(self.copies * inner, eps=norm_eps)
        self.out_proj = Linear(self.copies * inner, hidden_size, bias=use_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform in dt_range, A = -1, D one."""
        with torch.no_grad():
            self.dt_bias.copy_(initial_dt_bias(self.dt_bias, self.dt_range, self.dt_floor))
            self.A_log.zero_()
            if self.combination == "quasiseparable":
                self.D.fill_(1)

    @property
    def output(self) -> Linear:
        """out_proj."""
        return self.out_proj

    def prepare(self, x: Tensor, context: Context, cache: None = None) -> HydraParameters:
        """Project, convolve, make both directions' time steps."""
        z, convolved, raw = self.in_proj(x).split(self.parts, -1)
        raw = raw.unflatten(-1, (2, -1))
        dt = time_steps(raw, self.dt_bias, self.dt_limit, context.real)
        if context.real is not None:
            convolved = convolved.masked_fill(~context.real[..., None], 0)
        mixed = F.silu(self.conv1d(convolved, context.segments))
        v, both = mixed.split([self.heads * self.head_dim, 4 * self.groups * self.state_size], -1)
        both = both.unflatten(-1, (2, 2, self.groups, self.state_size))
        decay = -self.A_log.to(dt.dtype).exp() * dt
        forward, backward = (
            Direction(both[:, :, i, 1], both[:, :, i, 0], dt[:, :, i], decay[:, :, i])
            for i in (0, 1)
        )
        delta = self.fc_D(v) + self.D if self.combination == "quasiseparable" else None
        return HydraParameters(
            forward, backward, v.unflatten(-1, (self.heads, self.head_dim)), delta, z
        )

    def mix(self, parameters: HydraParameters, context: Context, cache: None = None) -> Tensor:
        """Both scans, shifted, and the diagonal."""
        p, shifted = parameters, self.combination == "quasiseparable"
        both = both_scans(p.forward, p.backward, p.v, context, shifted=shifted)
        if self.combination == "concat":
            return torch.stack(both, 3).flatten(2, 3).to(p.v.dtype)
        y = both[0] + both[1]
        return (y if p.delta is None else y + p.delta[..., None] * p.v).to(p.v.dtype)

    def materialize(self, parameters: HydraParameters, context: Context) -> Tensor:
        """Strictly lower and upper triangles of rank state_size, and delta between them."""
        p, shifted = parameters, self.combination == "quasiseparable"
        visible = visible_pairs(p.v, context.visibility, causal=False)
        both = both_triangles(p.forward, p.backward, shifted=shifted)
        if self.combination == "concat":
            return torch.stack(both, 2).flatten(1, 2).masked_fill(~visible, 0)
        matrix = (both[0] + both[1]).masked_fill(~visible, 0)
        return matrix if p.delta is None else matrix + torch.diag_embed(p.delta.transpose(1, 2))

    def finish(self, y: Tensor, x: Tensor, parameters: HydraParameters) -> Tensor:
        """Norm, gate, project."""
        gate = F.silu(parameters.z)
        if self.copies > 1:
            gate = gate.unflatten(-1, (self.heads, -1)).repeat_interleave(self.copies, 2).flatten(2)
        return self.out_proj(self.norm(y.flatten(2)) * gate)

    def health(self, parameters: HydraParameters, context: Context) -> dict[str, Tensor]:
        """Mean decay of both directions, mean diagonal."""
        p = parameters
        both = torch.stack([p.forward.log_decay, p.backward.log_decay], -1).exp()
        found = {"decay": mean_over_tokens(both, context)}
        if p.delta is not None:
            found["delta"] = mean_over_tokens(p.delta, context)
        return found

    def flops_per_token(self, context_length: int) -> float:
        """Both recurrences and the convolution."""
        heads = self.groups, self.groups, self.heads
        scans = 2 * flops_per_token(heads, self.state_size, self.head_dim)
        return scans + 2.0 * self.conv1d.kernel * self.parts[1]


def both_scans(
    forward: Direction,
    backward: Direction,
    v: Tensor,
    context: Context,
    *,
    shifted: bool = True,
) -> tuple[Tensor, Tensor]:
    """What each token reads of those before it and of those behind it, in float32 or float64.

    shifted: itself not included, and read by the C of its neighbour.
    """
    segments, boundaries = context.segments, context.boundaries
    before = _scan(forward, v, segments, boundaries, shifted)
    segments = None if segments is None else segments.flip(1)
    boundaries = flipped(boundaries, v.shape[1])
    return before, _scan(_flip(backward), v.flip(1), segments, boundaries, shifted).flip(1)


def both_triangles(
    forward: Direction, backward: Direction, *, shifted: bool = True
) -> tuple[Tensor, Tensor]:
    """The matrices of `both_scans` for one document, (batch, heads, length, length)."""
    return _triangle(forward, shifted), _triangle(_flip(backward), shifted).flip(2, 3)


def _flip(direction: Direction) -> Direction:
    return Direction(*(t.flip(1) for t in direction))


def _scan(
    p: Direction, v: Tensor, segments: Tensor | None, boundaries: Tensor | None, shifted: bool
) -> Tensor:
    """What the state holds in i's document; shifted, row i has it of the tokens before i."""
    written = v * p.dt[..., None]
    y, _ = linear_recurrence(
        p.C, p.B, written, p.log_decay, segments=segments, boundaries=boundaries
    )
    if not shifted:
        return y
    y = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0))
    if segments is None:
        return y
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return y.masked_fill(first[..., None, None], 0)


def _triangle(p: Direction, shifted: bool) -> Tensor:
    weights = semiseparable_matrix(*p, causal_mask(p.dt.shape[1], p.dt.device))
    return F.pad(weights[:, :, :-1], (0, 0, 1, 0)) if shifted else weights
