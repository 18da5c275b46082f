"""Linear layers at inference: those of one input multiplied as one, weights laid out for few rows.

Shapes: x (..., in), weights (out, in), y (..., sum of the layers' out).

`for_inference` copies a model whose parameters stay those of the original. In the copy every Linear
is a `Product`, and the layers that a module names in `same_input` (queries, keys and values; gate
and up) are one product. How a weight is laid out is a committed rule, `CHOICES`, by the processor
and the number of threads:

    plain        as the parameter is, (out, in). Weights of one input are joined once and become
                 views of the joined one, so that no memory is added.
    transposed   a copy (in, out), which MKL multiplies faster by 4 rows and more.
    packed       a copy in oneDNN's own layout for few rows; one result for any number of rows.

A copy takes the weights' bytes once more (27M in float32: 104 MiB).

What would surprise: a copied layout does not follow later changes of the parameters. Make the copy
again after training.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.machine.processor import Processor, processor
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.linear import Linear

Layout = Literal["plain", "transposed", "packed"]
ROWS = 8  # what oneDNN is told to pack for; 64 was as fast, 1 as slow as no packing


class Choice(NamedTuple):
    """How float32 weights are laid out for decoding on one kind of processor.

    Attributes:
        layouts: with one thread, and with more.
        figures: milliseconds of all products of a 26M model by rows, torch's F.linear -> this.
        machine: where that was measured.
        date: when, as YYYY-MM-DD.
    """

    layouts: tuple[Layout, Layout]
    figures: str
    machine: str
    date: str


CHOICES: dict[Processor, Choice] = {
    Processor("Intel", 6, "AVX512"): Choice(
        layouts=("transposed", "transposed"),
        figures="one thread, plain, transposed, packed: 1 row 8.2, 7.7, 9.1; 2 rows 8.7, 9.2, 9.4; "
        "4 rows 14.7, 10.7, 10.8; 8 rows 19.1, 14.8, 12.4; 16 rows 18.5, 16.3, 14.9; 40 rows 27.2, "
        "20.8, 23.5; two threads, whole steps of 1 and of 5 tokens, 27M: 1 row 4.0, 4.2, 4.1 and "
        "9.8, 9.3, 10.0; 4 rows 7.1, 6.8, 9.3 and 15.9, 13.5, 14.9; 8 rows 9.6, 11.2, 10.9 and "
        "20.6, 18.1, 19.1; 16 rows 15.0, 12.9, 13.6 and 28.0, 26.3, 29.5",
        machine="Xeon, family 6 model 207 (Emerald Rapids)",
        date="2026-11-30",
    ),
    Processor("AMD", 25, "AVX2"): Choice(
        layouts=("packed", "packed"),
        figures="F.linear -> packed: 1 row 10.0 -> 9.7, 2 17.8 -> 10.5, 4 21.7 -> 15.5, 8 26.5 -> "
        "17.9, 12 31.5 -> 22.2, 40 47.3 -> 41.8 (one thread); two threads 5 rows 17.6 -> 12.9, 8 "
        "16.3 -> 12.1",
        machine="EPYC with AVX2 alone and 32 MiB of L3, which we take for Zen 3",
        date="2026-11-28",
    ),
}


def layout_for(weight: Tensor) -> tuple[Layout, str]:
    """The layout of a weight like this one with torch's threads, and a clause that says why."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        kind = str(weight.dtype).removeprefix("torch.")
        return "plain", f"weights stay as they are ({kind} on {weight.device.type})"
    found = choice()
    if found is None:
        return "plain", f"weights stay as they are (not measured on {_name(processor())})"
    threads = torch.get_num_threads()
    layout = found.layouts[threads > 1]
    if layout == "packed" and not has_packing():
        return "plain", "weights stay as they are (this torch has no oneDNN operator to pack them)"
    on = f"{_name(processor())}, {threads} thread{'s' if threads > 1 else ''}"
    return layout, f"a {layout} copy of the weights ({on})"


def choice() -> Choice | None:
    """The entry of this processor, if it has one."""
    return CHOICES.get(processor())


