"""The Toeplitz family: M_ij = m_{i-j} / (2 sqrt(length)), a convolution as long as the document.

Source: Hwang et al. 2024 (arXiv 2407.09941), table 1. Token r of a document brings two taps of each
head, `forward` m_r and `reverse` m_{-r} (that of token 0 is not used); learned taps belong to the
position r instead (`conv_params` (heads, 2 longest - 1), the tap of distance r at longest - 1 + r,
as in the official code).

Shapes: forward and reverse (batch or 1, length, heads). By FFT, n log n, of each document alone;
by the explicit matrix where there is padding, or where only a mask tells documents apart.

Surprise. The official code reads m_{i-j+1}, and m_{-(L-1)} where that is m_L: off by one, with a
wrap. `official_compat` does so too, in rows of exactly the length that it scales by.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.matrix.family import (
    Family,
    by_document,
    positions,
    root_of_length,
)
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Plain, visible_pairs
from llmnorm.part import InputError


class Taps(NamedTuple):
    """m_r and m_{-r} of the token at position r of its document."""

    forward: Tensor
    reverse: Tensor


class Toeplitz(Family[Taps]):
    """One convolution a head, of the whole document."""

    activated = True

    def __init__(
        self, heads: int, longest: int, *, data_dependent: bool, official_compat: bool
    ) -> None:
        super().__init__()
        self.heads, self.data_dependent = heads, data_dependent
        self.fixed = longest if official_compat else None
        if data_dependent:
            self.convolved = 2 * heads
        else:
            self.longest = longest
            self.conv_params = nn.Parameter(torch.empty(heads, 2 * longest - 1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform, as the official code."""
        nn.init.xavier_uniform_(self.conv_params)

    def check(self, length: int, context: Context) -> None:
        """The official code knows one length, no documents and no padding."""
        super().check(length, context)
        alone = isinstance(context.visibility, Plain)
        if self.fixed is not None and not (alone and length == self.fixed):
            raise InputError(
                "model.mixer.family.official_compat: the official Toeplitz matrix serves whole rows"
                f" of exactly max_position_embeddings = {self.fixed} tokens, one document each; "
                f"got {length}{'' if alone else ' with documents or padding'}; nearest: false"
            )

    def prepare(self, convolved: Tensor, plain: Tensor, v: Tensor, context: Context) -> Taps:
        """The token's taps, or its position's."""
        if self.data_dependent:
            return Taps._make(convolved.unflatten(-1, (2, self.heads)).unbind(2))
        assert self.longest is not None
        position, taps = positions(v, context), self.conv_params.t()
        return Taps(taps[self.longest - 1 + position], taps[self.longest - 1 - position])

    def matrix(self, made: Taps, v: Tensor, context: Context) -> Tensor:
        """Every entry's tap, looked up at the token that brings it."""
        visible = visible_pairs(v, context.visibility, causal=False)
        position = positions(v, context)
        distance = position[:, :, None] - position[:, None, :]
        if self.fixed is not None:
            last = self.fixed - 1
            distance = torch.where(distance == last, -last, distance + 1)
        token = _tokens_at(position, visible[:, 0]).gather(2, distance.abs())
        index = torch.where(distance >= 0, token, token + position.shape[1])
        row = torch.arange(len(made.forward), device=v.device)[:, None, None]
        taps = torch.cat(made, 1)[row, index].permute(0, 3, 1, 2)
        root = root_of_length(v, context, self.fixed)[:, None, :, None]
        return (taps.to(wide_dtype(v.dtype)) * 0.5 / root).masked_fill(~visible, 0)

    def mix(self, made: Taps, v: Tensor, context: Context) -> Tensor:
        """By FFT where that can be."""
        mixed = None
        if self.fixed is None:
            mixed = by_document(_convolve, context.visibility, *made, v)
        return super().mix(made, v, context) if mixed is None else mixed

    def flops_per_token(self, context_length: int, head_dim: int) -> float:
        """Two real transforms a channel, one a head (Cooley & Tukey's 5/2 n log2 n each)."""
        size = _size(context_length)
        transform = 2.5 * size * (size.bit_length() - 1) / context_length
        return transform * self.heads * (2 * head_dim + 1)


def _convolve(forward: Tensor, reverse: Tensor, v: Tensor) -> Tensor:
    """The convolution of one document, around a circle on which no two distances meet."""
    length, wide = v.shape[1], wide_dtype(v.dtype)
    size = _size(length)
    with torch.autocast(v.device.type, enabled=False):
        gap = forward.new_zeros(len(forward), size - 2 * length + 1, forward.shape[2])
        circle = torch.cat((forward, gap, reverse[:, 1:].flip(1)), 1).to(wide)
        spectrum = torch.fft.rfft(circle, dim=1)[..., None]
        product = spectrum * torch.fft.rfft(v.to(wide), n=size, dim=1)
        y = torch.fft.irfft(product, n=size, dim=1)[:, :length]
    return (y * (0.5 * length**-0.5)).to(v.dtype)


def _size(length: int) -> int:
    """The power of two that holds all distances: 4 -> 8 (from -3 to 3), 5 -> 16."""
    return 1 << (2 * length - 2).bit_length()


def _tokens_at(position: Tensor, visible: Tensor) -> Tensor:
    """(batch, i, r): the token at position r of i's document; 0 where it has none.

    position (batch or 1, length), visible (batch or 1, length, length).
    """
    length = position.shape[1]
    visible, position = torch.broadcast_tensors(visible, position[:, None, :])
    token = torch.arange(length, device=position.device).expand_as(position)
    found = torch.zeros(*position.shape[:2], length + 1, dtype=torch.long, device=position.device)
    return found.scatter(2, torch.where(visible, position, length), token)[..., :length]
