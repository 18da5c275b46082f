"""Mixtures of experts of transformers' classes: which modules they are, and their precision.

    give_precision(model)     routers compute in float32, stacks of experts in autocast's dtype

A stack is a 3-D parameter (experts, rows, columns) of a module that carries `num_experts`, as many
as the stack's first size. A router makes `num_experts` numbers of each token: a module that carries
`num_experts` with a weight (num_experts, columns), or a linear layer directly inside one.

Routers compute in float32, since a logit's last bits decide which expert a token is sent to (Fedus
et al. 2021, Switch Transformer, arXiv 2101.03961, section 2.4).

What would surprise: torch does not autocast grouped products (`torch.nn.functional.grouped_mm`).
Float32 stacks would multiply in float32 under `precision: bf16`, at a multiple of the time. So the
modules that hold them see their stacks in autocast's dtype, rounded at every use, as autocast does
with the weight of a linear layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.nn.precision import product_dtype, wide_dtype, without_autocast

# Grouped products take rows that begin at multiples of 16 bytes: 8 numbers of 2 bytes.
_ALIGNED = 8


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parameters that are stacks of experts."""
    count = _experts(module)
    if count is None:
        return ()
    own = module.named_parameters(recurse=False)
    return tuple(name for name, p in own if p.ndim == 3 and len(p) == count)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model that is not sharded yet, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        count = _experts(module)
        if count is None or stack_names(module):  # a stack's biases are (experts, columns) too
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and len(weight) == count:
            found[name] = module
            continue
        for child, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.out_features == count:
                found[f"{name}.{child}".lstrip(".")] = layer
    return found


def expert_count(model: nn.Module) -> int | None:
    """How many experts the model's first router chooses from; None where it has no router."""
    for layer in routers(model).values():
        for weight in layer.parameters(recurse=False):
            return len(weight)
    return None


def stacked_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with stacks of a model that `give_precision` was called with, in its order."""
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), _Narrowed)]


def can_be_narrow(stack: Tensor) -> bool:
    """Whether grouped products take a stack (experts, rows, columns) of a dtype of 2 bytes.

    Rows that do not begin at multiples of 16 bytes are refused by torch's kernels. Such a stack
    stays in float32.
    """
    return all(size % _ALIGNED == 0 for size in stack.shape[1:])


def give_precision(model: nn.Module) -> None:
    """Let routers compute in float32, and stacks be multiplied in autocast's dtype.

    Without autocast nothing changes.

    Args:
        model: not sharded yet, so that sizes are whole; on any device.
    """
    for router in routers(model).values():
        router.forward = _Wide(router.forward)  # type: ignore[method-assign]
    for module in model.modules():
        if names := stack_names(module):
            module.forward = _Narrowed(module, names)  # type: ignore[assignment]


class _Wide:
    """The forward pass of a router, in float32 whatever autocast says."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **given: Any) -> Any:
        device = next(v.device.type for v in (*args, *given.values()) if isinstance(v, Tensor))
        with without_autocast(device):
            return self._forward(*map(_widened, args), **{n: _widened(v) for n, v in given.items()})


class _Narrowed:
    """The forward pass of a module with stacks, which sees them in autocast's dtype.

    It runs on a copy of the module whose attributes are the rounded stacks. The module itself stays
    as it is, so that nothing is lost where a pass ends with an error or is run again.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        # Of the class as it is now: PEFT replaces it by one that adds an adapter to an attribute.
        self._module, self._kind, self._names = module, type(module), names

    def __call__(self, *args: Any, **given: Any) -> Any:
        stacks: dict[str, Tensor] = {}
        for name in self._names:
            stack: Tensor = getattr(self._module, name)
            dtype = product_dtype(stack)
            if stack.dtype == torch.float32 != dtype and can_be_narrow(stack):
                stacks[name] = stack.to(dtype)
        if not stacks:
            return self._kind.forward(self._module, *args, **given)
        copy = object.__new__(self._kind)
        copy.__dict__ = self._module.__dict__ | stacks
        return self._kind.forward(copy, *args, **given)


def _experts(module: nn.Module) -> int | None:
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) and count > 1 else None


def _widened(value: Any) -> Any:
    """A floating-point tensor in float32, or float64 if it is that; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(wide_dtype(value.dtype))
    return value
