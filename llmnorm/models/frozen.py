"""What of a model is trained, and how the rest is stored.

Frozen weights are stored in the dtype of the products that they make. Under `precision: bf16` those
of linear layers, of experts, of the head and of the embedding are bfloat16: autocast would round
the weight of a layer to bfloat16 at every use, so products are equal to the bit. The embedding's
output is widened to float32 again, since the residual stream begins with it; norms, biases and the
routers of experts (nn/experts.py) stay float32.

What would surprise: an embedding whose file is float32 is rounded by this, once, when it is loaded;
one whose file is bfloat16 is not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from llmnorm.models.adapters import is_adapter
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.experts import can_be_narrow, routers, stack_names
from llmnorm.nn.norms.contract import Norm
from llmnorm.nn.norms.running import RunningNorm


def freeze(model: PreTrainedModel, *, norms: bool, new_head: bool) -> None:
    """Freeze all of a model but its adapter, and what the arguments name.

    Norms with running statistics keep those that they have.

    Args:
        norms: train gains and offsets of all norms.
        new_head: train what stands behind the base model, since it was not loaded.
    """
    trained = {id(p) for name, p in model.named_parameters() if is_adapter(name)}
    if norms:
        trained |= {id(p) for m in norm_modules(model) for p in m.parameters(recurse=False)}
    if new_head:
        loaded = {id(p) for p in model.base_model.parameters()}
        trained |= {id(p) for p in model.parameters()} - loaded
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for module in model.modules():
        if isinstance(module, RunningNorm):
            module.still = True


def norm_modules(model: PreTrainedModel) -> list[nn.Module]:
    """All norms of a model: those that its settings name, and those of queries and keys.

    Of a class of transformers the modules that are called so.
    """
    if not isinstance(model.config, LlmNormConfig):
        return [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    settings = model.config.settings()
    with torch.device("meta"):  # a norm of another package need not be derived from ours
        kinds = (Norm, type(settings.norm.build(settings.hidden_size)))
    return [module for module in model.modules() if isinstance(module, kinds)]


def kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters stay in float32, by name, where the others are stored in `dtype`.

    A class of transformers names them (`_keep_in_fp32_modules_strict`, and for float16
    `_keep_in_fp32_modules`); our classes name none.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern = build_glob_alternation(list(plan))[0]
    return lambda name: pattern.search(name) is not None


def narrow(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """Store frozen weights of linear layers, experts and embeddings in `dtype`, the products' own.

    Those that a class of transformers keeps in float32 stay so, and routers.

    Args:
        model: on the meta device, after `freeze`.
    """
    wide, kept = kept_wide(model, dtype), {id(router) for router in routers(model).values()}
    for name, module in model.named_modules():
        for stack in stack_names(module):
            parameter = module.get_parameter(stack)
            narrowed = not parameter.requires_grad and can_be_narrow(parameter)
            if narrowed and not wide(f"{name}.{stack}"):
                parameter.data = parameter.data.to(dtype)
        if wide(f"{name}.weight") or id(module) in kept:
            continue
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(_widen)


def _widen(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()
