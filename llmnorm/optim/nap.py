"""NaP, Normalize-and-Project: Lyle et al. 2024, arXiv 2407.01800: weights of constant norm.

    after every step of any rule:  W <- W |W_0|_F / |W|_F     for every hidden matrix

Where a norm follows the matrix, the scale of W does not matter, and a constant |W| keeps the
effective learning rate (lr / |W| for Adam, lr / |W|^2 for SGD) at what the schedule says. Where no
norm follows (most matrices of a pre-norm Llama), the projection is a constraint of its own.

What would surprise:
- |W_0| is taken when the optimizer is built, and is saved with its state as `initial_norm`, so that
  a resumed run projects to the norm from before its first step.
- A fused projection counts as one matrix, even where it is cut for the rule. Each expert of a stack
  has a norm of its own.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmnorm.nn.precision import wide_dtype
from llmnorm.optim.fragments import whole_shape

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
            factor = optimizer.state[parameter]["initial_norm"] / norm.clamp(min=1e-30)
            if factor.ndim:
                for experts, numbers in _by_expert(parameter, exchange):
                    numbers.mul_(factor[experts].unsqueeze(1))
            else:
                _local(parameter, exchange).mul_(factor)

    optimizer.register_step_post_hook(project)


def _norms(parameters: list[nn.Parameter], exchange: "Exchange | None") -> list[Tensor]:
    """Frobenius norms of the whole matrices, float64: 0-dim, or (experts,) of a stack."""
    shapes = [whole_shape(parameter) for parameter in parameters]
    plain = [p for p, shape in zip(parameters, shapes, strict=True) if len(shape) == 2]
    found = iter(_plain_norms(plain, exchange))
    norms: list[Tensor] = []
    for parameter, shape in zip(parameters, shapes, strict=True):
        if len(shape) == 2:
            norms.append(next(found).view(1))
            continue
        squares = torch.zeros(shape[0], dtype=torch.float64, device=parameter.device)
        for experts, numbers in _by_expert(parameter, exchange):
            squares[experts] += torch.linalg.vector_norm(numbers, dim=1, dtype=torch.float64) ** 2
        norms.append(squares.sqrt_())
    if exchange is not None and exchange.spread:
        sums = exchange.sum(torch.cat(norms).square_()).sqrt_()
        norms = list(sums.split([len(norm) for norm in norms]))
    return [n if len(s) == 3 else n.squeeze(0) for n, s in zip(norms, shapes, strict=True)]


def _plain_norms(parameters: list[nn.Parameter], exchange: "Exchange | None") -> tuple[Tensor, ...]:
    """The norms of this process's parts of single matrices."""
    if not parameters:
        return ()
    parts = [_local(parameter, exchange) for parameter in parameters]
    return torch._foreach_norm(parts, dtype=torch.float64)


def _by_expert(
    parameter: nn.Parameter, exchange: "Exchange | None"
) -> Iterator[tuple[slice, Tensor]]:
    """Views (experts, numbers) of this process's part of a stack, and whose numbers they are.

    A part may begin and end inside an expert, so there are up to three. Of experts of 10 numbers:

        [7, 35)     [7, 10) of expert 0, [10, 30) of experts 1 and 2, [30, 35) of expert 3
    """
    size = whole_shape(parameter)[1:].numel()
    part = _local(parameter, exchange).view(-1)
    first, last = exchange.own(parameter) if exchange else (0, part.numel())
    inner = min(-(-first // size) * size, last), max(last // size * size, first)
    for begin, end in pairwise(sorted({first, *inner, last})):
        count = max(1, (end - begin) // size)
        experts = slice(begin // size, begin // size + count)
        yield experts, part[begin - first : end - first].view(count, -1)


def _local(parameter: nn.Parameter, exchange: "Exchange | None") -> Tensor:
    """This process's part of a parameter; without gradient."""
    part = parameter.detach()
    return exchange.local(part) if exchange else part
