"""Linear layers that are frozen and stored in NF4: 4.13 bits a number.

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3. Of a weight W, taken row by row:

    W = code[q] a       q 4 bits a number; a the largest magnitude of 64 numbers
    a = map[p] b + c    p 8 bits (double quantisation); b the largest |a - c| of 256 a; c their mean

bitsandbytes rounds and reads. Weights stay as they are stored: each product reads W anew, forward
and backward, in the dtype of the product. Only adapters, norms and a new head are trained.

What would surprise:
- W is rounded on the CPU, from float32, whatever the run's device is, and c is summed in float64.
  So a run that goes on, another machine and a merge (exchange/adapted.py) get the same bits.
- bitsandbytes is given W as rows of 64 numbers. On a CPU with AVX-512 it (0.50.2) takes the scale
  of another block where rows are no multiple of 64 long.
- `NF4Linear` is no nn.Linear: what it holds are buffers, which no checkpoint has, and reading its
  `weight` computes it.
- GPT-2's `Conv1D` has (in, out) weights. W is the (out, in) one here too, as transformers stores it
  in NF4; what is read and set as `weight` has the axes of the layer.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from llmnorm.machine.doctor import missing_extra
from llmnorm.nn.linear import output, product
from llmnorm.nn.precision import product_dtype

BLOCK = 64  # numbers that have one scale; bitsandbytes' default and the paper's
SCALES = 256  # scales whose own scale is one number


class FourBits(NamedTuple):
    """A weight as it is stored, by the letters above.

    Attributes:
        numbers: q, two a byte, (32 blocks, 1) uint8; a last block is filled with zeros.
        scales: p (blocks,) uint8.
        largest: b (blocks / 256,) float32.
        mean: c () float32.
        map: (256,) float32, the same for every weight.
    """

    numbers: Tensor
    scales: Tensor
    largest: Tensor
    mean: Tensor
    map: Tensor


def to_four_bits(weight: Tensor) -> FourBits:
    """Round a weight, any shape, to NF4.

    Args:
        weight: float32 on the CPU.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    library = bitsandbytes()
    flat = weight.detach().reshape(-1)
    flat = nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    numbers, of_blocks = library.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    mean = of_blocks.absmax.double().mean().float()
    scales, of_scales = library.quantize_blockwise(of_blocks.absmax - mean, blocksize=SCALES)
    return FourBits(numbers, scales, of_scales.absmax, mean, of_scales.code)


def from_four_bits(four_bits: FourBits, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of a shape that was stored, computed in float32 and rounded to `dtype` once."""
    library = bitsandbytes()
    of_scales = library.QuantState(
        absmax=four_bits.largest, code=four_bits.map, blocksize=SCALES, dtype=torch.float32
    )
    of_blocks = library.QuantState(
        absmax=library.dequantize_blockwise(four_bits.scales, of_scales) + four_bits.mean,
        shape=torch.Size((len(four_bits.scales), BLOCK)),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32,
    )
    flat = library.dequantize_4bit(four_bits.numbers, of_blocks).view(-1)
    return flat[: shape.numel()].view(shape).to(dtype)


def rounded(weight: Tensor, *, turned: bool = False) -> Tensor:
    """The weight (float32, on the CPU) that a run in NF4 computes with, as float32.

    Args:
        turned: the weight is (in, out), and so is what is returned.
    """
    if turned:
        return rounded(weight.T).T
    return from_four_bits(to_four_bits(weight), weight.shape, torch.float32)


class NF4Linear(nn.Module):
    """A frozen linear layer y = W x + bias whose W is stored in NF4.

    Args:
        layer: the layer that it replaces, frozen; on the meta device, or its weight is lost.

    Attributes:
        in_features, out_features: of the layer.
        turned: whether the layer's weight is (in, out).
        bias: the layer's own parameter, or None.
    """

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        self.turned = isinstance(layer, Conv1D)
        rows, columns = layer.weight.shape
        self.out_features, self.in_features = (columns, rows) if self.turned else (rows, columns)
        self.bias = layer.bias
        blocks = -(-layer.weight.numel() // BLOCK)
        empty = FourBits(
            torch.empty(blocks * BLOCK // 2, 1, dtype=torch.uint8),
            torch.empty(blocks, dtype=torch.uint8),
            torch.empty(-(-blocks // SCALES)),
            torch.empty(()),
            torch.empty(256),
        )
        for name, tensor in empty._asdict().items():
            buffer = torch.empty_like(tensor, device=layer.weight.device)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def shape(self) -> torch.Size:
        """Of W: (out, in)."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def four_bits(self) -> FourBits:
        """What is held of W."""
        return FourBits(*(getattr(self, name) for name in FourBits._fields))

    @property
    def weight(self) -> Tensor:
        """The layer's weight in float32, computed at every reading; PEFT's DoRA takes its norms."""
        weight = from_four_bits(self.four_bits, self.shape, torch.float32)
        return weight.T if self.turned else weight

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Round the layer's weight, float32 on the CPU, and hold it.

        Raises:
            InputError: bitsandbytes is not installed.
        """
        stored = to_four_bits(weight.T if self.turned else weight)
        for place, tensor in zip(self.four_bits, stored, strict=True):
            place.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of a projection of x."""
        dtype = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Product.apply(x.to(dtype), bias, self.shape, *self.four_bits)
        return y

    def extra_repr(self) -> str:
        """The sizes, as nn.Linear shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class _Product(torch.autograd.Function):
    """x W^T + bias with W read from what is stored; x alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: torch.Size, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = shape
        return output(x, from_four_bits(FourBits(*stored), shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight = from_four_bits(FourBits(*ctx.saved_tensors), ctx.shape, grad.dtype)
        x_grad = product(grad.reshape(-1, ctx.shape[0]), weight.t())
        rest = (None,) * (2 + len(FourBits._fields))
        return x_grad.view(*grad.shape[:-1], ctx.shape[1]), *rest


def quantize(model: nn.Module, names: Iterable[str]) -> None:
    """Replace frozen linear layers by ones that store their weights in NF4.

    Args:
        model: on the meta device; its adapters are there and its weights frozen already.
        names: of the layers in the model without adapters; of one that has an adapter the layer
            below it is replaced.
    """
    for name in names:
        layer = model.get_submodule(name)
        if hasattr(layer, "base_layer"):
            name = f"{name}.base_layer"
            layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | Conv1D)
        model.set_submodule(name, NF4Linear(layer))


def layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The layers of a model that are stored in NF4, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def fill(
    modules: Mapping[str, nn.Module], read_into: Callable[[Mapping[str, Tensor]], None]
) -> None:
    """Give the layers among `modules` that are stored in NF4 their weights, one at a time.

    Args:
        modules: some of `model.named_modules()`.
        read_into: fills the tensors that it is given, by the names of weights in `modules`.
    """
    for name, module in modules.items():
        if isinstance(module, NF4Linear):
            weight = torch.empty(module.shape[::-1] if module.turned else module.shape)
            read_into({f"{name}.weight": weight})
            module.set_weight(weight)


def bitsandbytes() -> Any:
    """bitsandbytes.functional.

    On some processors bitsandbytes downloads a kernel when it is imported, if the package
    `kernels` is there, and logs a warning otherwise. llmnorm uses no such kernel, and fetches
    nothing that the user has not named.

    Raises:
        InputError: it is not installed.
    """
    loaded = sys.modules.get("bitsandbytes.functional")
    if loaded is not None:
        return loaded
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # so that it cannot be imported
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise missing_extra("bitsandbytes") from None
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    return functional
