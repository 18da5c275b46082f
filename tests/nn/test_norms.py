"""Every norm of the registry: definition, gradients, precision, bf16, autocast, causality."""

import copy
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmnorm.nn.norms.depth_scaling import scale_by_depth
from llmnorm.nn.norms.settings import (
    CRMSNormSettings,
    DyTSettings,
    IdentitySettings,
    LayerNormSettings,
    Norm,
    PowerNormSettings,
    RMSNormSettings,
    UnifiedNormSettings,
)
from llmnorm.part import Settings

PARTS = get_args(get_args(Norm)[0])
RUNNING = (PowerNormSettings, UnifiedNormSettings)
# The others' gradients are their outputs'.
TOKENWISE = [*(part() for part in PARTS if part not in RUNNING), RMSNormSettings(bias=True)]
NAMES = [f"{s.name}{'-bias' if s == RMSNormSettings(bias=True) else ''}" for s in TOKENWISE]
each_tokenwise = pytest.mark.parametrize("settings", TOKENWISE, ids=NAMES)


def build(settings: Any, width: int, layer: int | None = None) -> nn.Module:
    """The norm with random gains and offsets, scaled for a layer if one is given."""
    norm: nn.Module = settings.build(width)
    generator = torch.Generator().manual_seed(width)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return norm if layer is None else scale_by_depth(norm, layer)


def plain(settings: Any, norm: nn.Module, x: Tensor) -> Tensor:
    """The definition in evaluation, written out."""
    p: Any = norm
    offset = getattr(p, "bias", None)
    offset = 0.0 if offset is None else offset
    match settings:
        case RMSNormSettings():
            y = p.weight * x / (x.square().mean(-1, keepdim=True) + p.eps).sqrt() + offset
        case LayerNormSettings():
            centred = x - x.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            y = p.weight * centred / (variance + p.eps).sqrt() + offset
        case CRMSNormSettings():
            whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
            y = (whole / (whole.square().mean(-1, keepdim=True) + p.eps).sqrt())[..., :-1]
        case DyTSettings():
            y = p.weight * torch.tanh(p.alpha * x) + offset
        case IdentitySettings():
            y = x
        case PowerNormSettings():
            r = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = p.weight * x * r / (p.running_square + p.eps).sqrt() + offset
        case UnifiedNormSettings():
            y = p.weight * x / (p.running_square + p.eps).sqrt() + offset
        case _:
            raise AssertionError(f"{settings} has no definition here")
    return y


@each_tokenwise
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(1, 33),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    layer=st.sampled_from([None, 0, 2]),
)
def test_output_and_gradients_are_the_definitions(
    settings: Any, shape: list[int], width: int, scale: float, layer: int | None
) -> None:
    """Oracle: autograd through the definition over the root of the layer, in float64."""
    torch.manual_seed(width)
    norm = build(settings, width, layer).double()
    x = (torch.randn(*shape, width, dtype=torch.float64) * scale).requires_grad_()
    upstream = torch.randn_like(x)
    inputs = (x, *norm.parameters())
    got = norm(x)
    expected = plain(settings, norm, x) / (1 if layer is None else (layer + 1) ** 0.5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * max(1.0, 1 / scale))


@each_tokenwise
def test_gradcheck(settings: Any) -> None:
    """Oracle: finite differences; inputs of non-contiguous layout and frozen gains included."""
    norm = build(settings, 7, layer=3).double()
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


@pytest.mark.parametrize("settings", [RMSNormSettings(), LayerNormSettings()], ids=["rms", "layer"])
def test_long_inputs_are_the_definition_too(settings: Any) -> None:
    """Oracle: autograd through the definition, over rows enough for several pieces."""
    torch.manual_seed(0)
    norm = build(settings, 1030).double()
    x = torch.randn(3, 400, 1030, dtype=torch.float64, requires_grad=True)
    upstream, inputs = torch.randn_like(x), (x, *norm.parameters())
    expected = torch.autograd.grad(plain(settings, norm, x), inputs, upstream)
    for one, other in zip(torch.autograd.grad(norm(x), inputs, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
VARIANTS = [
    *(part() for part in PARTS),
    RMSNormSettings(bias=True),
    RMSNormSettings(cast_mode="llama"),
    LayerNormSettings(bias=False),
    DyTSettings(bias=False),
    PowerNormSettings(warmup=2),
    UnifiedNormSettings(window=1, filter="official"),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["float32 gain", "cast gain"])
@pytest.mark.parametrize("layer", [None, 2], ids=["", "scaled"])
def test_the_output_has_the_inputs_dtype_and_wide_statistics(
    settings: Any, dtype: torch.dtype, cast: bool, layer: int | None
) -> None:
    """Oracle: the definition in float64 of the same values, which float16 cannot square, rounded to
    the dtype (`llama` twice); gradients have the dtypes of what they belong to."""
    norm = build(settings, 48, layer).eval()
    norm = norm.to(dtype) if cast else norm
    x = torch.randn(5, 48).mul(3).to(dtype).requires_grad_()
    if not isinstance(settings, DyTSettings):
        x.data.mul_(300)  # squares are above float16's largest number
    got = norm(x)
    assert got.dtype == dtype
    expected = plain(settings, copy.deepcopy(norm).double(), x.detach().double())
    expected = expected / (1 if layer is None else (layer + 1) ** 0.5)
    limit = DTYPES[dtype] * (2 if getattr(settings, "cast_mode", "") == "llama" else 1)
    if layer is not None and norm.state_dict():  # some norms scale the gain in its own dtype
        limit += DTYPES[norm.weight.dtype]
    limit *= expected.abs().max()
    assert (got.detach().double() - expected).abs().max() <= limit
    norm.train()(x).sum().backward()
    assert norm(x).dtype == dtype
    assert x.grad is not None and x.grad.dtype == dtype
    for parameter in norm.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        *((part, {"eps": -1e-6}) for part in PARTS if "eps" in part.model_fields),
        (RMSNormSettings, {"bias": True, "cast_mode": "llama"}),
        (RMSNormSettings, {"cast_mode": "gemma"}),
        (DyTSettings, {"alpha": 0.0}),
        (PowerNormSettings, {"groups": 3}),
        (PowerNormSettings, {"forward_decay": 1.0}),
        (PowerNormSettings, {"warmup": -1}),
        (UnifiedNormSettings, {"window": 0}),
        (UnifiedNormSettings, {"momentum": 1.0}),
        (UnifiedNormSettings, {"filter": "both"}),
    ],
)
def test_a_class_refuses_what_its_settings_refuse(
    part: type[Settings], wrong: dict[str, Any]
) -> None:
    """Oracle: the settings, which refuse the same values (or the same width of 16)."""
    keys = part().model_dump(exclude={"name", "allow_leak"})
    build_class: Any = type(part().build(16))  # type: ignore[attr-defined]
    build_class(16, **keys)
    with pytest.raises(ValueError) as refused:
        build_class(16, **(keys | wrong))
    try:
        why: str | None = part(**wrong).refusal(16, causal=False)  # type: ignore[attr-defined]
    except ValidationError as error:
        why = error.errors()[0]["msg"]
    assert why is not None and why.removeprefix("Value error, ") in str(refused.value)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_rounded_once_from_float32_statistics(part: type[Settings], autocast: bool) -> None:
    """Oracle: the definition in float64 of the same bf16 values, rounded to bf16."""
    norm = build(part(), 48).eval()
    x = torch.randn(5, 48).mul(30).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = norm(x)
    assert got.dtype == torch.bfloat16
    expected = plain(part(), copy.deepcopy(norm).double(), x.double())
    assert (got.double() - expected).abs().max() <= expected.abs().max() * 2**-8
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert norm(x.float()).dtype == torch.float32


