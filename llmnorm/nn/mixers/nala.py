"""NaLa: norm-aware linear attention, whose sharpness follows the norm of the query.

Source: NaLaFormer (arXiv 2506.21137) and its official code, class NormAwareLinearAttn of
ZacharyMeng/NaLaFormer. Plain linear attention cancels |q| between numerator and denominator; here
  phi_q(q) = |q / |q||^p(|q|) split by sign,  p(n) = lam (tau + tanh(n / norm_scale)),
  phi_k(k) = |k|^lam split by sign            (elementwise powers),
where "split by sign" puts positive and negative dimensions into separate halves, so that products
of opposite signs are 0; `direction="cosine"` puts sin and cos of an angle there instead, pi/4 +
(pi/4) tanh(alpha x/|x|), which tends to the sign split as alpha grows. (The paper's angle lacks the
pi/4, so that its features are ours turned by 45 degrees; their products are the same.) The rest is
linear.py: rotary positions in the numerator only, eps on the mean, local convolution of v, norm
(load-bearing: rows of the matrix do not sum to 1), gate.

The official code is an image classifier, bidirectional. Causal NaLa is our derivation: on every
prefix the last row equals the official module's.

Shapes: q and k (batch, length, heads, head_dim) -> features (batch, length, heads, 2 head_dim).
Surprises. The key keeps its norm, so the denominator scales with |k|^lam and eps shows where keys
are small. tanh saturates near |q| = 3, beyond which the norm has no say; norm_scale moves that. q
is divided by sqrt(|q|^2 + query_eps^2), since a query of zero would be nan (officially it is).
"""

import math
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.health import mean_over_tokens
from llmnorm.nn.mixers.linear import LinearAttention, LinearBlock, LinearParameters
from llmnorm.nn.precision import wide_dtype
from llmnorm.part import InputError


