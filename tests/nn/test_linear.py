"""Linear layers by either library."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn import linear
from llmnorm.nn.linear import SMALLEST, Linear, add_product, product

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN multiplies, whatever this processor is."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: request.param)
    return request.param


def far(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 256), (1, 700), (1024,)])
def test_outputs_and_gradients(library: bool, bias: bool, shape: tuple[int, ...]) -> None:
    """Oracle: F.linear in float64; errors are those of float32 sums, in both libraries."""
    torch.manual_seed(0)
    layer = Linear(96, 80, bias=bias)
    x = torch.randn(*shape, 96, requires_grad=True)
    upstream = torch.randn(80, *shape).movedim(0, -1)  # not contiguous
    assert x.numel() * 80 >= SMALLEST
    y = layer(x)
    assert ("_Linear" in type(y.grad_fn).__name__) == library
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y, leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.linear(*wide)
    assert far(y, expected) < 1e-6
    wide_grads = torch.autograd.grad(expected, wide, upstream.double())
    for one, other in zip(grads, wide_grads, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        assert far(one, other) < 1e-6


@needs_onednn
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_inputs_get_no_gradient(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    """Oracle: the products made, counted: one forward, one backward."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    layer, x = Linear(128, 128), torch.randn(200, 128, requires_grad=frozen != "x")
    layer.weight.requires_grad_(frozen != "weight")
    made = []
    real = linear.onednn_product
    monkeypatch.setattr(linear, "onednn_product", lambda *a: made.append(a[0].shape) or real(*a))
    layer(x).sum().backward()
    assert len(made) == 2
    assert (x.grad is None, layer.weight.grad is None) == (frozen == "x", frozen == "weight")


def test_everything_else_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: F.linear, bit for bit: small products, other dtypes, autocast, no such processor."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "onednn_product", None)
    layer = Linear(128, 128)
    small = torch.randn(SMALLEST // 128**2 - 1, 128)
    assert torch.equal(layer(small), nn.Linear.forward(layer, small))
    large = torch.randn(200, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(large).dtype == torch.bfloat16
    assert Linear(128, 128, dtype=torch.float64)(large.double()).dtype == torch.float64
    assert product(large.bfloat16(), large.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    assert torch.equal(layer(large), nn.Linear.forward(layer, large))


def test_products_of_any_strides(library: bool) -> None:
    """Oracle: float64; a and b transposed or not, and added to what is there."""
    torch.manual_seed(0)
    for a in (torch.randn(150, 130), torch.randn(130, 150).t()):
        for b in (torch.randn(140, 130), torch.randn(130, 140).t()):
            expected = a.double() @ b.double().t()
            assert far(product(a, b), expected) < 1e-6
            total = torch.ones(150, 140)
            assert add_product(total, a, b) is total
            assert far(total, expected + 1) < 1e-6
            wide = torch.ones(150, 140)
            add_product(wide, a.bfloat16(), b.bfloat16())
            assert far(wide, expected + 1) < 1e-2
