"""Causal attention by halves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.mixers import causal
from llmnorm.nn.mixers.causal import SHORT, causal_attention, halves_are_faster


def inputs(length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


@pytest.mark.parametrize("length", [2 * SHORT, SHORT + 1, 4 * SHORT + 3])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_outputs_and_gradients(length: int, heads: tuple[int, int]) -> None:
    """Oracle: softmax over the full score matrix in float64; 1e-12, and 2e-6 in float32."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        q, k, v = inputs(length, *heads, dtype)
        out = causal_attention(q, k, v)
        upstream = torch.randn_like(out)
        got = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        keys, values = (t.repeat_interleave(heads[0] // heads[1], 1) for t in wide[1:])
        scores = wide[0] @ keys.mT / 8**0.5
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        full = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        expected = [full, *torch.autograd.grad(full, wide, upstream.double())]
        for one, other in zip(got, expected, strict=True):
            assert (one.double() - other).norm() < tolerance * other.norm()


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rule, and calls of torch's kernel counted: no block above the diagonal."""
    q, k, v = inputs(4 * SHORT, 2, 2, torch.float32)
    assert halves_are_faster(q, k)
    assert not halves_are_faster(q[:, :, :SHORT], k[:, :, :SHORT])
    assert not halves_are_faster(q.bfloat16(), k.bfloat16())
    assert not halves_are_faster(q[:, :, -1:], k)  # decoding
    calls = []
    kernel = causal._forward

    def counted(q: Tensor, k: Tensor, v: Tensor, dropout: float, masked: bool) -> Tensor:
        calls.append((q.shape[2], k.shape[2], masked))
        return kernel(q, k, v, dropout, masked)

    monkeypatch.setattr(causal, "_forward", counted)
    out = causal_attention(q, k, v)
    scores = sum(queries * keys for queries, keys, _ in calls)
    assert scores == 10 * SHORT**2  # of 16 blocks
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
