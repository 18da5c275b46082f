"""No norm: y = x, times the depth scaling where there is one."""

from torch import Tensor

from llmnorm.nn.norms.contract import Norm


class Identity(Norm):
    """Returns its input (..., hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., hidden)."""
        return self.scaled(x)
