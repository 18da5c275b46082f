"""Weights as their optimizer sees them, wherever they lie.

Usually that is the parameter itself: whole, or under FSDP2 a DTensor with some of its rows. ZeRO
(parallel/zero.py) leaves each process a `Fragment` of every parameter's float32 master weights,
and hangs it on the parameter as its `master`: groups, optimizers, their state, moving averages and
checkpoints are made of masters, the model alone of parameters.

Elements are counted row by row. What would surprise: a fragment is one-dimensional and may be
empty; under ZeRO-3 the parameter is empty itself between its uses, so shapes are asked of masters.
"""

import torch
from torch import Tensor, nn


class Fragment(nn.Parameter):
    """Consecutive elements of a tensor, (n,), whose others other processes hold.

    Attributes:
        whole: the tensor's shape.
        cuts: process r holds the elements [cuts[r], cuts[r + 1]).
        rank: this process.
    """

    whole: torch.Size
    cuts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, data: Tensor, whole: torch.Size, cuts: tuple[int, ...], rank: int) -> "Fragment":
        """The elements `data`, in whose memory the fragment lives."""
        assert data.shape == (cuts[rank + 1] - cuts[rank],)
        fragment = cls(data, requires_grad=False)
        fragment.whole, fragment.cuts, fragment.rank = whole, cuts, rank
        return fragment

    def like(self, data: Tensor) -> "Fragment":
        """Other numbers of the same elements."""
        return Fragment.of(data, self.whole, self.cuts, self.rank)


def master(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer changes in the place of `parameter`: itself, or its fragment."""
    return getattr(parameter, "master", parameter)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of all that the processes hold of a tensor together."""
    return tensor.whole if isinstance(tensor, Fragment) else tensor.shape


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros in the place of this process's part of a tensor."""
    zeros = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return tensor.like(zeros) if isinstance(tensor, Fragment) else zeros
