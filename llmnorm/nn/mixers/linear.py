"""Linear attention with a normaliser: y_t = phi(q_t) S_t / (phi(q_t) Z_t + eps t).

Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 9 to 12 and phi(x) = elu(x) + 1;
rotary positions in the numerator only: Su et al. 2021 (arXiv 2104.09864), equation 19.
S_t = sum phi'(k_j) v_j^T with rotated features phi', Z_t = sum phi(k_j) with plain ones, t the
number of tokens summed: eps is added to the mean. The plain baseline of nala.py, which changes the
features and nothing else.

Shapes: q and its features (batch, length, heads, features), k's (batch, length, kv_heads,
features), v (batch, length, kv_heads, head_dim); query head h reads kv head h // (heads /
kv_heads), so the state is shared by the group.

Surprises. Rotated features are signed, so a rotated normaliser would pass through zero; and with a
plain one rows of the matrix do not sum to 1. Both sums are runs of linear_recurrence.py, the
normaliser with v = 1. The optional local term (a convolution of v), norm and gate come after
mixing: (norm(y + conv(v)) * silu(g)) W_o.
"""

from typing import ClassVar, Literal, NamedTuple, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.contract import Context, ProjectedMixer
from llmnorm.nn.mixers.convolution import ShortConvolution
from llmnorm.nn.mixers.health import entropies, mean, queries
from llmnorm.nn.mixers.linear_recurrence import CHUNK, flops_per_token, linear_recurrence
from llmnorm.nn.mixers.normalised_sums import (
    normalised_sums,
    states_step,
    sums_at_once,
    sums_step,
)
from llmnorm.nn.mixers.rotary import rotate
from llmnorm.nn.mixers.steps import is_few, takes_step
from llmnorm.nn.norms.layer import LayerNorm
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.precision import wide_dtype, without_autocast
from llmnorm.nn.projections import outputs
from llmnorm.nn.recurrent_cache import RecurrentCache
from llmnorm.nn.states import Inputs, InputShape, State, part
from llmnorm.nn.visibility import Cached, Masked, visible_pairs, visible_tokens


class LinearParameters(NamedTuple):
    """Queries, keys and values, and what `finish` takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    local: Tensor | None
    gate: Tensor | None
    window: Tensor | None = None

    @property
    def windows(self) -> tuple[Tensor, ...]:
        """With a cache: the convolution's next window, if there is a convolution."""
        return () if self.window is None else (self.window,)


class LinearBlock(TypedDict, total=False):
    """The keyword arguments of `LinearAttention`, which its subclasses take too."""

    num_attention_heads: Required[int]
    num_key_value_heads: Required[int]
    head_dim: Required[int]
    causal: bool
    bias: bool
    rotary: bool
    gate: bool
    conv_kernel: int
    norm: Literal["none", "rms", "layer"]
    norm_eps: float
    eps: float