class NaLa(LinearAttention):
    """Linear attention with norm-aware features."""

    def __init__(
        self,
        hidden_size: int,
        *,
        lam: float = 3.0,
        tau: float = 0.5,
        norm_scale: float = 1.0,
        direction: Literal["sign", "cosine"] = "sign",
        alpha: float = 20.0,
        query_eps: float = 1e-3,
        **block: Unpack[LinearBlock],
    ) -> None:
        super().__init__(hidden_size, **block)
        if min(lam, lam * tau) < 1:  # a power below 1 has an infinite gradient at 0
            raise InputError(f"lam {lam} and lam * tau {lam * tau:g} must be at least 1")
        self.lam, self.tau, self.norm_scale, self.query_eps = lam, tau, norm_scale, query_eps
        self.direction, self.alpha = direction, alpha
        self.feature_dim = 2 * self.head_dim

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi_q(q) and phi_k(k), twice as wide as the head."""
        shape = (self.lam, self.tau, self.norm_scale, self.query_eps)
        if self.direction == "sign":
            return _QueryFeatures.apply(q, *shape), _KeyFeatures.apply(k, self.lam)
        length = (q.square().sum(-1, keepdim=True) + self.query_eps**2).sqrt()
        power = self.lam * (self.tau + (length / self.norm_scale).tanh())
        key_length = (k.square().sum(-1, keepdim=True) + self.query_eps**2).sqrt()
        return (
            self._angles((q / length).abs().pow(power), q / length),
            self._angles(k.abs().pow(self.lam), k / key_length),
        )

    def step_features(self, q: Tensor, k: Tensor) -> Tensor:
        """Both side by side; by sign, powers of the parts of |q| / length and |k|."""
        if self.direction != "sign":
            return super().step_features(q, k)
        both, heads = torch.cat((q, k), 2), q.shape[2]
        parts = torch.cat((both, -both), -1).relu_()
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        length = length.square_().add_(self.query_eps**2).sqrt_()
        scaled = length if self.norm_scale == 1 else length / self.norm_scale
        power = scaled.tanh().add_(self.tau).mul_(self.lam)
        of_q, of_k = parts.split([heads, k.shape[2]], 2)
        of_q.div_(length).pow_(power)
        of_k.pow_(self.lam)
        return parts

    def _angles(self, size: Tensor, direction: Tensor) -> Tensor:
        # Between 0 and pi/2 no feature is negative and no product of two tokens' features cancels;
        # and sin of the other angle keeps the digits that cos near pi/2 would lose.
        twice = 2 * self.alpha * direction
        sin, cos = ((math.pi / 2 * part.sigmoid()).sin() for part in (twice, -twice))
        return torch.cat((size * sin, size * cos), -1)

    def health(self, parameters: LinearParameters, context: Context) -> dict[str, Tensor]:
        """Those of linear attention, and the share of queries whose norm has no say any more."""
        q = parameters.q.to(wide_dtype(parameters.q.dtype))
        length = (q.square().sum(-1) + self.query_eps**2).sqrt()
        below = self.lam * (1 - (length / self.norm_scale).tanh())
        saturation = mean_over_tokens((below < 1e-3).to(q.dtype), context)
        return {**super().health(parameters, context), "saturation": saturation}


class _QueryFeatures(torch.autograd.Function):
    """Both halves of phi_q; only q is kept for the backward pass.

    With r = |q| / length elementwise, u = r^p and a = (its gradient) u:
    dq = a p / q - (sum a) p q / length^2 + (sum a log r) p' q / length.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, lam: float, tau: float, scale: float, eps: float) -> Tensor:
        ctx.save_for_backward(q)
        ctx.constants = lam, tau, scale, eps
        log_r, power, _, _ = _query_powers(q, lam, tau, scale, eps)
        return _split(log_r.mul_(power).exp_(), q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q,) = ctx.saved_tensors
        lam, _, scale, _ = ctx.constants
        log_r, power, length, tanh = _query_powers(q, *ctx.constants)
        a = _joined(grads[0], q).mul_((log_r * power).exp_())
        slope = (1 - tanh.square()).mul_(lam / scale)
        along = (a * log_r).sum(-1, keepdim=True) * slope - a.sum(-1, keepdim=True) * power / length
        return (
            a.mul_(power).div_(q.masked_fill(q == 0, 1)).addcmul_(q, along / length),
            *(None,) * 4,
        )


class _KeyFeatures(torch.autograd.Function):
    """Both halves of phi_k; only k is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, lam: float) -> Tensor:
        ctx.save_for_backward(k)
        ctx.lam = lam
        return _split(k.abs().pow_(lam), k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (k,) = ctx.saved_tensors
        slope = k.abs().pow_(ctx.lam - 1).mul_(ctx.lam).copysign_(k)
        return _joined(grads[0], k).mul_(slope), None


def _query_powers(
    q: Tensor, lam: float, tau: float, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log of |q| / length elementwise, and the power, length and tanh of every query."""
    length = (q.square().sum(-1, keepdim=True) + eps**2).sqrt_()
    tanh = (length / scale).tanh_()
    tiny = torch.finfo(q.dtype).tiny
    return (q.abs() / length).clamp_(min=tiny).log_(), lam * (tau + tanh), length, tanh


def _split(size: Tensor, x: Tensor) -> Tensor:
    """`size` where x is positive, beside `size` where it is negative; size is 0 where x is."""
    signed, width = size.copysign(x), x.shape[-1]
    if torch.compiler.is_compiling():
        return torch.cat((signed.clamp(min=0), (-signed).clamp(min=0)), -1)
    out = x.new_empty(*x.shape[:-1], 2 * width)
    torch.clamp(signed, min=0, out=out[..., :width])
    torch.clamp(signed.neg_(), min=0, out=out[..., width:])
    return out


def _joined(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `size` from that of `_split`'s result, where x is not 0."""
    positive, negative = grad.chunk(2, -1)
    return torch.where(x > 0, positive, negative)
