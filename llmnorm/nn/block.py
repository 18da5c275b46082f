"""The block: a mixer and an MLP on the residual stream, and where the norms stand.

                x = residual stream, f = mixer or MLP
    pre         x + f(norm(x))              Xiong et al. 2020, arXiv 2002.04745, figure 1b
    post        norm(x + f(x))              Vaswani et al. 2017, arXiv 1706.03762, section 3.1
    deepnorm    norm(alpha x + f(x))        Wang et al. 2022, arXiv 2203.00555, figure 2
    sandwich    x + norm(f(norm(x)))        Ding et al. 2021, arXiv 2105.13290; Peri-LN: 2502.02732
    reordered   x + norm(f(x))              OLMo 2, arXiv 2501.00656, section 2.1
    mix         post in the first layers, pre in the others (Li et al. 2024, arXiv 2412.13795)

Shapes: hidden (batch, length, hidden). Submodules carry the names of Llama, OLMo 2 and Gemma 2,
whatever the mixer is, so that checkpoints map one to one: `post_attention_layernorm` stands before
the MLP in `pre` and after the mixer in all others. With `mlp: none` a block is its mixer alone: the
MLP and its norms are left out.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.cache import LayerCache
from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.norms.depth_scaling import scale_by_depth
from llmnorm.nn.settings import ModelSettings


class Block(nn.Module):
    """One layer (counted from 0) of the model; the subclasses add the norms and the order."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.self_attn = settings.mixers()[layer].build(settings, layer)
        self.mlp = settings.mlp.build(settings.hidden_size, settings.intermediate_size)
        if settings.initialization == "scaled":
            scaled = settings.initializer_range / math.sqrt(2 * settings.num_hidden_layers)
            outputs: list[Linear] = [self.self_attn.output]
            outputs += [] if self.mlp is None else [self.mlp.down_proj]
            for linear in outputs:
                linear.initial_std = scaled

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        raise NotImplementedError

    def _mix(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        return self._drop(self.self_attn(x, context, cache))

    def _feed(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self._drop(self.mlp(x))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch


class PreBlock(Block):
    """x + f(norm(x)); with depth scaling both norms are divided by the root of the layer."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        self.input_layernorm = settings.norm.build(settings.hidden_size)
        norms = [self.input_layernorm]
        if self.mlp is not None:
            self.post_attention_layernorm = settings.norm.build(settings.hidden_size)
            norms.append(self.post_attention_layernorm)
        if settings.depth_scaling == "lns":
            for norm in norms:
                scale_by_depth(norm, layer)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        hidden = hidden + self._mix(self.input_layernorm(hidden), context, cache)
        if self.mlp is None:
            return hidden
        return hidden + self._feed(self.post_attention_layernorm(hidden))


class PostBlock(Block):
    """norm(alpha x + f(x)), alpha = 1."""

    alpha = 1.0

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        self.post_attention_layernorm = settings.norm.build(settings.hidden_size)
        if self.mlp is not None:
            self.post_feedforward_layernorm = settings.norm.build(settings.hidden_size)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        branch = self._mix(hidden, context, cache)
        hidden = self.post_attention_layernorm(branch.add(hidden, alpha=self.alpha))
        if self.mlp is None:
            return hidden
        branch = self._feed(hidden)
        return self.post_feedforward_layernorm(branch.add(hidden, alpha=self.alpha))


class DeepNormBlock(PostBlock):
    """Post-norm with alpha = (2N)^1/4 for N layers.

    Initial weights are Xavier's normal; those that carry values (v, o and the MLP) times
    beta = (8N)^-1/4.
    """

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        layers = settings.num_hidden_layers
        self.alpha = (2 * layers) ** 0.25
        mlp = [] if self.mlp is None else list(self.mlp.children())
        values = [self.self_attn.values, self.self_attn.output, *mlp]
        for linear in self.modules():
            if isinstance(linear, Linear):
                xavier = math.sqrt(2 / (linear.in_features + linear.out_features))
                carries = any(linear is value for value in values)
                linear.initial_std = xavier * ((8 * layers) ** -0.25 if carries else 1.0)


class SandwichBlock(Block):
    """x + norm(f(norm(x)))."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        self.input_layernorm = settings.norm.build(settings.hidden_size)
        self.post_attention_layernorm = settings.norm.build(settings.hidden_size)
        if self.mlp is not None:
            self.pre_feedforward_layernorm = settings.norm.build(settings.hidden_size)
            self.post_feedforward_layernorm = settings.norm.build(settings.hidden_size)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        branch = self._mix(self.input_layernorm(hidden), context, cache)
        hidden = hidden + self.post_attention_layernorm(branch)
        if self.mlp is None:
            return hidden
        branch = self._feed(self.pre_feedforward_layernorm(hidden))
        return hidden + self.post_feedforward_layernorm(branch)


class ReorderedBlock(Block):
    """x + norm(f(x))."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        self.post_attention_layernorm = settings.norm.build(settings.hidden_size)
        if self.mlp is not None:
            self.post_feedforward_layernorm = settings.norm.build(settings.hidden_size)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """hidden (batch, length, hidden) -> the same shape; `cache` is this layer's."""
        hidden = hidden + self.post_attention_layernorm(self._mix(hidden, context, cache))
        if self.mlp is None:
            return hidden
        return hidden + self.post_feedforward_layernorm(self._feed(hidden))
