"""Adapters beside a class of transformers: which layers PEFT can put them around, and how.

    targets = foreign_targets(skeleton, settings, blocks)
    inject_in_blocks(model, settings, targets.names, blocks, targets.stacks)

PEFT changes what an adapter's configuration asks for, by the model's type: it takes the linear
layers of some mixtures for the stacks of their experts, and refuses layers of some recurrences. An
adapter that llmnorm trains on such a layer would load wrong in plain PEFT, or not at all. So a
layer is a target where PEFT wraps it too: the configuration that an export would write is tried in
a copy without memory, with the names of the tensors that it would hold.

What would surprise: layers are injected by their blocks, in which PEFT sees no model type.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmnorm.config.adapter import ALL_LINEAR, LowRankSettings
from llmnorm.models.adapters import peft_name, peft_package, widen, written_targets
from llmnorm.models.expert_adapters import Stack, give_forward, target_stacks, written_stacks
from llmnorm.part import InputError, nearest


class Targets(NamedTuple):
    """The layers that get an adapter.

    Attributes:
        names: of the layers, in the model's order.
        left_out: of linear layers that were asked for and that PEFT cannot wrap.
        stacks: of experts, which get one too.
    """

    names: list[str]
    left_out: list[str]
    stacks: list[Stack]

    def describe(self) -> str:
        """How many get one; or what is left out, by last names with their numbers."""
        count = len(self.stacks)
        stacks = f"{count} stack{'s' * (count > 1)} of experts" if count else ""
        if not self.left_out:
            layers = f"{len(self.names)} linear layers" if self.names or not stacks else ""
            return f"adapter: around {' and '.join(filter(None, (layers, stacks)))}"
        last = [name.rpartition(".")[2] for name in self.left_out]
        kinds = ", ".join(f"{last.count(name)} {name}" for name in dict.fromkeys(last))
        return (
            f"adapter: {len(self.left_out)} of {len(self.left_out) + len(self.names)} linear "
            f"layers get none, since PEFT cannot put one there: {kinds}"
            + (f"; {stacks} get one" if stacks else "")
        )


def foreign_targets(
    skeleton: PreTrainedModel, settings: LowRankSettings, blocks: Sequence[str]
) -> Targets:
    """What `adapter.targets` and `adapter.parameters` ask for and PEFT wraps.

    Args:
        skeleton: a model of the class without an adapter, its parameters on the meta device.
        blocks: the names of its blocks.

    Raises:
        InputError: PEFT is not installed; a target is no linear layer of the blocks, or a parameter
            no stack of experts; or PEFT wraps none of the layers, or not all of the stacks.
    """
    stacks = target_stacks(skeleton, settings.parameters)
    if settings.targets == "none":
        return Targets([], [], _wrapped_stacks(skeleton, settings, [], stacks))
    asked = _asked(skeleton, settings.targets, blocks)
    if not asked:
        raise InputError(
            f"adapter.targets: {type(skeleton).__name__} has no linear layer in its blocks"
        )
    plain: dict[type[nn.Module], bool] = {}
    names = []
    for name in asked:
        module = skeleton.get_submodule(name)
        kind = type(module)
        if kind not in plain:
            plain[kind] = _is_plain(module)
        if plain[kind]:
            names.append(name)
    reason = "" if names else "its class computes something else than a linear layer"
    while names:
        wrapped, reason = _wrapped(skeleton, settings, names, [])
        if wrapped is None:  # some name is refused: find out which
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
            alone = [[n for n in names if n.rpartition(".")[2] == kind] for kind in kinds]
            fits = [group for group in alone if alone[1:] and _wraps(skeleton, settings, group)]
            wrapped = {name for group in fits for name in group}
            if wrapped == set(names):  # each kind alone, but not all together
                wrapped = set()
        elif wrapped == set(names):
            break
        names = [name for name in names if name in wrapped]
    if not names:
        why = f": {reason}" if reason else ""
        raise InputError(
            f"adapter.targets: PEFT puts no adapter around {asked[0]} and the like in "
            f"{type(skeleton).__name__}{why}"
        )
    left_out = [name for name in asked if name not in set(names)]
    return Targets(names, left_out, _wrapped_stacks(skeleton, settings, names, stacks))


def _wrapped_stacks(
    skeleton: PreTrainedModel, settings: LowRankSettings, names: list[str], stacks: list[Stack]
) -> list[Stack]:
    """The stacks that get an adapter, beside linear layers that PEFT wraps without them.

    Raises:
        InputError: PEFT does not wrap all of them, or then not the layers any more.
    """
    if not stacks:
        return []
    wrapped, reason = _wrapped(skeleton, settings, names, stacks)
    layers = {*names, *(stack.layer for stack in stacks)}
    if wrapped != layers:
        lacking = "" if wrapped is None else next(iter(sorted(layers ^ wrapped)))
        raise InputError(
            f"adapter.parameters: PEFT puts no adapter around {stacks[0].name} and the like in "
            f"{type(skeleton).__name__} beside these targets: {reason or lacking}"
        )
    return stacks


def inject_in_blocks(
    model: PreTrainedModel,
    settings: LowRankSettings,
    names: Sequence[str],
    blocks: Sequence[str],
    stacks: Sequence[Stack] = (),
) -> None:
    """Put adapters around layers and stacks of the blocks, in place; all else is frozen.

    Args:
        model: its parameters on the meta device; the adapter's parameters hold nothing yet.
        names: of the layers.
        blocks: the names of the blocks that they are in.
        stacks: of experts.
    """
    peft = peft_package()
    inside = nn.ModuleList(model.get_submodule(block) for block in blocks)

    def relative(name: str) -> str:
        number, block = next((i, b) for i, b in enumerate(blocks) if name.startswith(f"{b}."))
        return f"{number}{name.removeprefix(block)}"

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # GPT-2's transposed layers, which it sees
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                target_modules=[relative(name) for name in names],
                target_parameters=[relative(stack.name) for stack in stacks] or None,
                **settings.peft_keys(),
            ),
            inside,
            low_cpu_mem_usage=True,
        )
    widen(model)
    give_forward(inside)
    found = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    wanted = {*names, *(stack.layer for stack in stacks)}
    assert found == wanted, sorted(found ^ wanted)[:3]


def _asked(model: PreTrainedModel, targets: list[str] | str, blocks: Sequence[str]) -> list[str]:
    """The names of the linear layers in blocks that `adapter.targets` asks for."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    starts = tuple(f"{block}." for block in blocks)
    inside = [name for name in linear if name.startswith(starts)]
    if targets == ALL_LINEAR:
        return inside
    found: set[str] = set()
    for target in targets:
        own = [name for name in inside if f".{name}".endswith(f".{target}")]
        if not own:
            outside = any(f".{name}".endswith(f".{target}") for name in linear)
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in inside))
            what = "is outside of the blocks" if outside else "is no linear layer"
            raise InputError(
                f"adapter.targets: '{target}' {what} of {type(model).__name__}; "
                f"{nearest(target, [*known, ALL_LINEAR])}"
            )
        found.update(own)
    return [name for name in inside if name in found]


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer computes W x + b, to which PEFT adds B A x.

    A class with a forward pass of its own may: Falcon's does, a router or grouped products do not.
    So that is looked at, in a copy with numbers.
    """
    if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
        return True
    copy: Any = deepcopy(module).to_empty(device="cpu").float()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.normal_(generator=draw)
        given = torch.randn(1, 3, copy.in_features, generator=draw)
        wanted = F.linear(given, copy.weight, copy.bias)
        try:
            found = copy(given)
        except Exception:  # of any kind: it is the class's own code
            return False
    return isinstance(found, torch.Tensor) and bool(
        found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    )


def _wraps(skeleton: PreTrainedModel, settings: LowRankSettings, names: list[str]) -> bool:
    wrapped, _ = _wrapped(skeleton, settings, names, [])
    return wrapped == set(names)


def _wrapped(
    skeleton: PreTrainedModel, settings: LowRankSettings, names: list[str], stacks: list[Stack]
) -> tuple[set[str] | None, str]:
    """What PEFT wraps and loads for the configuration that an export with these targets has.

    Returns:
        The names of layers, those around stacks too; None and the reason where it refuses the
        configuration. What is loaded of a tensor under another name than it was given does not
        count.
    """
    peft = peft_package()
    config = peft.LoraConfig(
        target_modules=written_targets(skeleton, set(names)),
        target_parameters=written_stacks(skeleton, stacks) or None,
        task_type="CAUSAL_LM",
        **settings.peft_keys(),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModelForCausalLM(deepcopy(skeleton), config, low_cpu_mem_usage=True)
            layers = {
                name: module
                for name, module in model.get_base_model().named_modules()
                if isinstance(module, peft.tuners.lora.LoraLayer)
            }
            written = _tensors(layers, {*names, *(stack.layer for stack in stacks)})
            loaded = peft.set_peft_model_state_dict(model, written, low_cpu_mem_usage=True)
    except Exception as error:  # of any kind: it is PEFT's own code
        return None, " ".join(str(error).split())[:200]
    lost = {*loaded.missing_keys, *loaded.unexpected_keys}
    return {name for name in layers if not any(f"model.{name}.lora_" in key for key in lost)}, ""


def _tensors(layers: dict[str, Any], names: set[str]) -> dict[str, torch.Tensor]:
    """The adapter's tensors of some layers as a file would name them, without memory."""
    return {
        peft_name(f"{name}.{key}"): torch.empty_like(parameter, device="meta")
        for name, layer in layers.items()
        if name in names
        for key, parameter in layer.named_parameters()
        if key.startswith("lora_")
    }
