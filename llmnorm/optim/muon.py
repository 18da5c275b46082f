"""Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale `match_adamw`: Liu et al.
2025 (Moonlight), arXiv 2502.16982.

Shapes: grad, momentum and the result (n, rows, columns).

    M <- mu M + (1 - mu) G;  U = (1 - mu) G + mu M (Nesterov) or M;  O = NewtonSchulz(U)
    W <- W (1 - lr wd) - lr s O

    variant      M                     before the iteration      official code
    jordan       mu M + (1 - mu) G     U / (|U|_F + 1e-7)        KellerJordan/Muon, muon.py
    torch        mu M + (1 - mu) G     U / max(|U|_F, 1e-7)      torch 2.13, optim/_muon.py
    moonlight    mu M + G              U / (|U|_F + 1e-7)        MoonshotAI/Moonlight, toy_train.py
                 (U = G + mu M)

    update_rms   s                                the step's root mean square
    original     sqrt(max(1, rows / columns))     about .88 lr / sqrt(columns)
    match_adamw  .2 sqrt(max(rows, columns))      about .18 lr: that of AdamW at the same lr

What would surprise:
- The gradient's size hardly matters, because O has the same singular values for any. Clipping
  before the rule changes how gradients are mixed in M, not how large the step is.
- The three variants take the same direction while mu is constant: a sum of gradients is their
  average over 1 - mu. They differ by the 1e-7, which float32 hardly shows: steps in float64 by
  2e-10 of lr 2e-3 for gradients of size 1, by 2e-8 for gradients of size .01. While mu moves, a sum
  weighs the gradients otherwise.
- torch's documentation writes M <- mu M + G; its code averages.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llmnorm.optim.orthogonalize import (
    GRAM_IN_BF16,
    Coefficients,
    Form,
    Precision,
    orthogonalize,
    working_dtype,
)
from llmnorm.optim.stacks import Decay, Hyperparameters, State

UpdateRMS = Literal["match_adamw", "original"]
Variant = Literal["jordan", "torch", "moonlight"]


@dataclass(frozen=True)
class Muon:
    """The rule; its fields are those of `MuonSettings`.

    Raises:
        ValueError: the Gram form in bf16.
    """

    nesterov: bool
    variant: Variant
    update_rms: UpdateRMS
    orthogonalize: Form
    coefficients: Coefficients
    precision: Precision

    decay: ClassVar[Decay] = "before"
    scalars: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.orthogonalize == "gram" and self.precision == "bf16":
            raise ValueError(GRAM_IN_BF16)

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
        direction = self.orthogonalized_momentum(grad, state, hyperparameters.momentum)
        return direction.mul_(hyperparameters.lr * scale(self.update_rms, *grad.shape[-2:]))

    def orthogonalized_momentum(self, grad: Tensor, state: State, mu: float) -> Tensor:
        """O, after the momentum has taken the gradient in; `mu` is the step's momentum."""
        momentum = state["momentum"]
        if self.variant == "moonlight":
            momentum.mul_(mu).add_(grad)
            mixed = grad.add(momentum, alpha=mu) if self.nesterov else momentum
        else:
            momentum.lerp_(grad, 1 - mu)
            mixed = grad.lerp(momentum, mu) if self.nesterov else momentum
        return orthogonalize(
            mixed,
            coefficients=self.coefficients,
            form=self.orthogonalize,
            guard="least" if self.variant == "torch" else "added",
            dtype=working_dtype(self.precision, self.orthogonalize, mixed),
        )


def scale(update_rms: UpdateRMS, rows: int, columns: int) -> float:
    """s of the table above."""
    if update_rms == "original":
        return max(1.0, rows / columns) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5
