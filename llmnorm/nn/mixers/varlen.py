"""Attention over documents laid end to end, in one GPU kernel: flash-attn's or torch's own.

Shapes: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), boundaries (documents +
1,) int32. Both kernels want bf16 or fp16 and neither has a CPU form, so the imports wait for a GPU.
"""

from importlib.util import find_spec

import torch
from torch import Tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Each document's attention, (tokens, heads, head_dim); `longest`: its most tokens.

    A query sees `window` tokens, itself included; None: all before it, and (causal=False) after it.
    """
    # Both kernels count the tokens before and after the query; -1 is all of them.
    around = (-1 if window is None else window - 1, 0 if causal else -1)
    if find_spec("flash_attn") is not None:
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
            window_size=around,
        )
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        longest,
        longest,
        window_size=around,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed
