"""What the norms multiply by: the gain as it acts, depth scaling and all.

A norm sends x of variance 1 and mean 0 to s gain x + offset, s being the depth's factor (1/sqrt(l)
in LayerNorm Scaling). Fed with signs v and -v, half the difference of the two outputs is s gain v:
the effective gain of every channel, whatever the class calls its parts ((1 + gain), folded scales).
The probe is as large as the stream is there, so that eps and a tanh act as they do in the model.

Shapes: probe and gains (hidden,).
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import Block

QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


@torch.no_grad()
def effective_gain(norm: nn.Module, hidden_size: int, size: float) -> Tensor:
    """|s gain| by channel, float64.

    Args:
        size: root mean square of what the norm is fed with.
    """
    parameter = next(norm.parameters(), None)
    device = None if parameter is None else parameter.device
    probe = torch.ones(hidden_size, device=device)
    probe[1::2] = -1
    if hidden_size % 2 and hidden_size > 1:  # 1, -1, ..., 1, 1, -2: mean 0
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    probe = size * probe / probe.square().mean().sqrt()
    token = probe.view(1, 1, -1)  # (batch, length, hidden), as in the model
    answer = (norm(token) - norm(-token)).flatten() / 2
    return (answer * size / probe).double().abs().cpu()


def gains(blocks: list[Block], hidden_size: int, sizes: dict[nn.Module, float]) -> dict[str, Any]:
    """By the norm's role ("before the mixer"): its name, rms and quantiles of its effective gain.

    Args:
        sizes: root mean square of what each norm is fed with.
    """
    found: dict[str, Any] = {}
    for layer, block in enumerate(blocks):
        for name, norm in block.norms.items():
            nowhere = {key: [None] * len(blocks) for key in ("rms", *QUANTILES)}
            one = found.setdefault(block.roles[name], {"name": name, **nowhere})
            gain = effective_gain(norm, hidden_size, sizes[norm] or 1.0)
            one["rms"][layer] = float(gain.square().mean().sqrt())
            for key, q in QUANTILES.items():
                one[key][layer] = float(gain.quantile(q))
    return found
