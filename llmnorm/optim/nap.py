"""NaP, Normalize-and-Project: Lyle et al. 2024, arXiv 2407.01800: weights of constant norm.

    after every step of any rule:  W <- W |W_0|_F / |W|_F     for every hidden matrix

Where a norm follows the matrix, the scale of W does not matter, and a constant |W| keeps the
effective learning rate (lr / |W| for Adam, lr / |W|^2 for SGD) at what the schedule says. Where no
norm follows (most matrices of a pre-norm Llama), the projection is a constraint of its own.

What would surprise:
- |W_0| is taken when the optimizer is built, and is saved with its state as `initial_norm`, so that
  a resumed run projects to the norm from before its first step.
- A fused projection counts as one matrix, even where `split_sizes` cuts it for the rule.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmnorm.nn.precision import wide_dtype

if TYPE_CHECKING:
    from llmnorm.optim.sharded import Exchange


@torch.no_grad()
def attach(
    optimizer: torch.optim.Optimizer,
    matrices: Mapping[str, nn.Parameter],
    exchange: "Exchange | None" = None,
) -> None:
    """Project `matrices` after every step of `optimizer`; their norms become part of its state.

    Args:
        exchange: the processes that the matrices are spread over; it sums one number a matrix.
    """
    parameters = list(matrices.values())
    for parameter, norm in zip(parameters, _norms(parameters, exchange), strict=True):
        optimizer.state[parameter]["initial_norm"] = norm.to(wide_dtype(parameter.dtype))

    @torch.no_grad()
    def project(*_: object) -> None:
        for parameter, norm in zip(parameters, _norms(parameters, exchange), strict=True):
            initial = optimizer.state[parameter]["initial_norm"]
            part = exchange.local(parameter) if exchange else parameter
            part.mul_(initial / norm.clamp(min=1e-30))

    optimizer.register_step_post_hook(project)


def _norms(parameters: list[nn.Parameter], exchange: "Exchange | None") -> list[Tensor]:
    """Frobenius norms of the whole matrices, float64."""
    parts: list[Tensor] = [exchange.local(p) if exchange else p for p in parameters]
    norms = torch._foreach_norm(parts, dtype=torch.float64)
    if exchange is None or not exchange.spread:
        return list(norms)
    return list(exchange.sum(torch.stack(norms).square_()).sqrt_())
