"""Conda, Column-Normalized Adam: Wang et al. 2025, arXiv 2509.24218; the official code's semantics
(jie040109/Conda), re-stated from its description.

Adam in the basis of the momentum's singular vectors on the shorter side, at full rank.

Shapes: G, M, V and the result (n, rows, columns); Q (n, k, k), k the shorter side; R = Q from the
right where rows >= columns, else its transpose from the left: "rotated" means G Q, or Q^T G.

    every `refresh_every` steps: Q = singular vectors of b1 M + (1 - b1) G
    M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) rotated(G)^2
    a = lr sqrt(1 - b2^t) / (1 - b1^t), or lr without `correct_bias`
    W <- W - a scale back(rotated(M) / (sqrt(V) + eps))
    W <- W (1 - lr wd)

What would surprise:
- The state holds rotated(M): between refreshes rotated(M) <- b1 rotated(M) + (1 - b1) rotated(G) is
  the same number without a third product. At a refresh M is rotated back first.
- V is neither rotated nor reset when the basis changes (the official code; `on_refresh`), so the
  order of Q's columns must be the same at every refresh: descending. Their signs do not matter.
- eps is not bias-corrected: its effective size is eps / sqrt(1 - b2^t). Q = 1 gives Adam.
- The first basis comes from one gradient, and is kept for `refresh_every` steps.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmnorm.nn.linear import products
from llmnorm.optim.stacks import Decay, Hyperparameters, State


@dataclass(frozen=True)
class Conda:
    """The rule; its fields are those of `CondaSettings`."""

    betas: tuple[float, float]
    eps: float
    scale: float
    refresh_every: int
    refresh: Literal["together", "staggered"]
    basis: Literal["svd", "eigh"]
    on_refresh: Literal["keep", "rotate", "reset"]
    correct_bias: bool

    decay: ClassVar[Decay] = "after"
    scalars: ClassVar[tuple[str, ...]] = ("step", "phase")

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""
        k = min(rows, columns)
        return {"momentum": (rows, columns), "second_moment": (rows, columns), "basis": (k, k)}

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns)."""
        before = int(state["step"])
        due = self._due(before, state["phase"])
        if due:
            self._refresh(due, grad, state, first=before == 0)
        beta1, beta2 = self.betas
        basis, second_moment = state["basis"], state["second_moment"]
        rotated = _rotate(grad, basis)
        momentum = state["momentum"].lerp_(rotated, 1 - beta1)
        second_moment.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        t = before + 1
        rate = hyperparameters.lr * self.scale
        if self.correct_bias:
            rate = rate * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        # The rotated gradient's memory is free now.
        normalized = torch.sqrt(second_moment, out=rotated).add_(self.eps)
        torch.div(momentum, normalized, out=normalized)
        return _rotate_back(normalized.mul_(rate), basis)

    def _due(self, step: int, phases: Tensor) -> list[int]:
        """Which members of the stack get a new basis in this step (from 0): all in the first.

        A phase is a number in [0, 1), different for every matrix; staggered refreshes are spread
        over the interval by it.
        """
        period = self.refresh_every
        if step == 0 or self.refresh == "together":
            return list(range(len(phases))) if step % period == 0 else []
        # A float32 phase may lie a little below the fraction that it stands for.
        offsets = [int(phase * period + 1e-3) for phase in phases.tolist()]
        return [i for i, offset in enumerate(offsets) if (step + offset) % period == 0]

    def _refresh(self, due: list[int], grad: Tensor, state: State, *, first: bool) -> None:
        """New bases from the momentum with this gradient; the momentum moves into them."""
        for i in due:  # one by one: a decomposition is serial anyway, and its workspace is large
            one = slice(i, i + 1)
            old, momentum = state["basis"][one], state["momentum"][one]
            plain = torch.zeros_like(momentum) if first else _rotate_back(momentum, old)
            new = _basis(torch.lerp(plain, grad[one], 1 - self.betas[0]), self.basis)
            if new is None:  # zeros have no directions: keep what there is
                if first:
                    old.diagonal(dim1=-2, dim2=-1).fill_(1)
                continue
            if self.on_refresh == "reset":
                state["second_moment"][one].zero_()
            elif self.on_refresh == "rotate" and not first:
                # The expected squares in the new basis, if the old basis has no correlations.
                change = products(old.mT, new.mT).square()
                state["second_moment"][one] = _rotate(state["second_moment"][one], change)
            momentum.copy_(_rotate(plain, new))
            old.copy_(new)


def _rotate(matrices: Tensor, basis: Tensor) -> Tensor:
    """M Q where rows >= columns, else Q^T M."""
    rows, columns = matrices.shape[-2:]
    return products(matrices, basis.mT) if rows >= columns else products(basis.mT, matrices.mT)


def _rotate_back(matrices: Tensor, basis: Tensor) -> Tensor:
    """M Q^T where rows >= columns, else Q M."""
    rows, columns = matrices.shape[-2:]
    return products(matrices, basis) if rows >= columns else products(basis, matrices.mT)


def _basis(momentum: Tensor, how: str) -> Tensor | None:
    """Singular vectors (1, k, k) on the shorter side, largest value first; None for zeros.

    `eigh` decomposes the Gram matrix, which squares the condition number: in float32 the basis
    would be wrong by 6 to 36 % at conditions of 1e3 to 1e5, hence float64.
    """
    if not momentum.any():
        return None
    rows, columns = momentum.shape[-2:]
    if how == "svd":
        left, _, right = torch.linalg.svd(momentum, full_matrices=False)
        return right.mT if rows >= columns else left
    wide = momentum.double()
    gram = torch.bmm(wide.mT, wide) if rows >= columns else torch.bmm(wide, wide.mT)
    return torch.linalg.eigh(gram).eigenvectors.flip(-1).to(momentum.dtype)
