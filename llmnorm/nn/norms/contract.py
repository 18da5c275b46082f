"""What every norm is.

Shapes: x and y (..., hidden); the last axis is normalised. Statistics are computed in float32
(float64 for float64 input), and the output has the input's dtype, whatever the gain's is. Norms
that look beyond one token are in running.py.
"""

from torch import Tensor, nn


class Norm(nn.Module):
    """A norm over the last axis. Its class takes hidden_size, and its settings' fields by name.

    Attributes:
        scale: a factor on the output (depth_scaling.py). It multiplies the gain and the offset, so
            that it costs nothing per token. It is a Python float and no buffer: a buffer would be
            stored in checkpoints, and is lost when a module passes over the meta device.
    """

    scale: float = 1.0

    def scaled(self, gain: Tensor) -> Tensor:
        """The gain, or the offset, times `scale`."""
        return gain if self.scale == 1.0 else gain * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        raise NotImplementedError
