"""The quasiseparable family: Hydra's matrix, with B and C shared by directions and heads.

Source: Hwang et al. 2024 (arXiv 2407.09941), proposition 3.7; hydra.py says what
the matrix is. Its diagonal, delta = fc_D(v) + D, stands for the identity that other families add.

Shapes: B and C (batch or 1, length, 1, heads * qk_dim), one group for all heads; dt (batch, length,
heads) of each direction; `BC` (longest, 2 heads qk_dim) where they are learned. Then a head has one
time step, softplus(dt_bias), at all tokens; delta follows the token all the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.hydra import Direction, both_scans, both_triangles
from llmnorm.nn.mixers.linear_recurrence import flops_per_token
from llmnorm.nn.mixers.matrix.family import Family, positions
from llmnorm.nn.mixers.ssd import initial_dt_bias, time_steps
from llmnorm.nn.visibility import visible_pairs

FIRST_TIME_STEPS = (1e-3, 0.1)
SMALLEST_TIME_STEP = 1e-4


class Made(NamedTuple):
    """Both directions and the diagonal (batch, length, heads)."""

    forward: Direction
    backward: Direction
    delta: Tensor


class Quasiseparable(Family[Made]):
    """Two scans and a free diagonal."""

    activated = True
    residual = False

    def __init__(
        self, heads: int, head_dim: int, longest: int, *, qk_dim: int, data_dependent: bool
    ) -> None:
        super().__init__()
        self.heads, self.state_size = heads, heads * qk_dim
        self.data_dependent = data_dependent
        if data_dependent:
            self.convolved, self.plain = 2 * self.state_size, 2 * heads
        else:
            self.longest = longest
            self.BC = nn.Parameter(torch.empty(longest, 2 * self.state_size))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.fc_D = Linear(heads * head_dim, heads, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps log-uniform, A = -1, D one; learned B and C by Xavier's normal."""
        with torch.no_grad():
            first = initial_dt_bias(self.dt_bias, FIRST_TIME_STEPS, SMALLEST_TIME_STEP)
            self.dt_bias.copy_(first)
            self.A_log.zero_()
            self.D.fill_(1)
        if not self.data_dependent:
            nn.init.xavier_normal_(self.BC)

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> Made:
        """B, C and time steps of both directions."""
        if self.data_dependent:
            both, raw = convolved, plain.unflatten(-1, (2, self.heads))
        else:
            both = self.BC[positions(v, context)].to(v.dtype).expand(len(v), -1, -1)
            raw = v.new_zeros(*v.shape[:2], 2, self.heads)
        B, C = (t.unsqueeze(2) for t in both.chunk(2, -1))
        dt = time_steps(raw, self.dt_bias, None, context.real)
        decay = -self.A_log.to(dt.dtype).exp() * dt
        forward, backward = (Direction(C, B, dt[:, :, i], decay[:, :, i]) for i in (0, 1))
        return Made(forward, backward, self.fc_D(v.flatten(2)) + self.D)

    def matrix(self, made: Made, v: Tensor, context: Context) -> Tensor:
        """The two triangles, and delta between them."""
        visible = visible_pairs(v, context.visibility, causal=False)
        lower, upper = both_triangles(made.forward, made.backward)
        delta = torch.diag_embed(made.delta.transpose(1, 2))
        return (lower + upper).masked_fill(~visible, 0) + delta

    def mix(self, made: Made, v: Tensor, context: Context) -> Tensor:
        """Both scans, and the diagonal."""
        before, behind = both_scans(made.forward, made.backward, v, context)
        return (before + behind + made.delta[..., None] * v).to(v.dtype)

    def health(self, made: Made, context: Context) -> dict[str, Tensor]:
        """Mean diagonal."""
        return {"delta": mean_over_tokens(made.delta, context)}

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """Both scans."""
        return 2 * flops_per_token((1, 1, self.heads), self.state_size, head_dim)
