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
    """Project `matrices` after every step of `optimizer`, whose state takes their norms in.

    Args:
        exchange: where they are spread over processes, what sums one number a matrix over them.
    """
    parameters = list(matrices.values())
    for parameter, norm in zip(parameters, _norms(parameters, exchange), strict=True):
        optimizer.state[parameter]["initial_norm"] = norm.to(wide_dtype(parameter.dtype))

    @torch.no_grad()
    def project(*_: object) -> None:
        for parameter, norm in zip(parameters, _norms(parameters, exchange), strict=True):
            initial = optimizer.state[parameter]["initial_norm"]
            held = exchange.held(parameter) if exchange else parameter
            held.mul_(initial / norm.clamp(min=1e-30))

    optimizer.register_step_post_hook(project)


def _norms(parameters: list[nn.Parameter], exchange: "Exchange | None") -> list[Tensor]:
    """Frobenius norms of the whole matrices, float64."""
    held: list[Tensor] = [exchange.held(p) if exchange else p for p in parameters]
    norms = torch._foreach_norm(held, dtype=torch.float64)
    if exchange is None or not exchange.spread:
        return list(norms)
    return list(exchange.sum(torch.stack(norms).square_()).sqrt_())
