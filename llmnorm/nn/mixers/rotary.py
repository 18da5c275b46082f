"""Rotary positions: cos and sin tables with Hugging Face's scaling kinds, and the rotation.

Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2, with the half-split pairing of Llama
(dimension i turns with i + head_dim/2). Scaling kinds: linear, dynamic (NTK), yarn (arXiv
2309.00071), llama3, longrope (arXiv 2402.13753); each is transformers' own formula in its order of
operations, so float32 tables are bit-equal to theirs.

Shapes: positions (batch, length); cos and sin (batch, length, 1, head_dim/2), the 1 standing for
the heads; x (batch, length, heads, head_dim).

Surprises: `Rotary` is no module and holds Python numbers only, so a model built on the meta device
cannot lose its tables; float64 is used only where the caller asks for it. `dynamic` and `longrope`
depend on the longest position of the call; unlike transformers', a call does not depend on those
before it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.precision import without_autocast
from llmnorm.nn.settings import RopeParameters


class Rotary:
    """Makes cos and sin for positions."""

    def __init__(
        self, parameters: RopeParameters, head_dim: int, max_position_embeddings: int
    ) -> None:
        self.parameters = parameters
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self._fixed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (batch, length, 1, head_dim/2) of positions (batch, length), in `dtype`."""
        with torch.no_grad(), without_autocast(positions.device.type):
            angles = positions[..., None].to(dtype) * self._frequencies(positions, dtype)
            scale = self.attention_scaling()
            return (angles.cos() * scale).unsqueeze(-2), (angles.sin() * scale).unsqueeze(-2)

    @property
    def reach(self) -> int | None:
        """Tokens up to which a call's tables do not depend on its longest row; None: any."""
        if self.parameters.rope_type == "longrope":
            return self.parameters.original_max_position_embeddings
        return self.max_position_embeddings if self.parameters.rope_type == "dynamic" else None

    def _frequencies(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        if self.parameters.rope_type in ("dynamic", "longrope"):
            return self.frequencies(dtype, positions.max() + 1)
        # What a tracer makes is no number: kept, it would be the next eager pass's.
        if torch.compiler.is_compiling() or type(positions) is not Tensor:
            return self.frequencies(dtype).to(positions.device)
        key = (positions.device, dtype)
        if key not in self._fixed:
            self._fixed[key] = self.frequencies(dtype).to(positions.device)
        return self._fixed[key]

    def frequencies(self, dtype: torch.dtype, longest: Tensor | None = None) -> Tensor:
        """Radians a position of each pair, (head_dim/2,), on the CPU or the device of `longest`.

        `longest`: 0-dim, the length of the call, 1 if None.
        """
        longest = torch.ones((), device="cpu") if longest is None else longest
        return _FREQUENCIES[self.parameters.rope_type](self, dtype, longest)

    def attention_scaling(self) -> float:
        """The factor on cos and sin: 1 but for yarn and longrope."""
        p = self.parameters
        if p.attention_factor is not None:
            return p.attention_factor
        if p.rope_type == "yarn":
            assert p.factor is not None
            if p.mscale and p.mscale_all_dim:
                return _mscale(p.factor, p.mscale) / _mscale(p.factor, p.mscale_all_dim)
            return _mscale(p.factor, 1.0)
        if p.rope_type == "longrope":
            assert p.original_max_position_embeddings is not None
            factor = p.factor or self.max_position_embeddings / p.original_max_position_embeddings
            if factor > 1:
                return math.sqrt(
                    1 + math.log(factor) / math.log(p.original_max_position_embeddings)
                )
        return 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, length, heads, head_dim) turned by its positions' angles, in x's dtype.

    (a, b) -> (a cos - b sin, b cos + a sin) with a, b the halves of head_dim; below float32 the
    products are float32 and only the result is rounded.
    """
    if x.device.type == "cpu" and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The same in four passes over memory each way; the way back turns by minus the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.unflatten(-1, (2, -1))
    out = halves * cos.unsqueeze(-2)
    (a, b), (first, second) = halves.unbind(-2), out.unbind(-2)
    first.addcmul_(b, sin, value=-1)
    second.addcmul_(a, sin)
    return out.flatten(-2)


def _exponents(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    numbers = torch.arange(0, rotary.head_dim, 2, device=longest.device)
    return numbers.to(dtype) / rotary.head_dim


def _default(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    return 1.0 / (rotary.parameters.rope_theta ** _exponents(rotary, dtype, longest))


def _linear(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    assert rotary.parameters.factor is not None
    return _default(rotary, dtype, longest) / rotary.parameters.factor


def _dynamic(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    limit, dim, factor = (
        rotary.max_position_embeddings,
        rotary.head_dim,
        rotary.parameters.factor,
    )
    assert factor is not None
    stretch = (factor * longest.to(dtype) / limit) - (factor - 1)
    base = rotary.parameters.rope_theta * stretch.clamp(min=1) ** (dim / (dim - 2))
    stretched = 1.0 / (base ** _exponents(rotary, dtype, longest))
    return torch.where(longest > limit, stretched, _default(rotary, dtype, longest))


def _yarn(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    p, dim = rotary.parameters, rotary.head_dim
    assert p.factor is not None and p.original_max_position_embeddings is not None
    original = p.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        """The dimension that makes this many rotations within the original context."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(p.rope_theta))

    low, high = dimension(p.beta_fast or 32), dimension(p.beta_slow or 1)
    if p.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    pairs = torch.arange(dim // 2, dtype=dtype, device=longest.device)
    keep = 1 - torch.clamp((pairs - low) / (high - low), 0, 1)
    wavelengths = p.rope_theta ** _exponents(rotary, dtype, longest)
    return 1.0 / (p.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _llama3(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    p, frequencies = rotary.parameters, _default(rotary, dtype, longest)
    original, factor = p.original_max_position_embeddings, p.factor
    assert original is not None and factor is not None
    assert p.low_freq_factor is not None and p.high_freq_factor is not None
    long, short = original / p.low_freq_factor, original / p.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > long, frequencies / factor, frequencies)
    smooth = (original / wavelengths - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    return torch.where((wavelengths >= short) & (wavelengths <= long), between, stretched)


def _longrope(rotary: Rotary, dtype: torch.dtype, longest: Tensor) -> Tensor:
    p = rotary.parameters
    assert p.original_max_position_embeddings is not None
    far, near = (
        torch.tensor(factors, dtype=dtype, device=longest.device)
        for factors in (p.long_factor, p.short_factor)
    )
    factors = torch.where(longest > p.original_max_position_embeddings, far, near)
    return 1.0 / (factors * p.rope_theta ** _exponents(rotary, dtype, longest))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