@cache
def has_packing() -> bool:
    """Whether this torch has oneDNN's operators, which are none of its public ones."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def _name(found: Processor) -> str:
    return f"{found.vendor or 'an unknown processor'} family {found.family}, {found.instructions}"


def outputs(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """What each of the layers gives for x (..., in), which are those of a `same_input`."""
    together = joined(x, *linears)
    if together is None:
        return [linear(x) for linear in linears]
    first = linears[0]
    assert isinstance(first, Product)
    return together.split(first.sizes, -1)


def joined(x: Tensor, *linears: nn.Module) -> Tensor | None:
    """The same in one tensor (..., sum of out), where they are one product; else None."""
    first = linears[0]
    if isinstance(first, Product) and len(first.sizes) > 1:
        y: Tensor = first(x)
        return y
    return None


class Product(nn.Module):
    """One or several linear layers of one input, as one product; computes no gradients.

    Attributes:
        sizes: outputs of each layer.
        layout: of its weight.
        weight: of all layers; a packed one may be replaced, for a graph that has it as an input.

    Raises:
        ValueError: `packed`, where oneDNN cannot pack.
    """

    weight: Tensor

    def __init__(self, linears: Sequence[Linear], layout: Layout) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.inputs, self.layout = linears[0].in_features, layout
        # No buffer: copies of the module share it, and it is in no state dict.
        parameters = [linear.weight for linear in linears]
        self.weight = _laid_out(parameters, layout)
        biases = [linear.bias for linear in linears]
        bias = [
            torch.zeros_like(w[:, 0]) if b is None else b.data
            for w, b in zip(parameters, biases, strict=True)
        ]
        self.bias = None if all(b is None for b in biases) else torch.cat(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., sum of out)."""
        if x.numel() == self.inputs:
            ones = [1] * (x.ndim - 1)  # numbers, so that a trace has no questions of shapes
            return self._product(x.reshape(1, -1)).view(*ones, -1)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.layout == "packed":
            if torch.jit.is_tracing():
                return _scripted_packed_product()(x, self.weight, self.bias)
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.layout == "plain":
            return F.linear(x, self.weight, self.bias)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.sizes}, {self.layout}"


def _laid_out(weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """The weights of layers of one input as one, in a layout."""
    if layout == "plain":
        return _one_tensor(weights)
    joined = torch.cat([w.data for w in weights])
    if layout == "transposed":
        return joined.t().contiguous()
    if not (has_packing() and joined.dtype in (torch.float32, torch.bfloat16)):
        raise ValueError(f"layout 'packed': oneDNN cannot pack {joined.dtype} here; nearest: plain")
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(joined, ROWS)
    return packed


class InFirst(nn.Module):
    """Stands where a layer was that is part of the product of the first one of its `same_input`."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse to be called: its module has forgotten to ask `outputs`."""
        raise AssertionError("this layer is multiplied together with the first of its same_input")


Model = TypeVar("Model", bound=nn.Module)


def for_inference(model: Model, layout: Layout) -> Model:
    """A copy of `model` for passes without gradients, on the same memory.

    Layers of other classes (in four bits, say), those with hooks, and those in modules of other
    packages (adapters, which read a layer's `weight`) are as they were.
    """
    if layout == "plain":
        for module in model.modules():
            if group := _same_input(module):
                _one_tensor([linear.weight for linear in group])
    # deepcopy takes what it finds here.
    shared: dict[int, object] = {id(b): b for b in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin: Model = copy.deepcopy(model, shared)
    for module in list(twin.modules()):
        if group := _same_input(module):
            product = Product(group, layout)
            for number, name in enumerate(_names(module)):
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, InFirst() if number else product)
        if type(module).__module__.split(".")[0] not in ("llmnorm", "torch"):
            continue
        for name, child in module.named_children():
            if isinstance(child, Linear) and _is_plain(child):
                setattr(module, name, Product([child], layout))
    return twin


def _same_input(module: nn.Module) -> list[Linear]:
    """The layers that a module multiplies one input by, if all are linear layers of ours."""
    layers = [module.get_submodule(name) for name in _names(module)]
    found = [layer for layer in layers if isinstance(layer, Linear) and _is_plain(layer)]
    return found if len(found) == len(layers) else []


def _names(module: nn.Module) -> list[str]:
    """Those of `same_input` that the module has: a gate, say, may be None."""
    names: Sequence[str] = getattr(module, "same_input", ())
    return [name for name in names if getattr(module, name.split(".")[0]) is not None]


def _is_plain(module: object) -> bool:
    """Whether a module is a linear layer of ours and nothing else."""
    if type(module) is LanguageHead:
        return module.new_rows is None and not _has_hooks(module)
    return type(module) is Linear and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _one_tensor(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out, in) below each other in one tensor, of which they are views from then on."""
    first = weights[0].data
    if len(weights) == 1:
        return first
    end, together = first.data_ptr(), first.is_contiguous()
    for weight in weights:
        together = together and weight.data_ptr() == end and weight.is_contiguous()
        end += weight.nbytes
    rows = [len(weight) for weight in weights]
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if together and room >= sum(rows) * first.shape[1]:  # they are already
        return first.as_strided((sum(rows), first.shape[1]), first.stride())
    one = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, one.split(rows), strict=True):
        weight.data = part
    return one


class _Scripted:
    """The packed product as a script, made by the first trace: a trace cannot take its list."""

    made: ClassVar[torch.jit.ScriptFunction | None] = None


def _scripted_packed_product() -> torch.jit.ScriptFunction:
    if _Scripted.made is None:
        _Scripted.made = torch.jit.CompilationUnit(
            """
def packed(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    none: List[Optional[Union[int, float, complex]]] = []
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", none, "")
"""
        ).packed
    return _Scripted.made
