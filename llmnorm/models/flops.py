"""Operations a token of training costs, for the model FLOPs utilisation (MFU).

Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: six operations for every weight
of a matrix product (two forward, four backward) and three times the mixers' own. A frozen weight
has four: it gets no gradient. Weights are counted from the modules, so a tied head counts (it
multiplies) and an embedding does not (it looks up); recomputation under activation checkpointing is
not counted.

Of a class of transformers, whose modules say nothing of what they do: a stack of matrices counts
with the share of its matrices that a token is sent to, and attention as softmax attention over the
context or its window. A frozen stack with an adapter has six operations: its own gradient is made,
for that of the adapter. The adapter is added to it once a step and not multiplied with tokens.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmnorm.models import nf4
from llmnorm.models.building import class_of
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.expert_adapters import stack_layers
from llmnorm.models.foreign import Foreign
from llmnorm.nn.mixers.contract import Mixer

_CHOSEN = ("top_k", "num_experts_per_tok")  # experts that a token is sent to


class Flops(NamedTuple):
    """Forward and backward operations for one token, by kind.

    Attributes:
        products: of the weights.
        attention: of mixers that do more for a token of a longer row.
        recurrences: of mixers that do not.
    """

    products: float
    attention: float
    recurrences: float


def flops_per_token(
    model: nn.Module | LlmNormConfig, context_length: int, *, head_share: float = 1.0
) -> float:
    """Forward and backward operations for one token of rows of `context_length`.

    `head_share`: of the tokens, how many reach what stands behind the last block.
    """
    return sum(flops_by_kind(model, context_length, head_share=head_share))


def flops_by_kind(
    model: nn.Module | LlmNormConfig, context_length: int, *, head_share: float = 1.0
) -> Flops:
    """What `flops_per_token` is the sum of."""
    if isinstance(model, LlmNormConfig):
        with torch.device("meta"):
            model = class_of(model)(model)
    modules = list(model.modules())
    base = set((model.base_model if isinstance(model, PreTrainedModel) else model).modules())
    products = 4.0 * sum(layer.shape.numel() for layer in nf4.layers(model).values())
    around = stack_layers(model)
    added = {id(m) for layer in around for m in (*layer.lora_A.values(), *layer.lora_B.values())}
    products += sum(
        (6.0 if m.weight.requires_grad else 4.0)
        * (m.in_features * m.out_features * (1.0 if m in base else head_share))
        for m in modules
        if isinstance(m, nn.Linear) and id(m) not in added
    )
    if isinstance(model, Foreign):
        adapted = {id(layer.get_param()) for layer in around}
        products += sum(_of_stacks(m, adapted) for m in modules)
        return Flops(products, 3.0 * sum(_of_attention(m, context_length) for m in modules), 0.0)
    attention = recurrences = 0.0
    for mixer in (m for m in modules if isinstance(m, Mixer)):
        mixing = 3.0 * mixer.flops_per_token(context_length)
        if mixer.flops_per_token(context_length) > mixer.flops_per_token(1):
            attention += mixing
        else:
            recurrences += mixing
    return Flops(products, attention, recurrences)


def _of_stacks(module: nn.Module, adapted: set[int]) -> float:
    """Operations of a module's own matrices that are no linear layer: GPT-2's, and experts'.

    Args:
        adapted: the ids of stacks with an adapter.
    """
    if isinstance(module, Conv1D):
        return (6.0 if module.weight.requires_grad else 4.0) * module.weight.numel()
    stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    experts = getattr(module, "num_experts", None)
    if not stacks or not isinstance(experts, int):
        return 0.0
    config = getattr(module, "config", None)
    chosen = [getattr(at, n, None) for at in (module, config) for n in _CHOSEN]
    per_token = next((n for n in chosen if isinstance(n, int)), experts)
    own = sum(
        (6.0 if p.requires_grad or id(p) in adapted else 4.0) * p.numel()
        for p in stacks
        if len(p) == experts
    )
    return own * per_token / experts


def _of_attention(module: nn.Module, context_length: int) -> float:
    """Operations of a token's forward pass in softmax attention."""
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    width = getattr(module, "head_dim", None)
    if not hasattr(module, "is_causal") or not isinstance(heads, int) or not isinstance(width, int):
        return 0.0
    window = getattr(module, "sliding_window", None)
    seen = min(context_length, window) if isinstance(window, int) else context_length
    return 4.0 * heads * width * seen
