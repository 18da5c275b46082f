"""Linear layers at inference: joined, laid out, and who shares whose memory."""

from typing import Any, get_args

import pytest
import torch
from torch import nn

from llmnorm.machine.processor import Processor
from llmnorm.nn import projections
from llmnorm.nn.linear import Linear
from llmnorm.nn.mlp import GELU, SwiGLU
from llmnorm.nn.norms.rms import RMSNorm
from llmnorm.nn.projections import (
    InFirst,
    Layout,
    Product,
    for_inference,
    layout_for,
)

needs_packing = pytest.mark.skipif(
    not projections.has_packing(), reason="this torch has no oneDNN operator to pack weights"
)
LAYOUTS = [
    pytest.param(layout, marks=needs_packing if layout == "packed" else ())
    for layout in get_args(Layout)
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_joined_layers_give_what_each_gives(layout: Layout, bias: bool) -> None:
    """Oracle: the module with its own layers, in float32."""
    torch.manual_seed(0)
    module = SwiGLU(24, 40, bias=bias)
    twin = for_inference(module, layout)
    assert isinstance(twin.gate_proj, Product) and twin.gate_proj.sizes == [40, 40]
    for shape in [(1, 1), (1, 3), (7, 3)]:
        x = torch.randn(*shape, 24)
        torch.testing.assert_close(twin(x), module(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_bias_of_one_layer_is_its_own() -> None:
    """Oracle: the two layers, of which one has a bias."""
    torch.manual_seed(0)
    first, second, x = Linear(6, 3, bias=False), Linear(6, 2), torch.randn(4, 6)
    both = torch.cat([first(x), second(x)], -1)
    torch.testing.assert_close(Product([first, second], "transposed")(x), both)


def test_joining_adds_no_memory_and_changes_no_number() -> None:
    """Oracle: storages and the state dict before; a later change in place shows in the copy."""
    module = SwiGLU(16, 32, bias=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin: Any = for_inference(module, "plain")
    again: Any = for_inference(module, "plain")
    weight, other = (some.gate_proj.weight for some in (twin, again))
    storages = {t.untyped_storage().data_ptr() for t in (weight, other)}
    storages |= {p.untyped_storage().data_ptr() for p in (module.gate_proj.weight, weight)}
    assert len(storages) == 1 and weight.untyped_storage().nbytes() == weight.nbytes
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.is_contiguous(), name
    assert list(module.state_dict()) == list(before)
    assert all(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        module.up_proj.weight.fill_(3.0)
    assert (other[32:] == 3).all()


def test_what_is_no_linear_layer_of_ours_stays() -> None:
    """Oracle: by hand: a subclass (as adapters and four bits have them), a hook, another module."""

    class Other(Linear):
        pass

    module = SwiGLU(8, 8, bias=False)
    module.up_proj = Other(8, 8, bias=False)
    module.down_proj.register_forward_hook(lambda *_: None)
    twin: Any = for_inference(
        nn.Sequential(module, RMSNorm(8, eps=1e-6), GELU(8, 8, bias=False)), "plain"
    )
    assert isinstance(twin[0].gate_proj, Product) and type(twin[0].up_proj) is Other
    assert type(twin[0].down_proj) is Linear and type(twin[1]) is RMSNorm
    assert isinstance(twin[2].up_proj, Product)
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(twin[0](x), module(x))


def test_a_layer_that_is_part_of_a_product_is_not_called_alone() -> None:
    """Oracle: the message."""
    with pytest.raises(AssertionError, match="together with the first"):
        InFirst()(torch.zeros(1))


def test_the_rule_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: device, dtype, an unknown processor, a missing operator, and one that is
    known."""
    weight, threads = torch.zeros(2, 2), torch.get_num_threads()
    assert layout_for(weight.to("meta")) == ("plain", "weights stay as they are (float32 on meta)")
    assert layout_for(weight.double())[1] == "weights stay as they are (float64 on cpu)"
    monkeypatch.setattr(projections, "processor", lambda: Processor("", 0, "none"))
    expected = "weights stay as they are (not measured on an unknown processor family 0, none)"
    assert layout_for(weight) == ("plain", expected)
    intel = Processor("Intel", 6, "AVX512")
    amd = Processor("AMD", 25, "AVX2")
    monkeypatch.setattr(projections, "has_packing", lambda: False)
    try:
        for threads_, words in ((1, "1 thread"), (2, "2 threads")):
            torch.set_num_threads(threads_)
            monkeypatch.setattr(projections, "processor", lambda: intel)
            says = f"a transposed copy of the weights (Intel family 6, AVX512, {words})"
            assert layout_for(weight) == ("transposed", says)
            monkeypatch.setattr(projections, "processor", lambda: amd)
            assert (
                layout_for(weight)[0] == "plain" and "no oneDNN operator" in layout_for(weight)[1]
            )
        monkeypatch.setattr(projections, "has_packing", lambda: True)
        says = "a packed copy of the weights (AMD family 25, AVX2, 2 threads)"
        assert layout_for(weight) == ("packed", says)
    finally:
        torch.set_num_threads(threads)


@needs_packing
def test_packing_refuses_what_onednn_cannot_pack() -> None:
    """Oracle: the message."""
    with pytest.raises(ValueError, match="float64"):
        Product([Linear(4, 4).double()], "packed")
