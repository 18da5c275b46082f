"""The tensors that an optimizer changes: parameters, or fragments of their master weights.

Without ZeRO an optimizer changes the parameter itself: a whole one, or under FSDP2 a DTensor with
some of its rows. Under ZeRO (parallel/zero.py) each process has a `Fragment` of the float32 master
weights of every parameter, stored on the parameter as its attribute `master`. Groups, optimizers,
their state, moving averages and checkpoints use masters; only the model uses parameters.

The state of a stack of experts is shared out too: a process has the `Rows` of the experts that it
owns.

What would surprise: elements are counted row by row, a fragment is one-dimensional, and it may be
empty. Under ZeRO-3 the parameter too is empty between its uses, so shapes are those of masters.
"""

import torch
from torch import Tensor, nn


class Fragment(nn.Parameter):
    """Consecutive elements of a tensor, (n,); other processes hold the other elements.

    Attributes:
        whole: the shape of the tensor.
        cuts: process r holds the elements [cuts[r], cuts[r + 1]).
        rank: this process.
    """

    whole: torch.Size
    cuts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, data: Tensor, whole: torch.Size, cuts: tuple[int, ...], rank: int) -> "Fragment":
        """A fragment of the elements `data`, which it shares memory with."""
        assert data.shape == (cuts[rank + 1] - cuts[rank],)
        fragment = cls(data, requires_grad=False)
        fragment.whole, fragment.cuts, fragment.rank = whole, cuts, rank
        return fragment

    def like(self, data: Tensor) -> "Fragment":
        """A fragment of the same elements with the numbers `data`."""
        return Fragment.of(data, self.whole, self.cuts, self.rank)


class Rows(Tensor):
    """Consecutive rows of a tensor along its first axis; other processes hold the other rows.

    Attributes:
        start: the first of them.
        whole: the shape of the tensor.
    """

    start: int
    whole: tuple[int, ...]

    @classmethod
    def of(cls, data: Tensor, start: int, whole: tuple[int, ...]) -> "Rows":
        """The rows `data`, which it shares memory with."""
        assert data.shape[1:] == torch.Size(whole[1:]) and start + len(data) <= whole[0]
        rows = data.detach().as_subclass(cls)
        rows.start, rows.whole = start, whole
        return rows


def master(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer changes for `parameter`: the parameter itself, or its fragment."""
    return getattr(parameter, "master", parameter)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor with the parts of all processes put together."""
    return tensor.whole if isinstance(tensor, Fragment) else tensor.shape


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of the shape and kind of this process's part of a tensor."""
    zeros = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return tensor.like(zeros) if isinstance(tensor, Fragment) else zeros
