"""Every rule in the variants that tests run over, and how a test steps it."""

from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.optim.groups import Groups
from llmnorm.optim.matrix import Layouts
from llmnorm.optim.settings import (
    AdamPSettings,
    AdamWSettings,
    CondaSettings,
    MuonSettings,
    NorMuonSettings,
    OptimizerSettings,
    SOAPSettings,
)

# SOAP rotates only the shorter sides: a longer one begins with a rank-deficient Gram matrix, whose
# null directions are arbitrary.
SHAPES = {"wide": (6, 10), "tall": (10, 6), "square": (8, 8)}
RULES: dict[str, Any] = {
    "adamw": AdamWSettings,
    "muon": MuonSettings,
    "muon gram": lambda **k: MuonSettings(**{"orthogonalize": "gram"} | k),
    "muon original": lambda **k: MuonSettings(**{"update_rms": "original"} | k),
    "normuon": NorMuonSettings,
    "normuon paper": lambda **k: NorMuonSettings(**{"preset": "paper"} | k),
    "normuon speedrun": lambda **k: NorMuonSettings(**{"preset": "speedrun"} | k),
    "conda": lambda **k: CondaSettings(**{"refresh_every": 3} | k),
    "conda eigh staggered": lambda **k: CondaSettings(
        **{"refresh_every": 3, "basis": "eigh", "refresh": "staggered"} | k
    ),
    "adamp": AdamPSettings,
    "soap": lambda **k: SOAPSettings(**{"precondition_frequency": 2, "max_precond_dim": 8} | k),
}
SPECTRAL = [name for name in RULES if "muon" in name]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(
    names: dict[str, tuple[int, int]], steps: int, dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    """Full-rank gradients of every step."""
    return [
        {
            name: draw(*shape, seed=100 * step + number, dtype=dtype)
            for number, (name, shape) in enumerate(names.items())
        }
        for step in range(steps)
    ]


class Run:
    """An optimizer over named matrices."""

    def __init__(
        self,
        settings: OptimizerSettings,
        weights: dict[str, Tensor],
        auxiliary: dict[str, Tensor] | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self.weights = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        self.auxiliary = {name: nn.Parameter(w.clone()) for name, w in (auxiliary or {}).items()}
        self.optimizer = settings.build(Groups(self.weights, self.auxiliary, layouts or {}))

    def step(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights after one step."""
        for name, parameter in (self.weights | self.auxiliary).items():
            if name in grads:
                parameter.grad = grads[name]
        self.optimizer.step()
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def deltas(self, grads: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What every step has subtracted from the weights (which should not decay)."""
        found = []
        for one in grads:
            before = {name: p.detach().clone() for name, p in self.weights.items()}
            after = self.step(one)
            found.append({name: before[name] - after[name] for name in after})
        return found


def zeros(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights of every shape, all 0, from which a step's change is read without rounding."""
    return {name: torch.zeros(*shape, dtype=dtype) for name, shape in SHAPES.items()}
