"""The blocks as transformers' GradientCheckpointingLayer, which wraps their `forward`.

A model that is told to (`activation_checkpointing_enable`) then keeps a block's input alone in
training, and the backward pass runs the block again. nn/ knows nothing of transformers, so a block
gets this class when a model takes it in. The names are those of nn/block.py.
"""

from transformers.modeling_layers import GradientCheckpointingLayer

from llmnorm.nn import block as blocks


class PreBlock(blocks.PreBlock, GradientCheckpointingLayer):
    """A block that can be recomputed."""


class PostBlock(blocks.PostBlock, GradientCheckpointingLayer):
    """A block that can be recomputed."""


class DeepNormBlock(blocks.DeepNormBlock, GradientCheckpointingLayer):
    """A block that can be recomputed."""


class SandwichBlock(blocks.SandwichBlock, GradientCheckpointingLayer):
    """A block that can be recomputed."""


class ReorderedBlock(blocks.ReorderedBlock, GradientCheckpointingLayer):
    """A block that can be recomputed."""


_KNOWN: dict[type, type] = {
    cls.__mro__[1]: cls
    for cls in (PreBlock, PostBlock, DeepNormBlock, SandwichBlock, ReorderedBlock)
}


def recomputable(block: blocks.Block) -> blocks.Block:
    """The same block, of a class that can be recomputed; one of another package's too."""
    cls = type(block)
    if cls not in _KNOWN:
        _KNOWN[cls] = type(cls.__name__, (cls, GradientCheckpointingLayer), {})
    block.__class__ = _KNOWN[cls]
    return block
