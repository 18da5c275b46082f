"""Operations a token of training costs, for the model FLOPs utilisation (MFU).

Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: six operations for every weight
of a matrix product (two forward, four backward) and three times the mixers' own. A frozen weight
has four: it gets no gradient. Weights are counted from the modules, so a tied head counts (it
multiplies) and an embedding does not (it looks up); recomputation under activation checkpointing is
not counted.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from llmnorm.models import nf4
from llmnorm.models.building import class_of
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.mixers.contract import Mixer


def flops_per_token(
    model: nn.Module | LlmNormConfig, context_length: int, *, head_share: float = 1.0
) -> float:
    """Forward and backward operations for one token of rows of `context_length`.

    `head_share`: of the tokens, how many reach what stands behind the last block.
    """
    if isinstance(model, LlmNormConfig):
        with torch.device("meta"):
            model = class_of(model)(model)
    modules = list(model.modules())
    base = set((model.base_model if isinstance(model, PreTrainedModel) else model).modules())
    products = 4.0 * sum(layer.shape.numel() for layer in nf4.layers(model).values())
    products += sum(
        (6.0 if m.weight.requires_grad else 4.0)
        * (m.in_features * m.out_features * (1.0 if m in base else head_share))
        for m in modules
        if isinstance(m, nn.Linear)
    )
    mixing = sum(m.flops_per_token(context_length) for m in modules if isinstance(m, Mixer))
    return products + 3.0 * mixing
