"""What every norm is, and what the norms that look beyond one token are told.

Shapes: x and y (..., hidden); what is normalised is the last axis. Statistics are computed in
float32 (float64 for float64 input), and the output has the input's dtype.
"""

from torch import Tensor, nn


class Norm(nn.Module):
    """A norm over the last axis.

    Attributes:
        scale: multiplies the output by way of the gain, so that it costs nothing per token
            (depth_scaling.py). A Python float, never a buffer: what passes over the meta device
            loses its buffers, and a checkpoint would store it.
    """

    scale: float = 1.0

    def scaled(self, gain: Tensor) -> Tensor:
        """The gain, or the offset, times `scale`."""
        return gain if self.scale == 1.0 else gain * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., hidden)."""
        raise NotImplementedError