class LinearAttention(ProjectedMixer[LinearParameters, RecurrentCache]):
    """Linear attention; subclasses change `features`."""

    same_input: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "g_proj")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        causal: bool = True,
        bias: bool = False,
        rotary: bool = True,
        gate: bool = False,
        conv_kernel: int = 0,
        norm: Literal["none", "rms", "layer"] = "none",
        norm_eps: float = 1e-6,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        )
        self.causal, self.rotary, self.eps = causal, rotary, eps
        self.feature_dim = head_dim
        width, kv_width = self.heads * head_dim, self.kv_heads * head_dim
        self.q_proj = Linear(hidden_size, width, bias=bias)
        self.k_proj = Linear(hidden_size, kv_width, bias=bias)
        self.v_proj = Linear(hidden_size, kv_width, bias=bias)
        self.g_proj = Linear(hidden_size, width, bias=bias) if gate else None
        self.conv1d = (
            ShortConvolution(kv_width, conv_kernel, causal=causal) if conv_kernel else None
        )
        self.norm: nn.Module | None = None
        self.norm_kind = norm  # not the module's class: an adapter may stand around it
        if norm != "none":
            self.norm = (
                RMSNorm(head_dim, eps=norm_eps)
                if norm == "rms"
                else LayerNorm(width, eps=norm_eps, bias=True)
            )
        self.o_proj = Linear(width, hidden_size, bias=bias)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Non-negative features of float32 queries and keys, phi_q(q) and phi_k(k)."""
        return F.elu(q) + 1, F.elu(k) + 1

    def new_cache(self) -> RecurrentCache:
        """S, Z and the convolution's last inputs; refused where it looks at later tokens."""
        if not self.causal:
            return super().new_cache()
        keys = InputShape((self.kv_heads, self.feature_dim), wide=True)
        values = InputShape((self.kv_heads, self.head_dim), wide=False)
        return RecurrentCache(self.advance, (keys, keys, values))

    def prepare(
        self, x: Tensor, context: Context, cache: RecurrentCache | None = None
    ) -> LinearParameters:
        """Project, convolve the values."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        gates = [] if self.g_proj is None else [self.g_proj]
        q, k, v, *gated = outputs(x, self.q_proj, self.k_proj, self.v_proj, *gates)
        gate = gated[0] if gated else None
        if isinstance(context.visibility, Masked):  # behind a cache, no real token sees padding
            v = v.masked_fill(~context.visibility.real[..., None], 0)
        local, window = None, None
        if self.conv1d is not None:
            before = None if cache is None else part(cache.before(context.places), 2)
            local, window = self.conv1d.in_pass(v, context, before)
            local = local.view(shape)
        return LinearParameters(q.view(shape), k.view(shape), v.view(shape), local, gate, window)

    def both_features(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of q and k as they are, and turned, in float32; padding's keys have none."""
        wide = wide_dtype(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            q, k = self.features(q.to(wide), k.to(wide))
            if real is not None:
                k = k.masked_fill(~real[..., None, None], 0)
            if not self.rotary:
                return q, k, q, k
            return q, k, self._turned(q, cos, sin), self._turned(k, cos, sin)

    def _turned(self, features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate every part of the width of a head."""
        parts = features.unflatten(-1, (-1, self.head_dim)).flatten(2, 3)
        return rotate(parts, cos, sin).view_as(features)

    def mix(
        self, parameters: LinearParameters, context: Context, cache: RecurrentCache | None = None
    ) -> Tensor:
        """The weighted sums over the tokens before (causal) or all of them, normalised."""
        p = parameters
        if takes_step(p.v, context):
            assert cache is not None
            return self._mix_step(p, context, cache)
        kept = None if cache is None else cache.before(context.places)
        wide = wide_dtype(p.v.dtype)
        shape = len(p.v), self.kv_heads, self.feature_dim
        states = kept or tuple(p.v.new_zeros(*shape, n, dtype=wide) for n in (self.head_dim, 1))
        q, k, v = (t.to(wide) for t in (p.q, p.k, p.v))
        by_kernel = fla.serves(p.q, p.k, p.v)
        y, total, *after = self._sums(q, k, v, states[:2], context, by_kernel)
        if isinstance(context.visibility, Cached):
            assert cache is not None
            places = context.visibility.places
            _, keys, _, turned_keys = self.both_features(
                q, k, context.cos, context.sin, context.real
            )
            cache.append((turned_keys, keys, p.v), (*after, *p.windows), places)
        return (y / self._denominator(total, p, context)).to(p.v.dtype)

    def _mix_step(self, p: LinearParameters, context: Context, cache: RecurrentCache) -> Tensor:
        """`mix` for few tokens behind the cache (steps.py)."""
        assert isinstance(context.visibility, Cached)
        places, wide, heads = context.visibility.places, wide_dtype(p.v.dtype), self.heads
        kept, v = cache.before(context.places), p.v.to(wide)
        by_use = [heads, self.kv_heads]
        with without_autocast(v.device.type):
            made = self.step_features(p.q.to(wide), p.k.to(wide))
            q, k = made.split(by_use, 2)
            if context.padding is not None:
                k.masked_fill_(context.padding[..., None, None], 0)
            turned = self._turned(made, context.cos, context.sin) if self.rotary else made
        turned_q, turned_k = turned.split(by_use, 2)
        y, total, *after = sums_step(q, k, turned_q, turned_k, v, kept)
        cache.append((turned_k, k, p.v), (*after, *p.windows), places)
        count = visible_tokens(v, context.visibility, causal=True)[..., None, None]
        return (y / total.add_(count, alpha=self.eps)).to(p.v.dtype)

    def step_features(self, q: Tensor, k: Tensor) -> Tensor:
        """`features` of the queries' and then the keys' heads, (batch, new, heads + kv_heads,
        features), without gradients; a subclass may make them in fewer operations."""
        return torch.cat(self.features(q, k), 2)

    def _sums(
        self, q: Tensor, k: Tensor, v: Tensor, states: State, context: Context, by_kernel: bool
    ) -> tuple[Tensor, ...]:
        """Numerator, normaliser, and both states behind the last token."""
        real, segments, boundaries = context.real, context.segments, context.boundaries
        row = (q, k, v, context.cos, context.sin)
        before = self._one_way(states, row, real, segments, boundaries, by_kernel)
        if self.causal:
            return before
        turned = (q.flip(1), k.flip(1), v.flip(1), context.cos.flip(1), context.sin.flip(1))
        real, segments = (None if t is None else t.flip(1) for t in (real, segments))
        boundaries = fla.flipped(boundaries, q.shape[1])
        behind = self._one_way(states, turned, real, segments, boundaries, by_kernel)
        after = (t.flip(1) for t in behind[:2])
        # Both directions count the token itself.
        repeats = self.heads // self.kv_heads
        q, k, turned_q, turned_k = self.both_features(q, k, context.cos, context.sin, context.real)
        k, turned_k, v = (t.repeat_interleave(repeats, 2) for t in (k, turned_k, v))
        itself = (turned_q * turned_k).sum(-1, keepdim=True) * v, (q * k).sum(-1, keepdim=True)
        return tuple(a + b - c for a, b, c in zip(before, after, itself, strict=False))

    def _one_way(
        self,
        states: State,
        row: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        real: Tensor | None,
        segments: Tensor | None,
        boundaries: Tensor | None,
        by_kernel: bool,
    ) -> tuple[Tensor, ...]:
        """The sums over the tokens before; row: q, k, v, cos and sin."""
        inputs = self.both_features, states, *row, real, segments
        if by_kernel or torch.compiler.is_compiling():
            return sums_at_once(*inputs, boundaries=boundaries, kernel=by_kernel)
        return normalised_sums(*inputs)

    def _denominator(self, total: Tensor, p: LinearParameters, context: Context) -> Tensor:
        """(batch, length, heads, 1): the sum of the unrotated weights, plus eps a token."""
        count = visible_tokens(p.v, context.visibility, causal=self.causal)[..., None, None]
        return total + self.eps * count.to(total.dtype)

    def advance(self, state: State | None, inputs: Inputs, counts: Tensor) -> State:
        """The state after more inputs (RecurrentCache)."""
        turned_k, k, v = inputs
        window: State = ()
        if self.conv1d is not None:
            window = (self.conv1d.carried(part(state, 2), v.flatten(2), counts),)
        if is_few(v):
            return (*states_step(k, turned_k, v, state), *window)
        one = v.new_ones(()).expand(*v.shape[:3], 1)
        sums = linear_recurrence(turned_k, turned_k, v, state=part(state, 0))[1]
        keys = linear_recurrence(k, k, one, state=part(state, 1))[1]
        return (sums, keys, *window)

    def materialize(self, parameters: LinearParameters, context: Context) -> Tensor:
        """(batch, heads, length, length): rotated weights over the sum of the unrotated ones."""
        p, repeats = parameters, self.heads // self.kv_heads
        visible = visible_pairs(p.v, context.visibility, causal=self.causal)
        q, k, turned_q, turned_k = self.both_features(
            p.q, p.k, context.cos, context.sin, context.real
        )

        def weights(q: Tensor, k: Tensor) -> Tensor:
            k = k.repeat_interleave(repeats, 2)
            return torch.einsum("bihf,bjhf->bhij", q, k).masked_fill(~visible, 0)

        total = weights(q, k).sum(-1, keepdim=True).transpose(1, 2)
        return weights(turned_q, turned_k) / self._denominator(total, p, context).transpose(1, 2)

    def finish(self, y: Tensor, x: Tensor, parameters: LinearParameters) -> Tensor:
        """Add the local term, norm, gate, project."""
        if parameters.local is not None:
            local, repeats = parameters.local, self.heads // self.kv_heads
            y = y + (local if repeats == 1 else local.repeat_interleave(repeats, 2))
        if self.norm is not None and self.norm_kind == "rms":
            y = self.norm(y)
        y = y.flatten(2)
        if self.norm is not None and self.norm_kind == "layer":
            y = self.norm(y)
        if parameters.gate is not None:
            y = y * F.silu(parameters.gate)
        return self.o_proj(y)

    def health(self, parameters: LinearParameters, context: Context) -> dict[str, Tensor]:
        """Smallest denominator, entropy of the unrotated weights, sums of the rotated ones."""
        p, repeats = parameters, self.heads // self.kv_heads
        q, k, turned_q, turned_k = self.both_features(
            p.q, p.k, context.cos, context.sin, context.real
        )
        k, turned_k = (t.repeat_interleave(repeats, 2) for t in (k, turned_k))
        smallest, found, sums = [], [], []
        for row, some, visible in queries(q, context, causal=self.causal):
            plain, turned = (
                torch.einsum("ihf,jhf->hij", a[row, some], b[row]).masked_fill(~visible, 0)
                for a, b in ((q, k), (turned_q, turned_k))
            )
            total, count = plain.sum(-1), visible.sum(-1).to(plain.dtype)
            smallest.append((total / count).amin())
            tiny = torch.finfo(plain.dtype).tiny
            found.append(entropies(plain / total.clamp(min=tiny)[..., None], visible))
            sums.append((turned.sum(-1) / (total + self.eps * count)).abs())
        return {
            "min_denominator": torch.stack(smallest).amin(),
            "entropy": mean(found),
            "row_sum": mean(sums),
        }

    def flops_per_token(self, context_length: int) -> float:
        """Numerator and normaliser, and the convolution."""
        heads = self.heads, self.kv_heads, self.kv_heads
        running = 2.0 * CHUNK * self.feature_dim * self.kv_heads
        sums = flops_per_token(heads, self.feature_dim, self.head_dim) + running
        kernel = 0 if self.conv1d is None else self.conv1d.kernel
        directions = 1 if self.causal else 2
        return directions * sums + 2.0 * kernel * self.kv_heads * self.head_dim
