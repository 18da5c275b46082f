"""The matrices of a rule, and where they lie in the parameters that hold them.

A parameter is one matrix (rows, columns), several on top of each other (fused projections), or a
stack of experts (experts, rows, columns), each a matrix of its own. A row of a matrix makes one
output. Where a class stores inputs along the first axis, as GPT-2's Conv1D and gpt-oss's experts
do, the matrix is the transpose of what is stored.

What would surprise: the same rows of all experts of a stack are one `Matrix` with a `count`, so
that a step loops over no experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from llmnorm.optim.fragments import Rows, whole_shape


class Layout(NamedTuple):
    """How the matrices of a rule lie in a parameter.

    Attributes:
        transposed: whether each matrix is stored as (columns, rows).
        pieces: rows of each of several matrices on top of each other; empty for a single one.
        note: why it is a single matrix although it holds several projections.
    """

    transposed: bool = False
    pieces: tuple[int, ...] = ()
    note: str = ""


class Rates(NamedTuple):
    """What a parameter has beside the learning rate and the decay of its group.

    Attributes:
        lr: factor on the group's learning rate.
        weight_decay: in place of the group's; None: the group's.
    """

    lr: float = 1.0
    weight_decay: float | None = None

    def of(self, lr: float, weight_decay: float) -> tuple[float, float]:
        """The parameter's learning rate and decay, from those of its group."""
        return lr * self.lr, weight_decay if self.weight_decay is None else self.weight_decay


AS_ITS_GROUP = Rates()
Layouts = Mapping[str, Layout]
"""By name of a parameter; one that is not named is a single matrix as it is stored."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a rule, or the same rows of consecutive experts of a stack.

    Attributes:
        name: name of the parameter.
        suffix: "", or ".0", ".1", ... for the pieces of a fused parameter; ends the names of the
            piece's state.
        start, stop: the rows [start, stop) of the parameter's matrix, or of each expert's.
        transposed: as in `Layout`.
        first, last: the experts [first, last) of a stack; [0, 1) where there is none.
        number: among all matrices of the model, that of the parameter's first expert.
        rates: of the parameter.
    """

    name: str
    parameter: nn.Parameter
    suffix: str
    start: int
    stop: int
    transposed: bool
    first: int
    last: int
    number: int
    rates: Rates = AS_ITS_GROUP

    @property
    def rows(self) -> int:
        """Number of rows of this matrix."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Number of columns of this matrix."""
        return matrix_shape(self.parameter, self.transposed)[1]

    @property
    def count(self) -> int:
        """Number of experts; 1 where there is no stack."""
        return self.last - self.first

    def within(self, block: Tensor) -> Tensor:
        """These rows (count, rows, columns) of the whole experts `block`, in the same memory.

        Args:
            block: (count, *, *), as the parameter stores the experts [first, last).
        """
        matrices = block.mT if self.transposed else block
        return matrices[:, self.start : self.stop]

    def weight(self) -> Tensor:
        """The weights, (count, rows, columns), in the parameter's memory."""
        return self.within(self.stored(self.parameter.detach()))

    def grad(self) -> Tensor:
        """The gradient, (count, rows, columns)."""
        assert self.parameter.grad is not None
        return self.within(self.stored(self.parameter.grad))

    def stored(self, whole: Tensor) -> Tensor:
        """The experts [first, last) (count, *, *) of the parameter, or of its gradient."""
        return whole[self.first : self.last] if whole.ndim == 3 else whole.unsqueeze(0)

    def named(self, state: Tensor) -> Tensor:
        """The state as it is saved under the parameter's name.

        Args:
            state: (count, ...).

        Returns:
            A view into it: without the first axis where there is no stack, and `Rows` where other
            processes have the other experts.
        """
        whole = whole_shape(self.parameter)
        if len(whole) == 2:
            return state[0]
        if self.count == whole[0]:
            return state
        return Rows.of(state, self.first, (whole[0], *state.shape[1:]))


def matrix_shape(parameter: Tensor, transposed: bool) -> tuple[int, int]:
    """Rows and columns of the matrix that a parameter holds, or of each expert's."""
    first, second = whole_shape(parameter)[-2:]
    return (second, first) if transposed else (first, second)
