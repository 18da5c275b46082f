"""LayerNorm Scaling: the output of a pre-norm of layer l is divided by sqrt(l), l = 1, 2, ...

Source: Sun et al. 2025, "The Curse of Depth in Large Language Models" (arXiv 2502.05795),
equation 12. Both norms of a block have the same l; the final norm is not scaled.

The factor multiplies the norm's gain (hidden numbers), not its output (tokens x hidden numbers).
It is not a parameter. It is not folded into the gain for training either, because an optimizer's
step on a folded gain would not be divided by sqrt(l). A norm keeps the factor of the layer that it
was built for, also when blocks before it are removed.
"""

from torch import Tensor, nn

from llmnorm.nn.norms.contract import Norm


def depth_scale(layer: int) -> float:
    """The factor of the norms of `layer`, counted from 0: 1, 0.7071, 0.5774, 0.5, ..."""
    return (layer + 1) ** -0.5


def scale_by_depth(norm: nn.Module, layer: int) -> nn.Module:
    """`norm`, whose output is divided by sqrt(layer + 1) from now on; layers count from 0.

    A norm from outside the package has no `scale`, so its output is multiplied instead.
    """
    if isinstance(norm, Norm):
        norm.scale = depth_scale(layer)
    else:
        norm.register_forward_hook(_Multiply(depth_scale(layer)))
    return norm


class _Multiply:
    """A forward hook as an object, which `copy.deepcopy` copies with its module."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.factor
