"""Sums over tokens of a product of two tensors, channel by channel.

The gradients of gains and the running statistics are made of them. Shapes: first and second
(tokens, hidden), weights (tokens, 1), all float32 or all float64.
"""

import torch
from torch import Tensor


def column_sums(first: Tensor, second: Tensor, weights: Tensor | None = None) -> Tensor:
    """(hidden,): the sum over tokens of first * second * weights.

    On a CPU this is one pass that keeps no product in memory. It is the gradient of a layer norm's
    gain, with dL/dy = first, x = second, mean = 0 and 1/std = weights, and so torch has a fused
    kernel for it.
    """
    if first.device.type != "cpu":
        return (first * second if weights is None else first * second * weights).sum(0)
    tokens, hidden = first.shape
    mean, gain = first.new_zeros(tokens, 1), first.new_ones(hidden)
    inverse_std = first.new_ones(tokens, 1) if weights is None else weights
    wanted = [False, True, False]
    _, sums, _ = torch.ops.aten.native_layer_norm_backward(
        first, second, [hidden], mean, inverse_std, gain, None, wanted
    )
    return sums
