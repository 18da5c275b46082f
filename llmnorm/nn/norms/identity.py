"""No norm: y = x, times the factor of depth scaling if there is one."""

from torch import Tensor

from llmnorm.nn.norms.contract import Norm


class Identity(Norm):
    """Returns its input (..., hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden), times `scale`."""
        return self.scaled(x)
