"""Linear layers by either library, and which of them is chosen on which processor."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.machine.processor import Processor, allowed, onednn_limit, processor
from llmnorm.nn import linear
from llmnorm.nn.linear import (
    CHOICES,
    NO_LIMIT,
    SMALLEST,
    Choice,
    Linear,
    add_weight_gradient,
    fills_memory,
    onednn_product,
    product,
    sum_of_weight_gradients,
    weight_gradient,
)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def choose(
    monkeypatch: pytest.MonkeyPatch,
    outputs: bool = True,
    input_gradients: bool = True,
    weight_gradients: bool = True,
    largest: int = NO_LIMIT,
) -> None:
    """Give this processor such an entry, whatever it is."""
    entry = Choice(outputs, input_gradients, weight_gradients, largest, "", "", "")
    monkeypatch.setattr(linear, "choice", lambda: entry)


# By name: an entry's outputs, input gradients, weight gradients; None where there is no entry.
ENTRIES = {
    "torch": None,
    "oneDNN": (True, True, False),
    "oneDNN with copies": (True, True, True),
    "oneDNN for outputs": (True, False, False),
}


@pytest.fixture(params=ENTRIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN computes outputs, whatever this processor is."""
    entry = ENTRIES[request.param]
    if entry is None:
        monkeypatch.setattr(linear, "choice", lambda: None)
        return False
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    choose(monkeypatch, *entry)
    return True


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
    choose(monkeypatch)
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
    choose(monkeypatch)
    monkeypatch.setattr(linear, "onednn_product", None)
    layer = Linear(128, 128)
    small = torch.randn(SMALLEST // 128**2 - 1, 128)
    assert torch.equal(layer(small), nn.Linear.forward(layer, small))
    large = torch.randn(200, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(large).dtype == torch.bfloat16
    assert Linear(128, 128, dtype=torch.float64)(large.double()).dtype == torch.float64
    assert product(large.bfloat16(), large.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "choice", lambda: None)
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


def test_every_entry_says_what_was_measured_where_and_when() -> None:
    """Oracle: the form of the three fields."""
    for entry in CHOICES.values():
        assert " -> " in entry.figures and "family" in entry.machine
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)


def test_a_processor_without_an_entry_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: None, for an Intel, for a newer AMD and where less than AVX2 is allowed."""
    for kind in (
        Processor("Intel", 6, "AVX512"),
        Processor("AMD", 99, "AVX512"),
        Processor("AMD", 25, "none"),
        Processor("", 0, "none"),
    ):
        monkeypatch.setattr(linear, "processor", lambda kind=kind: kind)
        assert linear.choice.__wrapped__() is None


def test_the_layout_and_the_size_choose_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: either library's own result, bit for bit, where the two differ."""
    torch.manual_seed(0)
    a, b = torch.randn(200, 1024), torch.randn(300, 1024)
    by_columns = b.t().contiguous().t()
    choose(monkeypatch, input_gradients=False, largest=200 * 300)
    assert product(a, b).equal(onednn_product(a, b)) and not fills_memory(a, b)
    assert product(a, by_columns).equal(torch.mm(a, by_columns.t())) and fills_memory(a, by_columns)
    longer = torch.cat((a, a[:1]))
    assert product(longer, b).equal(torch.mm(longer, b.t()))
    into = torch.empty(201, 300)
    assert product(longer, b, into).data_ptr() == into.data_ptr()


@pytest.mark.parametrize(
    ("capability", "limit", "expected"),
    [
        ("AVX512", "", "AVX512"),
        ("AVX512", "ALL", "AVX512"),
        ("AVX512", "AVX512_CORE_VNNI", "AVX512"),
        ("AVX512", "AVX2", "AVX2"),
        ("AVX512", "AVX2_VNNI", "AVX2"),
        ("AVX512", "AVX", "none"),
        ("AVX512", "SSE41", "none"),
        ("AVX2", "AVX512_CORE", "AVX2"),
        ("DEFAULT", "AVX2", "none"),
        ("SVE256", "", "none"),
    ],
)
def test_the_narrower_limit_holds(capability: str, limit: str, expected: str) -> None:
    """Oracle: the variables' documented values, ordered by hand."""
    assert allowed(capability, limit) == expected


def test_oneDNNs_limit_is_read_by_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: oneDNN's page: any case, and the old name where the new one is not set."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert onednn_limit() == ""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "avx2")
    assert onednn_limit() == "AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert onednn_limit() == "AVX512_CORE"


CHOICE = (
    "from llmnorm.machine.processor import processor; from llmnorm.nn import linear; "
    "print(processor().instructions, linear.choice() == linear.CHOICES.get(processor()))"
)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "none"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2"),
    ],
)
def test_what_the_environment_allows_is_what_is_there(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """Oracle: the variables' meaning, in a process of its own; a processor may have no AVX2."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", CHOICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = expected if torch.cpu.get_capabilities().get("avx2") else "none"
    assert done.stdout.split() == [here, "True"]


def test_this_processor_is_described() -> None:
    """Oracle: its own line in /proc/cpuinfo."""
    found = processor()
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    for vendor, name in (("AuthenticAMD", "AMD"), ("GenuineIntel", "Intel")):
        if vendor in text:
            assert found.vendor == name and f"cpu family\t: {found.family}\n" in text
