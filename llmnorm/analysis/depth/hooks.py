"""Reading and replacing tensors while a model runs.

Shapes: streams (batch, length, hidden).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.part import InputError


class Place(NamedTuple):
    """A tensor of a forward pass, named by where it occurs: a module's input or its output."""

    module: nn.Module
    end: Literal["in", "out"]


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (batch, length, vocabulary) of tokens (batch, length) from position 0 on."""
    return model(input_ids=ids, use_cache=False).logits


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def recorded(places: Iterable[Place], *, graph: bool = False) -> Iterator[Mapping[Place, Tensor]]:
    """Record the tensors at some places during a forward pass inside the `with`.

    Args:
        places: which tensors.
        graph: keep the tensors themselves, for derivatives. Otherwise they are copied, since some
            blocks add to their input in place.

    Yields:
        The tensors by place, filled by the forward pass.
    """
    seen: dict[Place, Tensor] = {}
    wanted: dict[nn.Module, set[str]] = {}
    for module, end in places:
        wanted.setdefault(module, set()).add(end)

    def kept(tensor: Tensor) -> Tensor:
        return tensor if graph else tensor.clone()

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if "in" in wanted[module]:
            seen[Place(module, "in")] = kept(stream_in(args, kwargs))
        if "out" in wanted[module]:
            seen[Place(module, "out")] = kept(first(output))

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in wanted]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def first(output: Any) -> Tensor:
    """A module's output if it is a tensor, else the first of its outputs."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, tensor: Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])


def stream_in(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first floating-point tensor with three axes among a module's arguments.

    Raises:
        InputError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    raise InputError(
        "a block is called without a (batch, length, hidden) tensor; such models are not inspected"
    )
