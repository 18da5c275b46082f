"""Every norm of the registry: definition, gradients, precision, bf16, autocast."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmnorm.nn.norms.crms import CRMSNorm
from llmnorm.nn.norms.dyt import DyT
from llmnorm.nn.norms.layer import LayerNorm
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.norms.settings import LayerNormSettings, Norm, RMSNormSettings
from llmnorm.part import Settings

PARTS = get_args(get_args(Norm)[0])


def build(part: type[Settings], width: int) -> nn.Module:
    norm = part().build(width)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(width)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def plain(norm: nn.Module, x: Tensor) -> Tensor:
    """The definition, written out."""
    if isinstance(norm, LayerNorm):
        assert norm.bias is not None
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return norm.weight * centred / (variance + norm.eps).sqrt() + norm.bias
    if isinstance(norm, CRMSNorm):
        whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
        return (whole / (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt())[..., :-1]
    if isinstance(norm, DyT):
        assert norm.bias is not None
        return norm.weight * torch.tanh(norm.alpha * x) + norm.bias
    assert isinstance(norm, RMSNorm)
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize("part", PARTS)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(2, 33),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_output_and_gradients_are_the_definitions(
    part: type[Settings], shape: list[int], width: int, scale: float
) -> None:
    """Oracle: autograd through the definition, in float64."""
    torch.manual_seed(width)
    norm = build(part, width).double()
    x = (torch.randn(*shape, width, dtype=torch.float64) * scale).requires_grad_()
    upstream = torch.randn_like(x)
    inputs = (x, *norm.parameters())
    got = norm(x)
    expected = plain(norm, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * max(1.0, 1 / scale))


@pytest.mark.parametrize("part", PARTS)
def test_gradcheck(part: type[Settings]) -> None:
    """Oracle: finite differences; inputs of non-contiguous layout and frozen gains included."""
    norm = build(part, 7).double()
    x = torch.randn(7, 3, dtype=torch.float64).t().requires_grad_()
    weights = dict(norm.named_parameters())
    names = list(weights)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *weights.values()))
    norm.requires_grad_(False)
    assert torch.autograd.gradcheck(norm, (x,))
    norm.requires_grad_(True)
    frozen_input = x.detach()
    if weights:
        assert torch.autograd.gradcheck(lambda *w: run(frozen_input, *w), tuple(weights.values()))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_rounded_once_from_float32_statistics(part: type[Settings], autocast: bool) -> None:
    """Oracle: the definition in float64 of the same bf16 values, rounded to bf16."""
    norm = build(part, 48)
    x = torch.randn(5, 48).mul(30).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = norm(x)
    assert got.dtype == torch.bfloat16
    expected = plain(norm, x.double())
    assert (got.double() - expected).abs().max() <= expected.abs().max() * 2**-8
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert norm(x.float()).dtype == torch.float32


def test_bf16_gradients_keep_their_dtypes() -> None:
    """Oracle: float32 gradients of the same values, within bf16's rounding."""
    norm = build(RMSNormSettings, 48)
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    norm(x).sum().backward()
    wide = x.detach().float().requires_grad_()
    expected = torch.autograd.grad(plain(norm, wide).sum(), (wide, norm.weight))
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.float(), expected[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm.weight.grad, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 7, 64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_cast_mode_is_bit_equal_to_llama(width: int, dtype: torch.dtype) -> None:
    """Oracle: transformers' LlamaRMSNorm, output and gradients, to the last bit."""
    ours = RMSNormSettings(eps=1e-5, cast_mode="llama").build(width).to(dtype)
    theirs = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(torch.randn(width))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, width, dtype=dtype)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(one), theirs(other)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert one.grad is not None and other.grad is not None
    assert torch.equal(one.grad, other.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_cast_modes_differ_below_float32() -> None:
    """Oracle: a test of bit-equality to one mode must be able to fail for the other."""
    x, gain = torch.randn(64, 192).bfloat16(), torch.randn(192).bfloat16()
    outs = []
    for mode in ("fp32_affine", "llama"):
        norm = RMSNormSettings(cast_mode=mode).build(192).bfloat16()
        norm.load_state_dict({"weight": gain})
        outs.append(norm(x))
    assert not torch.equal(*outs)


def test_float32_matches_torch() -> None:
    """Oracle: F.rms_norm and F.layer_norm in float32, within float32 rounding."""
    x = torch.randn(7, 96)
    rms, layer = build(RMSNormSettings, 96), build(LayerNormSettings, 96)
    expected = F.rms_norm(x, (96,), rms.weight, rms.eps)
    torch.testing.assert_close(rms(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(x), F.layer_norm(x, (96,), layer.weight, layer.bias, layer.eps))
