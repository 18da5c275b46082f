"""The matrix mixer: y = M v for a matrix of any family, in one block for all of them.

Source: Hwang, Lahoti, Dao, Gu 2024 (arXiv 2407.09941), table 1 and appendix D.2, and the official
module (goombalab/hydra, hydra/modules/matrix_mixer.py), whose parameter names these are. One
projection gives the gate z, the values and what the family's matrix is made of; all but z and time
steps pass a symmetric depthwise convolution, the values silu as well; the output is
RMSNorm(M v) * silu(z), projected. The families' files beside this one define M.

Shapes: inner = expand * hidden = heads * head_dim; v (batch, length, heads, head_dim), 0 at
padding. It looks at later tokens and serves encoders only. The identity that all families but the
quasiseparable add belongs to M.
"""

from typing import Generic, NamedTuple, Never

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.matrix.family import Family, Made
from llmnorm.nn.norms.rms import RMSNorm


class MatrixParameters(NamedTuple, Generic[Made]):
    """The values, what the family's matrix is made of, the gate."""

    v: Tensor
    made: Made
    z: Tensor


class MatrixMixer(Mixer[MatrixParameters[Made], Never], Generic[Made]):
    """The block around a family's matrix."""

    causal = False

    def __init__(
        self,
        hidden_size: int,
        family: Family[Made],
        *,
        heads: int,
        head_dim: int,
        conv_kernel: int,
        use_bias: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.matrix_mixer = family
        self.parts = [inner, inner + family.convolved, family.plain]
        self.in_proj = Linear(hidden_size, sum(self.parts), bias=use_bias)
        self.conv1d = ShortConvolution(inner + family.convolved, conv_kernel, causal=False)
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.out_proj = Linear(inner, hidden_size, bias=use_bias)

    @property
    def output(self) -> Linear:
        """out_proj."""
        return self.out_proj

    def prepare(self, x: Tensor, context: Context, cache: None = None) -> MatrixParameters[Made]:
        """Project, convolve, and let the family prepare its matrix.

        Raises:
            InputError: the family cannot serve such rows.
        """
        self.matrix_mixer.check(x.shape[1], context)
        z, convolved, plain = self.in_proj(x).split(self.parts, -1)
        padding = None if context.real is None else ~context.real[..., None]
        if padding is not None:
            convolved = convolved.masked_fill(padding, 0)
        convolved = self.conv1d(convolved, context.segments)
        v, own = convolved.split([self.parts[0], self.matrix_mixer.convolved], -1)
        v = F.silu(v)
        if self.matrix_mixer.activated:
            own = F.silu(own)
        if padding is not None:
            v = v.masked_fill(padding, 0)
        v = v.unflatten(-1, (self.heads, self.head_dim))
        return MatrixParameters(v, self.matrix_mixer.prepare(own, plain, v, context), z)

    def mix(
        self, parameters: MatrixParameters[Made], context: Context, cache: None = None
    ) -> Tensor:
        """The family's fast way, and the identity."""
        p = parameters
        y = self.matrix_mixer.mix(p.made, p.v, context)
        return y + p.v if self.matrix_mixer.residual else y

    def materialize(self, parameters: MatrixParameters[Made], context: Context) -> Tensor:
        """The family's matrix, and the identity, of every row and head."""
        p = parameters
        matrix = self.matrix_mixer.matrix(p.made, p.v, context)
        if self.matrix_mixer.residual:
            matrix = matrix + torch.eye(p.v.shape[1], dtype=matrix.dtype, device=matrix.device)
        return matrix.expand(len(p.v), self.heads, -1, -1)

    def finish(self, y: Tensor, x: Tensor, parameters: MatrixParameters) -> Tensor:
        """Norm, gate, project."""
        return self.out_proj(self.norm(y.flatten(2)) * F.silu(parameters.z))

    def health(self, parameters: MatrixParameters[Made], context: Context) -> dict[str, Tensor]:
        """The family's."""
        return self.matrix_mixer.health(parameters.made, context)

    def flops_per_token(self, context_length: int) -> float:
        """The family's, and the convolution."""
        convolution = 2.0 * self.conv1d.kernel * self.parts[1]
        return self.matrix_mixer.flops_per_token(context_length, self.head_dim) + convolution
