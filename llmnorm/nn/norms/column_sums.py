"""Sums over tokens of a product of two tensors, channel by channel: what gains' gradients and
running statistics are made of.

Shapes: one and other (tokens, hidden), weights (tokens, 1), all float32 or all float64.
"""

import torch
from torch import Tensor


def column_sums(one: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
    """(hidden,): the sum over tokens of one * other * weights.

    On a CPU this is one pass without a product in memory: it is the gradient of a layer norm's gain
    for dL/dy = one, x = other, mean = 0 and 1/std = weights.
    """
    if one.device.type != "cpu":
        return (one * other if weights is None else one * other * weights).sum(0)
    tokens, hidden = one.shape
    mean, gain = one.new_zeros(tokens, 1), one.new_ones(hidden)
    rates = one.new_ones(tokens, 1) if weights is None else weights
    wanted = [False, True, False]
    _, sums, _ = torch.ops.aten.native_layer_norm_backward(
        one, other, [hidden], mean, rates, gain, None, wanted
    )
    return sums
