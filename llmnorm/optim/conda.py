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
- The state holds rotated(M). Between refreshes rotated(M) <- b1 rotated(M) + (1 - b1) rotated(G)
  gives the same numbers as rotating M and saves a third matrix product. A refresh rotates M back
  first.
- V is neither rotated nor reset when the basis changes (as in the official code; `on_refresh`). So
  the columns of Q must have the same order at every refresh: by falling singular value. Their signs
  do not matter.
- eps is not bias-corrected: it acts like eps / sqrt(1 - b2^t) in AdamW. With Q = 1 this is Adam.
- The first basis comes from a single gradient and stays for `refresh_every` steps.
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
        # The rotated gradient is not needed any more: its memory takes the result.
        normalized = torch.sqrt(second_moment, out=rotated).add_(self.eps)
        torch.div(momentum, normalized, out=normalized)
        return _rotate_back(normalized.mul_(rate), basis)

    def _due(self, step: int, phases: Tensor) -> list[int]:
        """Which members of the stack get a new basis in this step (from 0); in step 0 all do.

        Args:
            phases: (n,), a different number in [0, 1) for every matrix. Staggered refreshes are
                spread over the interval by it.
        """
        period = self.refresh_every
        if step == 0 or self.refresh == "together":
            return list(range(len(phases))) if step % period == 0 else []
        # A fraction such as 1/3 may be a little too small in float32, hence the 1e-3.
        offsets = [int(phase * period + 1e-3) for phase in phases.tolist()]
        return [i for i, offset in enumerate(offsets) if (step + offset) % period == 0]

    def _refresh(self, due: list[int], grad: Tensor, state: State, *, first: bool) -> None:
        """New bases from the momentum with this gradient; the momentum moves into them."""
        for i in due:  # singly: decompositions run one after the other anyway, in much memory
            member = slice(i, i + 1)
            old, momentum = state["basis"][member], state["momentum"][member]
            plain = torch.zeros_like(momentum) if first else _rotate_back(momentum, old)
            new = _basis(torch.lerp(plain, grad[member], 1 - self.betas[0]), self.basis)
            if new is None:  # a momentum of zeros: the old basis stays, at first the identity
                if first:
                    old.diagonal(dim1=-2, dim2=-1).fill_(1)
                continue
            if self.on_refresh == "reset":
                state["second_moment"][member].zero_()
            elif self.on_refresh == "rotate" and not first:
                # The expected squares in the new basis, if coordinates in the old one are
                # uncorrelated.
                change = products(old.mT, new.mT).square()
                state["second_moment"][member] = _rotate(state["second_moment"][member], change)
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

    `eigh` decomposes the Gram matrix, whose condition number is the square of the momentum's. In
    float32 weights were wrong by 6 to 36 % after 30 steps at conditions of 1e3 to 1e5, so the Gram
    matrix is float64.
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
