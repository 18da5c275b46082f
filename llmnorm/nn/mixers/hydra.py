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
Documents and padding are kept out of the convolution, both scans and both shifts, in all of which
the official code leaks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.contract import Context, Mixer, causal_mask, visible_pairs
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.linear_recurrence import flops_per_token, linear_recurrence
from llmnorm.nn.mixers.ssd import initial_dt_bias, semiseparable_matrix, time_steps
from llmnorm.nn.norms.rms import RMSNorm


class Direction(NamedTuple):
    """C, B, dt and log_decay = A dt of one direction, in the order of the text."""

    C: Tensor
    B: Tensor
    dt: Tensor
    log_decay: Tensor


class HydraParameters(NamedTuple):
    """Both directions, the values v = x, their diagonal delta (batch, length, heads), gate z."""

    forward: Direction
    backward: Direction
    v: Tensor
    delta: Tensor
    z: Tensor


class Hydra(Mixer):
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
        use_bias: bool,
        norm_eps: float,
        dt_limit: tuple[float, float] | None,
        dt_range: tuple[float, float],
        dt_floor: float,
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        self.heads, self.head_dim = inner // head_dim, head_dim
        self.groups, self.state_size = n_groups, state_size
        self.dt_limit, self.dt_range, self.dt_floor = dt_limit, dt_range, dt_floor
        four = 4 * n_groups * state_size
        self.parts = [inner, inner + four, 2 * self.heads]
        self.in_proj = Linear(hidden_size, sum(self.parts), bias=use_bias)
        self.conv1d = ShortConvolution(inner + four, conv_kernel, causal=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.fc_D = Linear(inner, self.heads, bias=False)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.out_proj = Linear(inner, hidden_size, bias=use_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform in dt_range, A = -1, D one."""
        with torch.no_grad():
            self.dt_bias.copy_(initial_dt_bias(self.dt_bias, self.dt_range, self.dt_floor))
            self.A_log.zero_()
            self.D.fill_(1)

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
        delta = self.fc_D(v) + self.D
        return HydraParameters(
            forward, backward, v.unflatten(-1, (self.heads, self.head_dim)), delta, z
        )

    def mix(self, parameters: HydraParameters, context: Context, cache: None = None) -> Tensor:
        """Both scans, shifted, and the diagonal."""
        p = parameters
        y = scan_both_ways(p.forward, p.backward, p.v, context.segments)
        return (y + p.delta[..., None] * p.v).to(p.v.dtype)

    def materialize(self, parameters: HydraParameters, context: Context) -> Tensor:
        """Strictly lower and upper triangles of rank state_size, and delta between them."""
        p = parameters
        visible = visible_pairs(p.v, context, causal=False)
        delta = torch.diag_embed(p.delta.transpose(1, 2))
        return triangles(p.forward, p.backward).masked_fill(~visible, 0) + delta

    def finish(self, y: Tensor, x: Tensor, parameters: HydraParameters) -> Tensor:
        """Norm, gate, project."""
        return self.out_proj(self.norm(y.flatten(2)) * F.silu(parameters.z))

    def flops_per_token(self, context_length: int) -> float:
        """Both recurrences and the convolution."""
        heads = self.groups, self.groups, self.heads
        scans = 2 * flops_per_token(heads, self.state_size, self.head_dim)
        return scans + 2.0 * self.conv1d.kernel * self.parts[1]


def scan_both_ways(
    forward: Direction, backward: Direction, v: Tensor, segments: Tensor | None
) -> Tensor:
    """What each token reads of those before and behind it, in float32 or float64."""
    before = _shifted_scan(forward, v, segments)
    flipped = None if segments is None else segments.flip(1)
    return before + _shifted_scan(_flip(backward), v.flip(1), flipped).flip(1)


def triangles(forward: Direction, backward: Direction) -> Tensor:
    """The matrix of `scan_both_ways` for one document, (batch, heads, length, length)."""
    return _shifted_matrix(forward) + _shifted_matrix(_flip(backward)).flip(2, 3)


def _flip(direction: Direction) -> Direction:
    return Direction(*(t.flip(1) for t in direction))


def _shifted_scan(p: Direction, v: Tensor, segments: Tensor | None) -> Tensor:
    """Row i is what the state holds of the tokens before i, in i's document."""
    written = v * p.dt[..., None]
    y, _ = linear_recurrence(p.C, p.B, written, p.log_decay, segments=segments)
    y = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0))
    if segments is None:
        return y
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return y.masked_fill(first[..., None, None], 0)


def _shifted_matrix(p: Direction) -> Tensor:
    visible = causal_mask(p.dt.shape[1], p.dt.device)
    weights = semiseparable_matrix(*p, visible)
    return F.pad(weights[:, :, :-1], (0, 0, 1, 0))
