"""SOAP: Vyas et al. 2024, arXiv 2409.11321, Algorithm 3; official code nikhilvyas/SOAP.

Adam in the eigenbasis of Shampoo's two Gram matrices.

Shapes: G, M, V and the result (n, rows, columns); L, QL (n, rows, rows); R, QR (n, columns,
columns). A side longer than `max_precond_dim` has neither Gram matrix nor basis.

    first gradient:  L = (1 - b) G G^T;  R = (1 - b) G^T G;  QL, QR their eigenvectors; no step
    then, t = 1, 2, ...:  G' = QL^T G QR;  M <- b1 M + (1 - b1) G';  V <- b2 V + (1 - b2) G'^2
    N = QL (M / (sqrt(V) + eps)) QR^T, with `normalize_grads` N / (its root mean square + 1e-30)
    a = lr sqrt(1 - b2^t) / (1 - b1^t), or lr without `correct_bias`
    W <- W - a N;  W <- W (1 - lr wd)
    L <- b L + (1 - b) G G^T, R alike; every `precondition_frequency` steps a power iteration:
    columns of Q and V sorted by diag(Q^T L Q), Q <- QR(L Q), M rotated into the new bases

What would surprise:
- The first gradient changes no weight, not even by decay (hence `inside`). So a comparison with
  another optimizer step by step is shifted by one.
- The bases are renewed after the step, so that no basis contains the gradient that it rotates.
- M stays rotated between refreshes. The official code rotates it back and forth at every step:
  the same numbers with 8 matrix products more.
- The first bases come from Gram matrices in float64 (in the official code float32). The Gram matrix
  of one gradient had condition 2e9 in the tests' model. There the last eigenvectors in float32 were
  wrong by 5e-3, and after 20 steps two runs that differed by rounding alone were 2e-4 apart; with
  float64 they are 2e-7 apart. The Gram matrices of later steps are averages and better
  conditioned: float64 gained nothing in the refreshes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmnorm.nn.linear import products
from llmnorm.optim.stacks import Decay, Hyperparameters, State


@dataclass(frozen=True)
class SOAP:
    """The rule; its fields are those of `SOAPSettings`."""

    betas: tuple[float, float]
    shampoo_beta: float | None
    eps: float
    precondition_frequency: int
    max_precond_dim: int
    correct_bias: bool
    normalize_grads: bool

    decay: ClassVar[Decay] = "inside"
    scalars: ClassVar[tuple[str, ...]] = ("step",)

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""
        sides = {"left": rows, "right": columns}
        squares: dict[str, tuple[int, ...]] = {
            f"{what}_{side}": (length, length)
            for side, length in sides.items()
            if length <= self.max_precond_dim
            for what in ("gram", "basis")
        }
        return {"momentum": (rows, columns), "second_moment": (rows, columns)} | squares

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns)."""
        assert weight is not None
        lr, weight_decay = hyperparameters.lr, hyperparameters.weight_decay
        (beta1, beta2), t = self.betas, int(state["step"])
        sides = [side for side in ("left", "right") if f"basis_{side}" in state]
        if t == 0:
            self._accumulate(grad, state, sides)
            wide = grad.double()
            for side in sides:
                gram = wide @ wide.mT if side == "left" else wide.mT @ wide
                vectors = torch.linalg.eigh(gram).eigenvectors
                state[f"basis_{side}"].copy_(vectors.flip(-1))
            return torch.zeros_like(grad)
        rotated = _rotate(grad, state, sides)
        momentum = state["momentum"].lerp_(rotated, 1 - beta1)
        second_moment = state["second_moment"].mul_(beta2)
        second_moment.addcmul_(rotated, rotated, value=1 - beta2)
        normalized = momentum / second_moment.sqrt().add_(self.eps)
        step = _rotate_back(normalized, state, sides)
        if self.normalize_grads:
            step = step / (step.square().mean((-2, -1), keepdim=True).sqrt() + 1e-30)
        step = step.mul(lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) if self.correct_bias else lr)
        step.add_(weight - step, alpha=lr * weight_decay)
        self._accumulate(grad, state, sides)
        if t % self.precondition_frequency == 0:
            self._refresh(state, sides)
        return step

    def _accumulate(self, grad: Tensor, state: State, sides: list[str]) -> None:
        beta = self.betas[1] if self.shampoo_beta is None else self.shampoo_beta
        for side in sides:
            outer = products(grad, grad) if side == "left" else products(grad.mT, grad.mT)
            state[f"gram_{side}"].lerp_(outer, 1 - beta)

    def _refresh(self, state: State, sides: list[str]) -> None:
        """One power iteration on every side; V is sorted as the eigenvalues are."""
        plain = _rotate_back(state["momentum"], state, sides)
        for side in sides:
            gram, basis, second_moment = (
                state[f"gram_{side}"],
                state[f"basis_{side}"],
                state["second_moment"],
            )
            # diag(Q^T L Q), from the product that the iteration needs anyway.
            advanced = products(gram, basis.mT)
            order = (basis * advanced).sum(-2).argsort(-1, descending=True)
            index = order.unsqueeze(-1) if side == "left" else order.unsqueeze(-2)
            second_moment.copy_(
                second_moment.take_along_dim(index, dim=-2 if side == "left" else -1)
            )
            basis.copy_(torch.linalg.qr(advanced.take_along_dim(order.unsqueeze(-2), -1)).Q)
        state["momentum"].copy_(_rotate(plain, state, sides))


def _rotate(matrices: Tensor, state: State, sides: list[str]) -> Tensor:
    """QL^T M QR."""
    if "left" in sides:
        matrices = products(state["basis_left"].mT, matrices.mT)
    if "right" in sides:
        matrices = products(matrices, state["basis_right"].mT)
    return matrices


def _rotate_back(matrices: Tensor, state: State, sides: list[str]) -> Tensor:
    """QL M QR^T."""
    if "left" in sides:
        matrices = products(state["basis_left"], matrices.mT)
    if "right" in sides:
        matrices = products(matrices, state["basis_right"])
    return matrices
