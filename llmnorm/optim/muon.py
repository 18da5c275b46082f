"""Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale `match_adamw`: Liu et al.
2025 (Moonlight), arXiv 2502.16982.

Shapes: grad, momentum and the result (n, rows, columns).

    M <- mu M + (1 - mu) G;  U = (1 - mu) G + mu M (Nesterov) or M;  O = NewtonSchulz(U)
    W <- W (1 - lr wd) - lr s O

    update_rms   s                                the step's root mean square
    original     sqrt(max(1, rows / columns))     about .88 lr / sqrt(columns)
    match_adamw  .2 sqrt(max(rows, columns))      about .18 lr: that of AdamW at the same lr

What would surprise: the gradient's size hardly matters (O has the same singular values for any), so
clipping before the rule changes how gradients are mixed in M, never how large the step is. Papers
and torch's documentation write M <- mu M + G; the direction is the same.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llmnorm.optim.orthogonalize import (
    Coefficients,
    Form,
    Precision,
    orthogonalize,
    working_dtype,
)
from llmnorm.optim.stacks import Decay, Hyperparameters, State

UpdateRMS = Literal["match_adamw", "original"]


@dataclass(frozen=True)
class Muon:
    """The rule; its fields are those of `MuonSettings`."""

    momentum: float
    nesterov: bool
    update_rms: UpdateRMS
    orthogonalize: Form
    coefficients: Coefficients
    precision: Precision

    decay: ClassVar[Decay] = "before"
    scalars: ClassVar[tuple[str, ...]] = ()

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""
        return {"momentum": (rows, columns)}

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns)."""
        direction = self.orthogonalized_momentum(grad, state)
        return direction.mul_(hyperparameters.lr * scale(self.update_rms, *grad.shape[-2:]))

    def orthogonalized_momentum(self, grad: Tensor, state: State) -> Tensor:
        """O, after the momentum has taken the gradient in."""
        momentum = state["momentum"].lerp_(grad, 1 - self.momentum)
        mixed = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
        return orthogonalize(
            mixed,
            coefficients=self.coefficients,
            form=self.orthogonalize,
            dtype=working_dtype(self.precision, self.orthogonalize, mixed),
        )


def scale(update_rms: UpdateRMS, rows: int, columns: int) -> float:
    """s of the table above."""
    if update_rms == "original":
        return max(1.0, rows / columns) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5
