"""Which layers of a model `model.quantize: nf4` stores in 4 bits (models/nf4.py).

Of our own classes these are the linear layers of the blocks. Of a class of transformers they are
the linear layers of its blocks that transformers' own `BitsAndBytesConfig` would store so, GPT-2's
transposed ones too, so that an adapter that was trained beside them fits such a base. Left out are
routers, layers whose weight another module has too, and what the class keeps in float32.

Stacks of experts are no linear layers and stay as they are: most of a mixture's numbers.
"""

from collections import Counter
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from llmnorm.config.adapter import ALL_LINEAR
from llmnorm.models.adapters import target_modules
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.expert_adapters import expert_stacks
from llmnorm.models.foreign import unit_names
from llmnorm.models.frozen import kept_wide
from llmnorm.nn.experts import routers


def stored_in_four_bits(model: PreTrainedModel) -> list[str]:
    """The names of the layers that are stored in 4 bits, in the model's order.

    Args:
        model: without an adapter; its parameters may be on the meta device.
    """
    if isinstance(model.config, LlmNormConfig):
        return target_modules(model, ALL_LINEAR)
    starts = tuple(f"{block}." for block in unit_names(model))
    modules = [m for _, m in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    wide, choosing = kept_wide(model, torch.bfloat16), routers(model)
    kept = [*(model._keep_in_fp32_modules or ())]  # as BitsAndBytesConfig leaves them out
    return [
        name
        for name, module in model.named_modules()
        if _is_stored_by_transformers(module)
        and name.startswith(starts)
        and name not in choosing
        and not wide(f"{name}.weight")
        and should_convert_module(name, kept)
        and uses[id(module.weight)] == 1
    ]


def share_left_out(model: PreTrainedModel, stored: Collection[str]) -> str:
    """How many of a model's numbers are not stored in 4 bits, for people.

    Args:
        model: without an adapter.
        stored: the names of the layers that are.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    few = sum(model.get_parameter(f"{name}.weight").numel() for name in stored)
    stacks = sum(stack.numel() for stack in expert_stacks(model).values())
    of_experts = f", {stacks / total:.0%} in stacks of experts" if stacks else ""
    return (
        f"model.quantize: {few / 1e6:.2f}M of {total / 1e6:.2f}M numbers are stored in NF4; "
        f"{1 - few / total:.0%} stay as they are{of_experts}"
    )


def skipped_by_name(model: PreTrainedModel, stored: Collection[str]) -> list[str]:
    """What transformers' `BitsAndBytesConfig` must skip to store these layers and no other.

    Args:
        model: of a class of transformers, without an adapter.

    Returns:
        Last names of layers where no stored layer ends so, else whole names.
    """
    others = [
        name
        for name, module in model.named_modules()
        if _is_stored_by_transformers(module) and name not in stored
    ]
    found = {}
    for name in others:
        last = name.rpartition(".")[2]
        found[name if any(layer.endswith(last) for layer in stored) else last] = True
    return sorted(found)


def _is_stored_by_transformers(module: nn.Module) -> bool:
    """Whether `replace_with_bnb_linear` takes a module for a linear layer."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)