@pytest.mark.parametrize("part", [p for p in PARTS if p is not IdentitySettings])
def test_bf16_gradients_keep_their_dtypes(part: type[Settings]) -> None:
    """Oracle: float32 gradients of the same values, within bf16's rounding."""
    narrow, wide = build(part(), 48), build(part(), 48)
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    narrow(x).sum().backward()
    wide_x = x.detach().float().requires_grad_()
    wide(wide_x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and wide_x.grad is not None
    torch.testing.assert_close(x.grad.float(), wide_x.grad, rtol=1e-2, atol=1e-2)
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert one.grad is not None and one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_no_output_depends_on_later_tokens_in_training(part: type[Settings]) -> None:
    """Oracle: outputs before a changed token, to the bit; `unified` and a warm-up do leak."""
    leaks = [(part(), part is UnifiedNormSettings)]
    if part is PowerNormSettings:
        leaks.append((PowerNormSettings(warmup=1, allow_leak=True), True))
    for settings, leaky in leaks:
        x = torch.randn(2, 6, 16)
        changed = x.clone()
        changed[:, 4:] *= 3
        outs = [build(settings, 16).train()(tokens) for tokens in (x, changed)]
        assert torch.equal(outs[0][:, :4], outs[1][:, :4]) != leaky
        assert not torch.equal(outs[0][:, 4:], outs[1][:, 4:])


@pytest.mark.parametrize("part", PARTS)
def test_the_scale_of_a_layer_survives_the_meta_device_and_copies(part: type[Settings]) -> None:
    """Oracle: 1/2 of the unscaled output; no buffer and no key of a state dict holds it."""
    with torch.device("meta"):
        norm = scale_by_depth(part().build(16), 3)  # type: ignore[attr-defined]
    norm.to_empty(device="cpu")
    if hasattr(norm, "reset_parameters"):
        norm.reset_parameters()
    plain_norm = part().build(16)  # type: ignore[attr-defined]
    assert norm.state_dict().keys() == plain_norm.state_dict().keys()
    x = torch.randn(3, 16)
    expected = plain_norm.eval()(x) / 2
    for one in (norm, copy.deepcopy(norm)):
        torch.testing.assert_close(one.eval()(x), expected)


def test_a_norm_from_outside_the_package_is_scaled_too() -> None:
    """Oracle: torch's own RMSNorm over the root of the layer; its names stay."""
    norm = scale_by_depth(nn.RMSNorm(16, eps=1e-6), 2)
    x = torch.randn(3, 16)
    for one in (norm, copy.deepcopy(norm)):
        torch.testing.assert_close(one(x), F.rms_norm(x, (16,), None, 1e-6) / 3**0.5)
    assert list(norm.state_dict()) == ["weight"]


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
    rms, layer = build(RMSNormSettings(), 96), build(LayerNormSettings(), 96)
    expected = F.rms_norm(x, (96,), rms.weight, rms.eps)
    torch.testing.assert_close(rms(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(x), F.layer_norm(x, (96,), layer.weight, layer.bias, layer.eps))


@pytest.mark.parametrize("rows", [3, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@each_tokenwise
def test_without_gradients_a_norm_has_the_bits_of_training(
    settings: Any, dtype: torch.dtype, rows: int
) -> None:
    """Oracle: the pass that records gradients; a few rows, and more than a piece of rms_cpu.py."""
    norm = build(settings, 264, layer=2).to(dtype)
    x = torch.randn(rows, 264, generator=torch.Generator().manual_seed(0)).to(dtype)
    trained = norm(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(norm(x), trained)
