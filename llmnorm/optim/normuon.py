"""NorMuon: Li et al. 2025, arXiv 2510.05491; official code zichongli5/NorMuon, normuon.py.

Muon whose orthogonalised rows (one per output neuron) are divided by a running root mean square.

Shapes: grad, momentum, O and the result (n, rows, columns); v (n, rows, 1), or (n, 1, columns).

    M, O as Muon;  v <- b2 v + (1 - b2) mean_j O_ij^2;  N_ij = O_ij / (sqrt(v_i) + 1e-10)
    original:     W <- W (1 - lr wd) - lr sqrt(max(1, rows / columns)) N |O|_F / (|N|_F + 1e-10)
    match_adamw:  W <- W (1 - lr wd) - .2 lr sqrt(rows columns) N / (|N|_F + 1e-10)

Paper, official code and speedrun differ in more than the scale (`NorMuonSettings.preset`): the
paper has no Nesterov; the speedrun keeps v along the longer side and decays cautiously, i.e. only
entries that the step moves towards zero (arXiv 2510.12402).

What would surprise:
- v starts at 0 without bias correction: the rescaling to a fixed norm cancels any common factor.
- With rows <= columns the rows of an exact O would all have norm 1. What is evened out there is the
  error of the Newton-Schulz iteration.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llmnorm.optim.muon import Muon, scale
from llmnorm.optim.stacks import Decay, Hyperparameters, State

EPS = 1e-10


@dataclass(frozen=True)
class NorMuon:
    """The rule.

    Attributes:
        muon: makes the orthogonalised momentum; its `update_rms` is the size of the steps.
        beta2: decay rate of v.
        axis: v has a number for every row, or for every index along the longer side.
        cautious_decay: decay only entries that the step moves towards zero.
    """

    muon: Muon
    beta2: float
    axis: Literal["rows", "longer"]
    cautious_decay: bool

    scalars: ClassVar[tuple[str, ...]] = ()

    @property
    def decay(self) -> Decay:
        """`inside` for a cautious decay, which compares weight and step."""
        return "inside" if self.cautious_decay else "before"

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""
        by_row = self.axis == "rows" or rows >= columns
        second_moment = (rows, 1) if by_row else (1, columns)
        return self.muon.fields(rows, columns) | {"second_moment": second_moment}

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns)."""
        lr, weight_decay = hyperparameters.lr, hyperparameters.weight_decay
        rows, columns = grad.shape[-2:]
        o = self.muon.orthogonalized_momentum(grad, state, hyperparameters.momentum)
        v = state["second_moment"]
        v.lerp_(o.square().mean(-1 if v.shape[-1] == 1 else -2, keepdim=True), 1 - self.beta2)
        if self.muon.update_rms == "original":
            target = _norm(o) * scale("original", rows, columns)
        else:
            target = 0.2 * (rows * columns) ** 0.5
        o.div_(v.sqrt().add_(EPS))
        step = o.mul_(lr * target / (_norm(o) + EPS))
        if self.cautious_decay:
            assert weight is not None
            step.add_((step * weight >= 0) * weight, alpha=lr * weight_decay)
        return step


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms, (n, 1, 1)."""
    return matrices.norm(dim=(-2, -1), keepdim=True)
