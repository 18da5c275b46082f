"""Softmax attention with grouped query heads: y_i = sum_j softmax_j(q_i k_j / sqrt(head_dim)) v_j.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; grouped heads: Ainslie et al. 2023
(arXiv 2305.13245); rotary positions: rotary.py; norm of queries and keys before the rotation, per
head: Qwen3 (arXiv 2505.09388).

Shapes: q (batch, length, heads, head_dim), k and v (batch, length, kv_heads, head_dim); query head
h reads kv head h // (heads / kv_heads). Keys are cached after the rotation.

With a sliding window a query sees that many tokens, itself included (Beltagy et al. 2020, arXiv
2004.05150; Mistral). Long rows are then cut into blocks of a window's length, each of which looks
at itself and the block before, so that time and memory are linear in the length.

Packed rows: on a CPU each document is attended to by itself, so that no work is spent on pairs that
must not see each other. On a GPU one kernel does the same. A mask is used where that kernel does
not serve (it wants half precision), and where a compiler wants fixed shapes. Isolation is exact in
all three ways: a masked weight is 0.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.cache import KeyValues
from llmnorm.nn.layer_cache import VERIFIED
from llmnorm.nn.linear import Linear
from llmnorm.nn.masks import causal_mask, document_mask
from llmnorm.nn.mixers import varlen
from llmnorm.nn.mixers.causal import causal_attention, halves_are_faster
from llmnorm.nn.mixers.contract import Context, ProjectedMixer
from llmnorm.nn.mixers.health import entropies, mean, queries
from llmnorm.nn.mixers.rotary import rotate
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.projections import joined, outputs
from llmnorm.nn.visibility import Cached, Masked, Packed, Plain

WIDE = (torch.float32, torch.float64)


class SoftmaxParameters(NamedTuple):
    """q (batch, length, heads, head_dim), k and v (batch, length, kv_heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor


class SoftmaxAttention(ProjectedMixer[SoftmaxParameters, KeyValues]):
    """Softmax attention; the projections carry Hugging Face's names."""

    same_input: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        assert causal or sliding_window is None
        self.causal = causal
        self.heads, self.kv_heads, self.head_dim = (
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        )
        width, kv_width = self.heads * head_dim, self.kv_heads * head_dim
        self.q_proj = Linear(hidden_size, width, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = Linear(width, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, eps=qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=qk_norm_eps)
        self.qk_norm = qk_norm_eps is not None
        self.sliding_window = sliding_window

    def new_cache(self) -> KeyValues:
        """Keys and values; refused where it looks at later tokens."""
        if not self.causal:
            return super().new_cache()
        return KeyValues(self.sliding_window, heads=self.kv_heads, head_dim=self.head_dim)

    def prepare(
        self, x: Tensor, context: Context, cache: KeyValues | None = None
    ) -> SoftmaxParameters:
        """Project, norm if asked, rotate."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        projections, cos, sin = (self.q_proj, self.k_proj, self.v_proj), context.cos, context.sin
        together = None if self.qk_norm else joined(x, *projections)
        if together is not None:
            # At inference: queries and keys turn by the same angles, so they turn together.
            sizes = [self.heads, self.kv_heads]
            turned, v = together.view(heads).split([sum(sizes), self.kv_heads], -2)
            q, k = rotate(turned, cos, sin).split(sizes, -2)
            return SoftmaxParameters(q, k, v)
        q, k, v = (t.view(heads) for t in outputs(x, *projections))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return SoftmaxParameters(rotate(q, cos, sin), rotate(k, cos, sin), v)

    def mix(
        self, parameters: SoftmaxParameters, context: Context, cache: KeyValues | None = None
    ) -> Tensor:
        """Attend over the new tokens, or over the cache after appending them."""
        match context.visibility:
            case Packed() as packed:
                return self._mix_documents(parameters, packed)
            case Cached() as cached:
                assert cache is not None
                return self._mix_cached(parameters, cached, cache)
            case Masked(mask=mask) if mask is not None:
                return self._attend(*_heads_first(parameters), self._in_window(mask))
            case Plain() | Masked():
                return self._attend_freely(*_heads_first(parameters))

    def _mix_documents(self, parameters: SoftmaxParameters, packed: Packed) -> Tensor:
        if packed.mask is not None:
            return self._attend(*_heads_first(parameters), self._in_window(packed.mask))
        q, k, v = (t.flatten(0, 1) for t in parameters)
        if packed.kernel:
            assert packed.boundaries is not None
            mixed = varlen.attention(
                *(q, k, v, packed.boundaries, packed.longest, self.sliding_window),
                causal=self.causal,
            )
            return mixed.view_as(parameters.q)
        # `split`, not slices: its backward is one concatenation.
        pieces = [t.transpose(0, 1).unsqueeze(0).split(packed.lengths, 2) for t in (q, k, v)]
        alone = [self._attend_freely(*qkv).squeeze(0) for qkv in zip(*pieces, strict=True)]
        return torch.cat(alone).view_as(parameters.q)

    def _mix_cached(
        self, parameters: SoftmaxParameters, cached: Cached, cache: KeyValues
    ) -> Tensor:
        places = cached.places
        keys, values = cache.append(parameters.k, parameters.v, places)
        q = parameters.q
        if places.fills_empty_rows:
            return self._attend_freely(*_heads_first(parameters))
        if q.device.type == "cpu" and q.dtype in WIDE and q.shape[1] <= VERIFIED:
            heads = self.kv_heads, self.heads // self.kv_heads
            mask = cache.product_mask(places, q.dtype, heads)
            return self._attend_by_products(q, keys, values, mask)
        mask = cache.mask(places, q.dtype)
        return self._attend(q.transpose(1, 2), keys, values, mask)

    def _attend_by_products(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`_attend` for few queries on a CPU: two products, and a softmax between them.

        q (batch, new, heads, head_dim), k and v (batch, kv_heads, width, head_dim), mask (batch
        kv_heads or 1, group new, width): the queries of a group stand below each other, before one
        head of keys.

        It takes 5 of 27 ms from a step of 4 rows (26M weights, 192 slots, one thread of a Xeon with
        AVX-512), and the result of a row is the same for any number of rows. Below float32 torch's
        kernel keeps its scores wider than these products would, so it stays.
        """
        new, group = q.shape[1], self.heads // self.kv_heads
        in_front = q if new == 1 else q.transpose(1, 2)
        queries = in_front.reshape(-1, group * new, self.head_dim) * self.head_dim**-0.5
        # Views, as rows and heads follow each other without gaps.
        keys, values = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
        scores = torch.bmm(queries, keys) if mask is None else torch.baddbmm(mask, queries, keys)
        mixed = torch.bmm(scores.softmax(-1), values)
        if new == 1:
            return mixed.view(-1, 1, self.heads, self.head_dim)
        return mixed.view(-1, self.heads, new, self.head_dim).transpose(1, 2)

    def _attend_freely(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention without a mask: direction and window alone say what a query sees."""
        length, window = q.shape[2], self.sliding_window
        if window is None or length <= window:
            return self._attend(q, k, v, None, causal=self.causal)
        blocks = []
        for start in range(0, length, window):
            first, end = max(0, start - window + 1), min(start + window, length)
            keys, values = (t[:, :, first:end] for t in (k, v))
            queries = torch.arange(start, end, device=q.device)[:, None]
            behind = queries - torch.arange(first, end, device=q.device)
            visible = (behind >= 0) & (behind < window)
            blocks.append(self._attend(q[:, :, start:end], keys, values, visible))
        return torch.cat(blocks, 1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """(batch, heads, length, head_dim) -> (batch, length, heads, head_dim)."""
        if causal and halves_are_faster(q, k):
            return causal_attention(q, k, v).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        if mask is not None and q.is_cuda and grouped:
            # The kernel for masks has no grouped heads; torch's fallback keeps all scores.
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            grouped = False
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return mixed.transpose(1, 2)

    def _in_window(self, mask: Tensor) -> Tensor:
        """A mask (.., length, length) without the keys that are too far behind."""
        if self.sliding_window is None:
            return mask
        return mask & causal_mask(mask.shape[-1], mask.device).triu(1 - self.sliding_window)

    def materialize(self, parameters: SoftmaxParameters, context: Context) -> Tensor:
        """The attention weights (batch, heads, length, length)."""
        q, k, _ = parameters
        match context.visibility:
            case Masked(mask=mask) if mask is not None:
                visible = mask
            case Packed(segments=segments):
                visible = document_mask(segments, causal=self.causal)
            case Plain() | Masked():
                visible = causal_mask(q.shape[1], q.device)
                visible = visible if self.causal else torch.ones_like(visible)
            case Cached():
                raise AssertionError("the matrix is that of rows without a cache")
        visible = self._in_window(visible)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.head_dim**-0.5
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)

    def finish(self, y: Tensor, x: Tensor, parameters: SoftmaxParameters) -> Tensor:
        """Join the heads and project."""
        return self.o_proj(y.reshape(*x.shape[:-1], -1))

    def health(self, parameters: SoftmaxParameters, context: Context) -> dict[str, Tensor]:
        """Entropy, largest logit."""
        wide = wide_dtype(parameters.q.dtype)
        q, k = parameters.q.to(wide) * self.head_dim**-0.5, parameters.k.to(wide)
        k = k.repeat_interleave(self.heads // self.kv_heads, 2)
        found, largest = [], []
        looks = queries(q, context, causal=self.causal, window=self.sliding_window)
        for row, some, visible in looks:
            logits = torch.einsum("ihd,jhd->hij", q[row, some], k[row])
            logits = logits.masked_fill(~visible, -torch.inf)
            largest.append(logits.amax())
            found.append(entropies(logits.softmax(-1), visible))
        return {"entropy": mean(found), "max_logit": torch.stack(largest).amax()}

    def flops_per_token(self, context_length: int) -> float:
        """Scores and weighted sum over the context or the window (PaLM credits no causality)."""
        seen = min(context_length, self.sliding_window or context_length)
        return 4.0 * self.heads * self.head_dim * seen


def _heads_first(parameters: SoftmaxParameters) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, heads, head_dim) -> (batch, heads, length, head_dim)."""
    q, k, v = parameters
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
