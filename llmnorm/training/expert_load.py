"""The load of a mixture's experts on one micro-batch, for `logging.health_every`.

    expert_load(model, inputs, parallel)     -> {"0": {"expert_load": [0.26, 0.24, ...]}, ...}

An expert's load is its share of what a layer's router has sent out: with k experts a token, k times
as many as there are tokens. All loads of a layer add up to 1; where they are balanced, each is
1 / experts. Layers are the model's blocks, counted from 0. Every process counts the tokens of a
micro-batch of its own, padding left out, and all are added up.

What would surprise: what is counted is the choice that a layer's experts are called with, not the
largest router logits, so it is right too where a class corrects its choice by a bias or by groups.
A layer whose experts are called without the numbers of the chosen ones is left out.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.models.foreign import Foreign
from llmnorm.nn.experts import stacked_modules
from llmnorm.parallel.processes import Parallel


@torch.no_grad()
def expert_load(
    model: Foreign, inputs: Mapping[str, Any], parallel: Parallel
) -> dict[str, dict[str, list[float]]]:
    """The load of every expert of each layer; every process must call it.

    Args:
        model: its mode is restored afterwards.
        inputs: the model's arguments as `as_asked` gives them, on this process's device.
    """
    real = _real_tokens(inputs)
    layers = _layers(model)
    counts = {name: real.new_zeros(int(layer.num_experts) + 1) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(partial(_count, counts[name], real), with_kwargs=True)
        for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with parallel.autocast():
            model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    sizes = [len(found) - 1 for found in counts.values()]
    mine = torch.cat([found[:-1] for found in counts.values()])
    everyone = parallel.reduce(mine).split(sizes)
    return {
        name: {"expert_load": (found / found.sum()).tolist()}
        for name, found in zip(counts, everyone, strict=True)
        if found.any()
    }


def _count(
    counts: Tensor, real: Tensor, _: nn.Module, args: Sequence[Any], given: Mapping[str, Any]
) -> None:
    """Add what a layer's experts are called with: the numbers (tokens, k) of the chosen ones.

    A number behind the last expert stands for none (some classes have experts that do nothing).
    """
    for chosen in (*args, *given.values()):
        if isinstance(chosen, Tensor) and not chosen.is_floating_point() and chosen.ndim == 2:
            each = chosen.clamp(max=len(counts) - 1).long()
            weights = real.unsqueeze(1).expand(each.shape)
            counts.index_add_(0, each.flatten(), weights.flatten())
            return


def _real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """1 for each token that is no padding, else 0, in the rows laid end to end: float32."""
    rows, length = inputs["input_ids"].shape
    columns = torch.arange(length).expand(rows, length)
    real = columns < torch.tensor(inputs["row_tokens"]).unsqueeze(1)
    return real.flatten().float().to(inputs["input_ids"].device)


def _layers(model: Foreign) -> dict[str, Any]:
    """The modules with experts by the number of their block; "3.1" is the second of block 3."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    for module in stacked_modules(model):
        inside = [n for n, unit in enumerate(model.units()) if names[module].startswith(f"{unit}.")]
        block = str(inside[0]) if inside else names[module]
        others = sum(name.split(".")[0] == block for name in found) if inside else 0
        found[f"{block}.{others}" if others else block] = module
    return found
