"""Linear layers by either library."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn import linear
from llmnorm.nn.linear import (
    SMALLEST,
    Linear,
    add_weight_gradient,
    product,
    sum_of_weight_gradients,
    weight_gradient,
)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(params=["torch", "oneDNN", "oneDNN with copies"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN multiplies, whatever this processor is."""
    chosen = request.param != "torch"
    if chosen and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    copies = request.param == "oneDNN with copies"
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: chosen)
    monkeypatch.setattr(linear, "onednn_copies_are_cheap", lambda: copies)
    return chosen


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
    monkeypatch.setattr(linear, "onednn_copies_are_cheap", lambda: True)
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
    """Oracle: float64; a and b transposed or not."""
    torch.manual_seed(0)
    for a in (torch.randn(150, 130), torch.randn(130, 150).t()):
        for b in (torch.randn(140, 130), torch.randn(130, 140).t()):
            assert far(product(a, b), a.double() @ b.double().t()) < 1e-6


@pytest.mark.parametrize("shape", [(130, 140), (140, 130), (3, 7)])
def test_gradients_of_weights(library: bool, shape: tuple[int, int]) -> None:
    """Oracle: float64; wide and tall, large and small, by themselves and added up."""
    torch.manual_seed(0)
    grad, x = torch.randn(150, shape[0]), torch.randn(150, shape[1])
    expected = grad.double().t() @ x.double()
    once = weight_gradient(grad, x)
    assert once.is_contiguous() and far(once, expected) < 1e-6
    total = sum_of_weight_gradients(torch.empty(shape), torch.float32)
    assert total.shape == shape and not total.any()
    for _ in range(2):
        add_weight_gradient(total, grad, x)
    assert far(total, 2 * expected) < 1e-6
    narrow = sum_of_weight_gradients(torch.empty(shape, dtype=torch.bfloat16), torch.float32)
    add_weight_gradient(narrow, grad.bfloat16(), x.bfloat16())
    assert narrow.dtype == torch.float32 and far(narrow, expected) < 1e-2


def test_a_compiler_meets_no_break() -> None:
    """Oracle: `fullgraph`, which refuses one, where the rule asks what the processor is."""
    layer, x = Linear(96, 80), torch.randn(512, 96)
    assert x.numel() * 80 >= SMALLEST
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
