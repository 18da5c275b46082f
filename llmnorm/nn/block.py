"""The pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x)).

Source: Xiong et al. 2020 (arXiv 2002.04745), figure 1b. Shapes: hidden (batch, length, hidden).
Submodules carry Llama's names, whatever the mixer is, so that checkpoints map one to one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.cache import LayerCache
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.settings import ModelSettings


class Block(nn.Module):
    """One layer (counted from 0) of the model."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.dropout = settings.dropout
        self.input_layernorm = settings.norm.build(width)
        self.self_attn = settings.mixers()[layer].build(settings, layer)
        self.post_attention_layernorm = settings.norm.build(width)
        self.mlp = settings.mlp.build(width, settings.intermediate_size)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        hidden = hidden + self._drop(self.self_attn(self.input_layernorm(hidden), context, cache))
        return hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
