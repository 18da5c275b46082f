"""The Vandermonde family: waves over the positions; and its fixed form, the Fourier transform.

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1, in the real form of the
official code, where both rows and columns have frequencies:
  M_ij = sum_c [cos(2 pi eps q_ic j) - cos(2 pi eps k_jc i)] / sqrt(2 qk_dim length),
data-dependent, eps learned (`log_eps`, 1e-3 at first; the paper has none, the official code keeps
1e-3); and with learned frequencies, in turns a position,
  M_ij = sum_c [cos(2 pi q_ic j) + cos(2 pi k_jc i)] / sqrt(2 qk_dim length).
The fixed form is the real part of the discrete Fourier transform (FNet, Lee-Thorp et al. 2021,
arXiv 2105.03824): M_ij = cos(2 pi i j / length) / sqrt(length).

Shapes: q and k (batch or 1, length, heads, qk_dim); i and j are positions in the document.

Surprises. Signs differ between the two forms, as in the official code. There learned frequencies
never mix: the einsum multiplies a token by the sum of its row (`official_compat` does so too), and
its zeros at first have no gradient; ours are uniform in [0, 1).
"""

import math

import torch
from torch import Tensor, nn

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.matrix.family import (
    Family,
    QueriesKeys,
    QueryKeyFamily,
    by_document,
    positions,
    root_of_length,
    summed_over_channels,
)
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import visible_pairs, visible_tokens

FIRST_EPS = 1e-3


class Vandermonde(QueryKeyFamily):
    """Waves whose frequencies the tokens bring, or their positions."""

    def __init__(
        self,
        heads: int,
        longest: int,
        *,
        qk_dim: int,
        data_dependent: bool,
        official_compat: bool,
    ) -> None:
        super().__init__(
            heads,
            longest,
            qk_dim=qk_dim,
            data_dependent=data_dependent,
            official_compat=official_compat,
        )
        if data_dependent and not official_compat:
            self.log_eps = nn.Parameter(torch.empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """eps 1e-3; learned frequencies uniform in [0, 1)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name == "log_eps":
                    parameter.fill_(math.log(FIRST_EPS))
                else:
                    parameter.uniform_()

    def matrix(self, made: QueriesKeys, v: Tensor, context: Context) -> Tensor:
        """Waves of the rows over the columns' positions, and of the columns over the rows'."""
        wide = wide_dtype(v.dtype)
        visible = visible_pairs(v, context.visibility, causal=False)
        with torch.autocast(v.device.type, enabled=False):
            position = positions(v, context).to(wide)[:, :, None, None]
            q, k = (self._frequency(t.to(wide)) for t in made)
            of_rows = summed_over_channels(_wave, q, position.expand(-1, -1, 1, self.qk_dim))
            of_columns = summed_over_channels(_wave, k, position.expand(-1, -1, 1, self.qk_dim)).mT
            weights = of_rows - of_columns if self.data_dependent else of_rows + of_columns
            root = root_of_length(v, context, self.fixed)[:, None, :, None]
            weights = (weights / (math.sqrt(2 * self.qk_dim) * root)).masked_fill(~visible, 0)
        if self.fixed is not None and not self.data_dependent:
            return torch.diag_embed(weights.sum(-1))
        return weights

    def _frequency(self, t: Tensor) -> Tensor:
        """In turns a position."""
        if not self.data_dependent:
            return t
        return t * (FIRST_EPS if self.fixed is not None else self.log_eps.to(t.dtype).exp())


class DFT(Family[None]):
    """The same for all heads and without parameters."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> None:
        """Nothing."""

    def matrix(self, made: None, v: Tensor, context: Context) -> Tensor:
        """Angles by whole numbers, so that they are exact at any length."""
        position = positions(v, context)
        length = visible_tokens(v, context.visibility, causal=False)[..., None]
        turns = position[:, :, None] * position[:, None, :] % length
        wide = wide_dtype(v.dtype)  # whole numbers divide into float32, whatever is asked for
        weights = (
            torch.cos(2 * math.pi * turns.to(wide) / length)
            / root_of_length(v, context, None)[..., None]
        )
        return weights[:, None].masked_fill(~visible_pairs(v, context.visibility, causal=False), 0)

    def mix(self, made: None, v: Tensor, context: Context) -> Tensor:
        """By FFT where that can be."""
        mixed = by_document(_transform, context.visibility, v)
        return super().mix(made, v, context) if mixed is None else mixed

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """One transform a channel (Cooley & Tukey's 5/2 n log2 n for real numbers)."""
        return 2.5 * math.log2(max(context_length, 2)) * self.heads * head_dim


def _wave(frequency: Tensor, position: Tensor) -> Tensor:
    return torch.cos(2 * math.pi * frequency * position)


def _transform(v: Tensor) -> Tensor:
    spectrum = torch.fft.fft(v.to(wide_dtype(v.dtype)), dim=1, norm="ortho")
    return spectrum.real.to(v.dtype)
