"""The effective gain of the norms: what each channel is multiplied by, depth scaling included.

A norm maps x of variance 1 and mean 0 to s gain x + offset, where s is the depth's factor
(1/sqrt(l) in LayerNorm Scaling). For an input v of signs, and then -v, half the difference of the
two outputs is s gain v. So the gain is measured whatever the class calls its parameters
((1 + gain), folded scales). The probe v is as large as the stream at that norm, so that eps and a
tanh act as they do in the model.

Shapes: probe and gains (hidden,).
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import Block

QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


@torch.no_grad()
def effective_gain(norm: nn.Module, hidden_size: int, size: float) -> Tensor:
    """|s gain| of each channel, (hidden,) float64.

    Args:
        norm: the norm.
        hidden_size: its width.
        size: root mean square of the probe.
    """
    parameter = next(norm.parameters(), None)
    device = None if parameter is None else parameter.device
    probe = torch.ones(hidden_size, device=device)
    probe[1::2] = -1
    if hidden_size % 2 and hidden_size > 1:  # 1, -1, ..., 1, 1, -2: mean 0
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    probe = size * probe / probe.square().mean().sqrt()
    token = probe.view(1, 1, -1)  # (batch, length, hidden), as in the model
    output = (norm(token) - norm(-token)).flatten() / 2
    return (output * size / probe).double().abs().cpu()


def gains(blocks: list[Block], hidden_size: int, sizes: dict[nn.Module, float]) -> dict[str, Any]:
    """Root mean square and quantiles of every norm's effective gain.

    Args:
        blocks: the model's blocks.
        hidden_size: width of the stream.
        sizes: root mean square of each norm's input in the model.

    Returns:
        By the norm's role ("before the mixer"): its name in the block, and lists with an entry per
        block, None where a block has no such norm.
    """
    found: dict[str, Any] = {}
    for layer, block in enumerate(blocks):
        for name, norm in block.norms.items():
            empty = {key: [None] * len(blocks) for key in ("rms", *QUANTILES)}
            figures = found.setdefault(block.roles[name], {"name": name, **empty})
            gain = effective_gain(norm, hidden_size, sizes[norm] or 1.0)
            figures["rms"][layer] = float(gain.square().mean().sqrt())
            for key, q in QUANTILES.items():
                figures[key][layer] = float(gain.quantile(q))
    return found
