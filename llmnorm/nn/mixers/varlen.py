"""Attention over documents laid end to end, in one GPU kernel: flash-attn's or torch's own.

Shapes: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), boundaries (documents +
1,) int32. Both kernels want bf16 or fp16 and neither has a CPU form, so the imports wait for a GPU.
Both are single operators to a compiler, which sees no more of the documents than `boundaries`.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmnorm.nn.precision import product_dtype

FLASH_ATTN = find_spec("flash_attn") is not None
# Older versions serve grouped heads without the argument `enable_gqa`, and refuse the argument.
TAKES_ENABLE_GQA = torch.__version__ >= "2.12"


def serves(hidden: Tensor) -> bool:
    """Whether a kernel can serve queries that are projected from `hidden`."""
    return hidden.is_cuda and product_dtype(hidden) in (torch.bfloat16, torch.float16)


def has_kernel(head_dim: int) -> bool:
    """Whether the kernels have heads of this width; for what `serves`."""
    return head_dim % 8 == 0 and head_dim <= 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Each document's attention, (tokens, heads, head_dim); none has more than `longest` tokens.

    A query sees `window` tokens, itself included; None: all before it, and (causal=False) after it.
    """
    # Both kernels want the numbers of tokens seen before and after the query; -1 is all of them.
    window_size = (-1 if window is None else window - 1, 0 if causal else -1)
    if FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q,
            k,
            v,
            boundaries,
            boundaries,
            longest,
            longest,
            causal=causal,
            window_size=window_size,
        )
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if TAKES_ENABLE_GQA and q.shape[1] != k.shape[1]:
        grouped["enable_gqa"] = True
    mixed = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        longest,
        longest,
        window_size=window_size,
        **grouped,
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed
