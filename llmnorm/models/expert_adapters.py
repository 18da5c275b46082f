"""Adapters of stacks of experts: `adapter.parameters`, which is PEFT's `target_parameters`.

Of a stack W (experts, out, in), or (experts, in, out) where its module says `is_transposed`, every
expert e has an adapter:

    W_e x becomes (W_e + s B_e A_e) x
    A (experts * rank, in)     A_e is the rows e rank to (e + 1) rank
    B (out, rank * experts)    B_e is every column whose number modulo `experts` is e

PEFT puts a layer around the module that holds a stack, and one more around that for every further
stack of the module. So the names of an injected model tell which layer is the inner one, and not
which stack it is for. Of a module with two stacks the first has the inner layer:

    ...experts.base_layer.lora_A.default.weight        A of experts.gate_up_proj
    ...experts.lora_A.default.weight                   A of experts.down_proj
    ...experts.base_layer.base_layer.gate_up_proj      the frozen stack

What would surprise:
- The forward pass of these layers is not PEFT's, but has its numbers by its operation. PEFT
  registers a parametrization with every pass, and so computes W + s B A twice: once for torch to
  look at its shape.
- W + s B A has the dtype of W, so beside a base in bfloat16 the sum is rounded, as in plain PEFT.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.nn.experts import stack_names
from llmnorm.nn.precision import wide_dtype
from llmnorm.part import InputError, nearest


class Stack(NamedTuple):
    """A stack that gets an adapter.

    Attributes:
        name: in the model without an adapter.
        layer: the name of the layer around it in an injected model.
        turned: whether it is (experts, in, out).
    """

    name: str
    layer: str
    turned: bool


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of a model by parameter name, in the model's order."""
    return {
        f"{name}.{last}".removeprefix("."): module.get_parameter(last)
        for name, module in model.named_modules()
        for last in stack_names(module)
    }


def target_stacks(model: nn.Module, asked: Sequence[str] | None) -> list[Stack]:
    """The stacks that `adapter.parameters` asks for, in the model's order.

    Args:
        model: without an adapter.
        asked: names of stacks, or how they end: `gate_up_proj`, `experts.down_proj`. None: none.

    Raises:
        InputError: a name is that of no stack of the model.
    """
    if asked is None:
        return []
    stacks, kind = [*expert_stacks(model)], type(model).__name__
    if not stacks:
        raise InputError(f"adapter.parameters: {kind} has no stacks of experts; leave it out")
    found: set[str] = set()
    for target in asked:
        own = {name for name in stacks if f".{name}".endswith(f".{target}")}
        if not own:
            parts = [name.split(".") for name in stacks]
            known = dict.fromkeys(".".join(part[-n:]) for n in (1, 2) for part in parts)
            raise InputError(
                f"adapter.parameters: '{target}' is no stack of experts of {kind}; "
                f"{nearest(target, [*known])}"
            )
        found |= own
    of_module: dict[str, list[str]] = {}
    for name in stacks:
        if name in found:
            of_module.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        Stack(
            name,
            module + ".base_layer" * (len(names) - 1 - number),
            bool(getattr(model.get_submodule(module), "is_transposed", False)),
        )
        for module, names in of_module.items()
        for number, name in enumerate(names)
    ]


def written_stacks(model: nn.Module, stacks: Sequence[Stack]) -> list[str]:
    """PEFT's `target_parameters` for these stacks: last names where they name nothing else.

    Args:
        model: without an adapter.
    """
    names = {stack.name for stack in stacks}
    last = {name.rpartition(".")[2] for name in names}
    alike = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in last}
    return sorted(last if alike == names else names)


def stack_layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has put around stacks."""
    return [m for m in model.modules() if hasattr(m, "parameter_name") and hasattr(m, "lora_A")]


def give_forward(model: nn.Module) -> None:
    """Give the layers that PEFT has put around stacks the forward pass of this file, in place."""
    for layer in stack_layers(model):
        layer.forward = MethodType(_forward, layer)


def _forward(self: Any, *args: Any, **given: Any) -> Any:
    """The pass of the module below, which finds W + s B A where it looks for W.

    An attribute of an object comes before its parameters, so the parameter stays where it is.
    """
    module, name, weight = self.get_base_layer(), self.parameter_name, self.get_param()
    left, right, scale = self.get_delta_factors("default")
    with torch.autocast(weight.device.type, enabled=False):  # it keeps the dtype of W
        total = torch.baddbmm(weight, left, right, alpha=scale)
    vars(module)[name] = total
    try:
        return self.base_layer(*args, **given)
    finally:
        del vars(module)[name]


def merged_stack(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, turned: bool) -> Tensor:
    """The stack of a plain model that computes the same; in float32 or float64.

    Args:
        weight: (experts, out, in), or turned (experts, in, out), and so is what is returned.
        a: (experts * rank, in).
        b: (out, rank * experts).
    """
    experts = weight.shape[0]
    each_a = a.view(experts, -1, a.shape[1])
    each_b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    delta = (each_b @ each_a) * scale
    return weight.to(wide_dtype(weight.dtype)) + (delta.mT if turned else delta)
