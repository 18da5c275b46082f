"""Layers in NF4: bitsandbytes' bits, the product of the rounded weight, what is kept in memory."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmnorm.config.adapter import ALL_LINEAR
from llmnorm.models import nf4
from llmnorm.models.adapters import inject, set_first_values, target_modules
from llmnorm.models.building import empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.flops import flops_per_token
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.models.nf4 import NF4Linear, rounded, to_four_bits
from llmnorm.nn.linear import Linear
from llmnorm.part import InputError
from tests.models.adapter_kinds import ADAPTERS
from tests.running import CHILDREN, PATIENCE

# Found, not imported: how it is imported is tested here.
pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quant")
# The paper's appendix E, to 6 digits.
CODE = [-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0]
CODE += [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722956, 1]
SHAPES = [(6, 128), (100, 80), (10, 172), (5, 7), (1, 1)]


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Rows whose sizes differ by a factor of 30."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return draws * torch.linspace(0.01, 0.3, shape[0])[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_is_the_nearest_of_its_block(shape: tuple[int, int]) -> None:
    """Oracle: the paper's code and equations in float64, block by block; no nearer one."""
    weight = weights(*shape)
    stored = to_four_bits(weight)
    code = torch.tensor(CODE, dtype=torch.float64)
    high, low = stored.numbers.view(-1) >> 4, stored.numbers.view(-1) & 15
    q = torch.stack([high, low], 1).view(-1, 64)
    a = stored.map.double()[stored.scales.long()]
    a = a * stored.largest.double().repeat_interleave(256)[: len(a)] + stored.mean.double()
    expected = (code[q.long()] * a[:, None]).view(-1)[: weight.numel()].view(shape)
    torch.testing.assert_close(rounded(weight).double(), expected, rtol=0, atol=2e-6)
    blocks = nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64).double()
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - code).abs()
    chosen = nearest.gather(-1, q.long()[..., None]).squeeze(-1)
    assert (chosen - nearest.amin(-1)).max() < 1e-6  # a tie aside
    assert ((a - largest.squeeze(1)).abs() / largest.max()).max() < 0.02  # 8 bits


def test_the_bits_are_those_of_bitsandbytes() -> None:
    """Oracle: bitsandbytes' own double quantisation, where rows are multiples of 64."""
    weight, library = weights(6, 128), nf4.bitsandbytes()
    numbers, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = to_four_bits(weight)
    assert stored.numbers.equal(numbers) and stored.scales.equal(state.absmax)
    torch.testing.assert_close(rounded(weight), library.dequantize_4bit(numbers, state))


def test_bits_do_not_depend_on_threads() -> None:
    """Oracle: the bits of one thread; 40,000 scales, whose float32 mean is another with four."""
    weight = torch.randn(1600, 1600, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(to_four_bits(weight))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def layer(inputs: int, outputs: int, bias: bool = True) -> tuple[NF4Linear, nn.Linear]:
    """A layer in NF4, and a plain one with the rounded weight."""
    plain = Linear(inputs, outputs, bias=bias).requires_grad_(False)
    plain.weight.copy_(weights(outputs, inputs))
    with torch.device("meta"):
        empty = Linear(inputs, outputs, bias=bias).requires_grad_(False)
    quantized = NF4Linear(empty).to_empty(device="cpu")
    quantized.set_weight(plain.weight)
    if bias:
        quantized.bias.copy_(plain.bias)
    plain.weight.copy_(rounded(plain.weight))
    return quantized, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_rounded_weight(bias: bool, dtype: torch.dtype) -> None:
    """Oracle: our plain layer with the rounded weight, to the bit, in bf16 under autocast."""
    found = []
    for module in layer(80, 100, bias):
        x = weights(12, 80, seed=1).view(3, 4, 80).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            y = module(x)
        y.backward(weights(12, 100, seed=2).view(3, 4, 100).to(dtype))
        assert x.grad is not None and x.grad.any() and y.dtype == dtype
        found.append((y, x.grad, module.weight))
    assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))


