"""Attention over documents laid end to end, in one GPU kernel: flash-attn's or torch's own.

Shapes: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), boundaries (documents +
1,) int32. Both kernels want bf16 or fp16 and neither has a CPU form, so the imports wait for a GPU.
"""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def has_kernel(q: Tensor) -> bool:
    """Whether the kernels serve queries like q: on a GPU, half precision, heads of their widths."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


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

    grouped = q.shape[1] != k.shape[1]
    told: dict[str, Any] = {}
    if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        told = {"enable_gqa": True}
    elif grouped:  # torch 2.11 has no word for it
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    mixed = varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest, window_size=around, **told
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed
