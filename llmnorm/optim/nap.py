"""NaP, Normalize-and-Project: Lyle et al. 2024, arXiv 2407.01800: weights of constant norm.

    after every step of any rule:  W <- W |W_0|_F / |W|_F     for every hidden matrix

Where a norm follows the matrix, its scale does not matter, and a constant norm keeps the effective
learning rate (lr / |W| for Adam, lr / |W|^2 for SGD) at what the schedule says. Elsewhere (a plain
pre-norm Llama, but for q and k with qk_norm) it is a constraint of its own.

What would surprise: the norm is that of the weights the optimizer was made over; it is part of the
state (`initial_norm`), so that a run that goes on keeps its first one. Fused projections count as
one matrix.
"""

from collections.abc import Mapping

import torch
from torch import nn

from llmnorm.nn.precision import wide_dtype


@torch.no_grad()
def attach(optimizer: torch.optim.Optimizer, matrices: Mapping[str, nn.Parameter]) -> None:
    """Project `matrices` after every step of `optimizer`, whose state takes their norms in."""
    parameters: list[torch.Tensor] = list(matrices.values())
    for parameter in parameters:
        norm = parameter.norm(dtype=torch.float64)
        optimizer.state[parameter]["initial_norm"] = norm.to(wide_dtype(parameter.dtype))

    @torch.no_grad()
    def project(*_: object) -> None:
        norms = torch._foreach_norm(parameters, dtype=torch.float64)
        for parameter, norm in zip(parameters, norms, strict=True):
            initial = optimizer.state[parameter]["initial_norm"]
            parameter.mul_(initial / norm.clamp(min=1e-30))

    optimizer.register_step_post_hook(project)