def test_a_transposed_layer_computes_what_it_is_there_for() -> None:
    """Oracle: GPT-2's own layer with the rounded weight; its rows are blocks as transformers has
    them, which are columns of the layer's weight."""
    plain = Conv1D(100, 80).requires_grad_(False)
    plain.weight.copy_(weights(80, 100))
    plain.bias.copy_(weights(1, 100).squeeze(0))
    with torch.device("meta"):
        quantized = NF4Linear(Conv1D(100, 80).requires_grad_(False)).to_empty(device="cpu")
    nf4.fill({"it": quantized}, lambda into: into["it.weight"].copy_(plain.weight))
    quantized.bias.copy_(plain.bias)
    assert quantized.shape == (100, 80)
    plain.weight.copy_(rounded(plain.weight.T).T)
    assert quantized.weight.equal(plain.weight)
    assert rounded(weights(80, 100), turned=True).equal(plain.weight)
    x = weights(12, 80, seed=1)
    torch.testing.assert_close(quantized(x), plain(x), rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_the_four_bits_alone() -> None:
    """Oracle: the bytes of what autograd saves, beside those of the weight in bf16."""
    quantized, _ = layer(128, 256, bias=False)
    kept: list[Tensor] = []
    x = torch.zeros(2, 128, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantized(x)
    numbers = 128 * 256
    assert sum(t.nbytes for t in kept) == numbers // 2 + numbers // 64 + 4 * (2 + 1 + 256)
    assert all(tensor.dtype != torch.bfloat16 for tensor in kept)


def test_a_compiled_layer_computes_the_same() -> None:
    """Oracle: the layer as it is; the compiler must follow it without a break."""
    quantized, _ = layer(64, 32)
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    found = []
    for module in (quantized, compiled):
        x = weights(5, 64).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


# In a model


def config(**keys: Any) -> LlmNormConfig:
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return LlmNormConfig(**(sizes | heads | keys))


def quantized(kind: str, settings: LlmNormConfig, dtype: torch.dtype) -> LlmNormForCausalLM:
    """A model on the meta device as a run with an adapter has it before it is laid out."""
    model = empty_model(settings, device="meta")
    names = target_modules(model, ALL_LINEAR)
    inject(model, ADAPTERS[kind])
    freeze(model, norms=False, new_head=False)
    nf4.quantize(model, names)
    if dtype == torch.bfloat16:
        narrow(model)
    return model


def held(model: nn.Module) -> list[Tensor]:
    inside = [tensor for layer in nf4.layers(model).values() for tensor in layer.four_bits]
    return [*model.parameters(), *inside]


@pytest.fixture
def _peft() -> Iterator[None]:
    pytest.importorskip("peft", reason="needs the extra finetune")
    yield


@pytest.mark.usefixtures("_peft")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_all_linear_layers_of_the_blocks_are_stored_so(kind: str) -> None:
    """Oracle: the names of 7 layers a block; a hand count of the operations of frozen weights."""
    model = quantized(kind, config(), torch.float32)
    names = {name.replace(".base_layer", "") for name in nf4.layers(model)}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert names == {f"model.layers.{n}.{name}" for n in (0, 1) for name in attention + mlp}
    plain = empty_model(config(), device="meta")
    inject(plain, ADAPTERS[kind])
    freeze(plain, norms=False, new_head=False)
    assert flops_per_token(model, 16) == flops_per_token(plain, 16)
    assert not any(".base_layer.weight" in name for name, _ in model.named_parameters())
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.usefixtures("_peft")
def test_the_magnitudes_of_dora_are_those_of_the_rounded_weight() -> None:
    """Oracle: float64 norms of the rows of the weight that the layer reads."""
    model = quantized("dora", config(), torch.float32).to_empty(device="cpu")
    nf4.fill(
        dict(model.named_modules()),
        lambda into: [t.copy_(weights(*t.shape)) for t in into.values()],
    )
    set_first_values(dict(model.named_modules()), seed=1)
    target = model.model.layers[1].mlp.down_proj
    expected = rounded(weights(24, 40)).double().norm(dim=1)
    found = target.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_peft")
def test_an_8b_takes_two_fifths_of_its_bytes() -> None:
    """Oracle: a count by hand of Qwen3-8B's shape, blocks in 4.127 bits and the rest in bf16."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288}
    mixer = {"name": "softmax", "qk_norm": True}
    shape = config(**heads, **sizes, num_hidden_layers=36, mixer=mixer)
    model = quantized("lora", shape, torch.bfloat16)
    block = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12_288
    outside = 2 * 151_936 * 4096
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(t.nbytes for t in held(model)) - sum(p.nbytes for p in trained)
    expected = 36 * block * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * outside
    assert total == pytest.approx(expected, rel=1e-3)
    whole = 2 * (36 * block + outside)
    # Weights, and of what is trained values, gradients and two moments in float32.
    assert total + 16 * sum(p.numel() for p in trained) < 0.4 * whole


# The package


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the line that installs it."""
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed; run: .*quant"):
        rounded(torch.ones(2, 2))


def fetches(directory: Path) -> None:
    """Import it where the package `kernels` is; the child fails if that is used, or if it talks."""
    (directory / "kernels.py").write_text(f"open({str(directory / 'used')!r}, 'w')\n")
    sys.path.insert(0, str(directory))
    sys.stderr = open(directory / "said", "w")  # noqa: SIM115 (until the child ends)
    assert "bitsandbytes" not in sys.modules
    nf4.bitsandbytes()
    assert "kernels" not in sys.modules
    sys.stderr.flush()


def test_the_package_fetches_nothing_and_says_nothing(tmp_path: Path) -> None:
    """Oracle: a package `kernels` that leaves a file when it is imported; what was printed."""
    child = CHILDREN.Process(target=fetches, args=(tmp_path,))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert not (tmp_path / "used").exists()
    assert (tmp_path / "said").read_text() == ""
