"""Which parameter gets which rule. No other file decides it.

Hidden matrices (weights of linear layers inside the blocks) go to the matrix rule. Embeddings, all
heads (an encoder's too), norms, biases, scalars, convolutions and any other parameter are
auxiliary: they go to AdamW, with a learning rate of their own. A tied head counts as the embedding.
Frozen parameters are in no group.

What would surprise: two axes do not make a parameter a matrix. A gain of (heads, head_dim) or a
table is not a linear map, and orthogonalising it would be wrong. So the kind of module decides, not
the shape.
"""

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from llmnorm.optim.fragments import master, whole_shape
from llmnorm.part import InputError, nearest


class Groups(NamedTuple):
    """Trainable parameters by name, each in exactly one group."""

    matrices: dict[str, nn.Parameter]
    auxiliary: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Matrix:
    """One matrix of a rule: a parameter, or some of its rows where projections are fused.

    Attributes:
        name: name of the parameter.
        suffix: "", or ".0", ".1", ... for the pieces of a fused parameter; ends the names of the
            piece's state.
        start, stop: the rows [start, stop) of the parameter.
    """

    name: str
    parameter: nn.Parameter
    suffix: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows of this matrix."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Number of columns of this matrix."""
        return whole_shape(self.parameter)[1]

    def weight(self) -> Tensor:
        """The weights, (rows, columns), in the parameter's memory."""
        return self.parameter.detach()[self.start : self.stop]

    def grad(self) -> Tensor:
        """The gradient, (rows, columns)."""
        assert self.parameter.grad is not None
        return self.parameter.grad[self.start : self.stop]


def split(model: nn.Module) -> Groups:
    """Sort the trainable parameters of a Hugging Face model (or of any module) into groups."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    base = getattr(model, "base_model", model)  # Hugging Face's name for the model without a head
    if isinstance(base, nn.Module):
        outside |= {id(p) for p in model.parameters()} - {id(p) for p in base.parameters()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - outside
    groups = Groups({}, {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups.matrices if id(parameter) in linear else groups.auxiliary
            group[name] = master(parameter)
    check(groups, model)
    return groups


def check(groups: Groups, model: nn.Module) -> None:
    """Refuse groups unless every trainable parameter, and no other, is in exactly one of them.

    Raises:
        ValueError: a parameter is in no group or in several, or does not belong there; names it.
    """
    claims = Counter(id(p) for members in groups for p in members.values())
    for name, parameter in model.named_parameters():
        count = claims.pop(id(master(parameter)), 0)
        if count != int(parameter.requires_grad):
            trained = "trainable" if parameter.requires_grad else "frozen"
            raise ValueError(f"{name}: {trained}, but in {count} optimizer groups")
    if claims:
        raise ValueError("an optimizer group has a parameter that the model does not have")


def matrices(groups: Groups, split_sizes: Mapping[str, list[int]]) -> list[Matrix]:
    """The matrices in the order of the model's parameters, fused projections cut into pieces.

    Args:
        split_sizes: pattern of parameter names (`*.qkv.weight`) -> rows of each piece.

    Raises:
        InputError: a pattern matches nothing, two match one parameter, or the rows do not add up.
    """
    found: list[Matrix] = []
    used: set[str] = set()
    for name, parameter in groups.matrices.items():
        patterns = [p for p in split_sizes if fnmatch.fnmatchcase(name, p)]
        if len(patterns) > 1:
            raise InputError(f"optimizer.split_sizes: {' and '.join(patterns)} both match {name}")
        used.update(patterns)
        rows = whole_shape(parameter)[0]
        sizes = split_sizes[patterns[0]] if patterns else [rows]
        if sum(sizes) != rows:
            raise InputError(
                f"optimizer.split_sizes: {patterns[0]}: {sizes} are {sum(sizes)} rows, "
                f"{name} has {rows}"
            )
        start = 0
        for number, size in enumerate(sizes):
            suffix = f".{number}" if patterns else ""
            found.append(Matrix(name, parameter, suffix, start, start + size))
            start += size
    for pattern in split_sizes:
        if pattern not in used:
            hint = nearest(pattern, list(groups.matrices)[:100])  # a model may have thousands
            raise InputError(f"optimizer.split_sizes: {pattern} matches no hidden matrix; {hint}")
    return found


def check_gradients(matrices: Mapping[str, nn.Parameter]) -> None:
    """Refuse a matrix without a gradient: the optimizer's momentum would move it all the same.

    Raises:
        ValueError: names the parameter.
    """
    for name, parameter in matrices.items():
        if parameter.grad is None:
            raise ValueError(f"{name}: trainable, but without a gradient")


def width(groups: Groups) -> int:
    """The width of the model: the most frequent number of columns of its hidden matrices."""
    return Counter(whole_shape(p)[-1] for p in groups.matrices.values()).most_common(1)[0][0]
